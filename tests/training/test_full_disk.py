"""A disk that fills up at any moment of a run: one line, the old model stays, nothing incomplete is left."""

import errno
import hashlib
import os
import shutil
from pathlib import Path

import pytest
from safetensors import SafetensorError

from flashmhf.training.arguments import parse_arguments
from flashmhf.training.checkpoints import UNFINISHED
from flashmhf.training.manifest import check
from flashmhf.training.run import train

FLAGS = ["--per-device-train-batch-size", "2", "--report-to", "none", "--disable-tqdm", "true", "--max-steps", "2"]
FLAGS += ["--eval-strategy", "no", "--save-steps", "2"]


@pytest.fixture(scope="module")
def finished(short_run, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "finished"
    train(short_run, parse_arguments(FLAGS, str(folder)))
    return folder


def hash_of_model(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def assert_nothing_is_left(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    assert not names & {UNFINISHED, ".lock"}
    assert not [name for name in names if name.endswith(".tmp")]


def fail_at(monkeypatch, number: int) -> list[int]:
    """The disk is full at this call of fsync, which every complete file goes through; the calls are counted."""
    calls: list[int] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == number:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    return calls


@pytest.mark.slow
def test_at_every_file_of_a_run_that_is_finished_again(short_run, finished, tmp_path):
    number, ended = 0, False
    while not ended:
        number += 1
        folder = Path(shutil.copytree(finished, tmp_path / "run"))
        with pytest.MonkeyPatch.context() as patch:
            calls = fail_at(patch, number)
            try:
                train(short_run, parse_arguments(FLAGS, str(folder)), resume=True)
                ended = True
            except OSError as error:
                assert str(error).endswith("; --resume continues from checkpoint-2")  # noqa: PT017
                assert "\n" not in str(error)  # noqa: PT017
        assert hash_of_model(folder) == hash_of_model(finished)
        assert check(folder / "checkpoint-2") is None
        assert_nothing_is_left(folder)
        shutil.rmtree(folder)
    assert number > len(calls) >= 8  # run.json, model, configuration, tokenizer, arguments, state, result


@pytest.mark.parametrize("number", [1, 2])
def test_before_the_first_step(short_run, tmp_path, monkeypatch, number):
    fail_at(monkeypatch, number)
    with pytest.raises(OSError, match=r"^a disk or a quota is full \(.*run\.json'\); no checkpoint has been written"):
        train(short_run, parse_arguments(FLAGS, str(tmp_path / "run")))
    if (tmp_path / "run").exists():
        assert_nothing_is_left(tmp_path / "run")


def test_while_the_final_model_is_written(short_run, finished, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(finished, tmp_path / "run"))

    def half(tensors, file, *args, **options) -> None:
        Path(file).write_bytes(b"half of it")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", half)
    with pytest.raises(OSError, match=r"^a disk or a quota is full \(Error while serializing: .*from checkpoint-2$"):
        train(short_run, parse_arguments(FLAGS, str(folder)), resume=True)
    assert hash_of_model(folder) == hash_of_model(finished)
    assert_nothing_is_left(folder)


def test_what_a_kill_left_of_the_final_model_is_removed(short_run, finished, tmp_path):
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    (folder / UNFINISHED / "model").mkdir(parents=True)
    (folder / UNFINISHED / "model/model.safetensors").write_bytes(b"half of it")
    (folder / "model-00001-of-00002.safetensors").touch()  # of an older model that was split
    train(short_run, parse_arguments(FLAGS, str(folder)), resume=True)
    assert hash_of_model(folder) == hash_of_model(finished)
    assert [path.name for path in folder.glob("*.safetensors")] == ["model.safetensors"]
    assert_nothing_is_left(folder)


def test_a_link_in_the_place_of_the_unfinished_folder_is_not_followed(short_run, finished, tmp_path):
    folder, victim = Path(shutil.copytree(finished, tmp_path / "run")), tmp_path / "victim"
    shutil.copytree(finished / "checkpoint-2", victim / "checkpoint-9")
    (folder / UNFINISHED).symlink_to(victim)
    (folder / "model.safetensors").unlink()
    (tmp_path / "precious").write_text("precious")
    (folder / "model.safetensors").symlink_to(tmp_path / "precious")
    train(short_run, parse_arguments(FLAGS, str(folder)), resume=True)
    assert check(victim / "checkpoint-9") is None
    assert (tmp_path / "precious").read_text() == "precious"
    assert hash_of_model(folder) == hash_of_model(finished)
    assert_nothing_is_left(folder)
