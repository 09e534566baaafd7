"""Which checkpoint a run resumes from: not a truncated, altered, hostile or unfinished one; what rotation keeps."""

import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flashmhf.errors import InputError
from flashmhf.training.arguments import parse_arguments
from flashmhf.training.checkpoints import UNFINISHED, checkpoints, recover, rotate
from flashmhf.training.config import TrainConfig
from flashmhf.training.manifest import MANIFEST, check, write_manifest
from flashmhf.training.pickles import unsafe_reason
from flashmhf.training.resuming import last_good_checkpoint, only_writer, prepare_output_dir
from flashmhf.training.run import train

FLAGS = ["--per-device-train-batch-size", "2", "--logging-steps", "1", "--report-to", "none", "--disable-tqdm", "true"]
FLAGS += ["--save-steps", "2", "--eval-strategy", "no", "--save-total-limit", "9"]


@pytest.fixture(scope="module")
def finished(short_run, tmp_path_factory) -> Path:
    """A run of six steps with checkpoints at 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    train(short_run, parse_arguments([*FLAGS, "--max-steps", "6"], str(folder)))
    return folder


@pytest.fixture
def folder(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def resume(run: TrainConfig, folder: Path, steps: int = 6) -> dict:
    return train(run, parse_arguments([*FLAGS, "--max-steps", str(steps)], str(folder)), resume=True)


def losses(folder: Path) -> dict[int, float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return {row["step"]: row["loss"] for row in history if "loss" in row}


def cut(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def flip(file: Path) -> None:
    altered = bytearray(file.read_bytes())
    altered[len(altered) // 2] ^= 1
    file.write_bytes(altered)


def test_every_truncated_altered_or_missing_file_of_a_checkpoint_is_found(folder):
    """Each file: truncated to half, one bit flipped, removed. The number is in docs/reliability.md."""
    checkpoint, found = folder / "checkpoint-6", 0
    names = sorted(path.name for path in checkpoint.iterdir())
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", MANIFEST} <= set(names)
    for name in names:
        content = (checkpoint / name).read_bytes()
        for damage in (cut, flip, Path.unlink):
            damage(checkpoint / name)
            assert name in (check(checkpoint) or ""), (name, damage)
            assert last_good_checkpoint(folder) == folder / "checkpoint-4"
            (checkpoint / name).write_bytes(content)
            found += 1
    assert check(checkpoint) is None
    assert found == 3 * len(names) >= 30


def test_a_corrupt_checkpoint_is_passed_over_for_the_one_before(short_run, folder, finished, caplog):
    cut(folder / "checkpoint-6/optimizer.pt")
    flip(folder / "checkpoint-4/model.safetensors")
    with caplog.at_level(logging.WARNING, "flashmhf"):
        resume(short_run, folder)
    lines = [record.getMessage() for record in caplog.records if "passed over" in record.getMessage()]
    assert len(lines) == 2
    assert lines[0].startswith("checkpoint-6 passed over: optimizer.pt has ")
    assert lines[1] == "checkpoint-4 passed over: model.safetensors does not have the sha256 it was written with"
    assert losses(folder) == losses(finished)
    assert [check(checkpoint) for checkpoint in checkpoints(folder)] == [None] * 3  # 6 and 4 were written again


def test_no_complete_checkpoint_is_one_line(short_run, folder):
    for checkpoint in checkpoints(folder):
        (checkpoint / MANIFEST).unlink()
    message = (
        r"resume: expected a complete checkpoint in .*run, got 3 that are not: "
        r"checkpoint-6 \(manifest.json is missing\)"
    )
    with pytest.raises(InputError, match=message):
        resume(short_run, folder)


def test_only_tensors_of_a_run_are_pickled(folder):
    assert unsafe_reason(folder) is None
    assert not list(folder.rglob("training_args.bin"))
    assert json.loads((folder / "checkpoint-6/training_args.json").read_text())["max_steps"] == 6


def test_a_run_killed_at_its_start_starts_again(tmp_path):
    (tmp_path / ".flashmhf-0123456789abcdef.tmp").write_text("{")  # while it wrote run.json
    with only_writer(tmp_path):
        assert prepare_output_dir(tmp_path, TrainConfig(model="small"), resume=False) is None


class Malicious:
    """Unpickled, it leaves a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "scaler.pt"])
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_a_malicious_pickle_is_named_and_never_run(short_run, folder, caplog, name, form):
    file, trace = folder / "checkpoint-6" / name, folder.parent / "executed"
    if form == "pickle":
        file.write_bytes(pickle.dumps(Malicious(trace)))
    else:
        torch.save({"state": Malicious(trace)}, file, _use_new_zipfile_serialization=form == "zip")
    write_manifest(folder / "checkpoint-6")  # from a stranger: the hashes are right
    with caplog.at_level(logging.WARNING, "flashmhf"):
        assert last_good_checkpoint(folder) == folder / "checkpoint-4"
    (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert line.startswith(f"checkpoint-6 passed over: {name} is ")
    assert "\n" not in line
    if form == "zip":
        assert "mkdir; it was not loaded" in line
    assert not trace.exists()


def test_the_trainer_itself_runs_no_pickle(short_run, folder, monkeypatch):
    """Were the look at the pickles to miss one, loading would still refuse it."""
    monkeypatch.setattr("flashmhf.training.resuming.unsafe_reason", lambda folder: None)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        file, trace = folder / "checkpoint-6" / name, folder.parent / "executed"
        content = file.read_bytes()
        torch.save({"state": Malicious(trace)}, file)
        write_manifest(folder / "checkpoint-6")
        with pytest.raises(InputError, match=r"checkpoint-6, which cannot be loaded .Weights only load failed"):
            resume(short_run, folder, steps=8)
        assert not trace.exists()
        file.write_bytes(content)


def test_rotation_counts_complete_checkpoints(folder):
    (folder / "checkpoint-6/optimizer.pt").unlink()
    rotate(folder, 1, None)
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-6", "checkpoint-4"]
    rotate(folder, 1, None)
    assert last_good_checkpoint(folder) == folder / "checkpoint-4"


def test_rotation_keeps_the_best_and_the_newest(folder):
    rotate(folder, None, None)
    assert len(checkpoints(folder)) == 3
    rotate(folder, 1, folder / "checkpoint-2")
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-6", "checkpoint-2"]


def test_an_incomplete_checkpoint_is_removed_and_a_complete_one_gets_its_name(folder, caplog):
    (folder / UNFINISHED).mkdir()
    (folder / "checkpoint-6").rename(folder / UNFINISHED / "checkpoint-6")
    recover(folder)
    assert check(folder / "checkpoint-6") is None
    assert not (folder / UNFINISHED).exists()
    (folder / UNFINISHED).mkdir()
    (folder / "checkpoint-6").rename(folder / UNFINISHED / "checkpoint-6")
    (folder / UNFINISHED / "checkpoint-6" / MANIFEST).unlink()
    recover(folder)
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-4", "checkpoint-2"]
    assert [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING] == [
        "checkpoint-6 was not finished when the run ended; removed"
    ]
    assert not (folder / UNFINISHED).exists()


def test_the_best_checkpoint_is_known_by_its_final_name(short_run, tmp_path):
    flags = [*FLAGS, "--max-steps", "4", "--eval-strategy", "steps", "--eval-steps", "2"]
    flags += ["--load-best-model-at-end", "true", "--save-total-limit", "1"]
    train(short_run, parse_arguments(flags, str(tmp_path / "run")))
    state = json.loads((tmp_path / "run/trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / "run/checkpoint-4")
    saved = json.loads((tmp_path / "run/checkpoint-4/trainer_state.json").read_text())
    assert saved["best_model_checkpoint"] == state["best_model_checkpoint"]


@pytest.fixture
def small_disk(tmp_path):
    """A disk of three MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(place)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"needs the right to mount: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_disk_that_fills_up_keeps_the_last_good_checkpoint(short_run, small_disk, caplog):
    flags = [*FLAGS, "--max-steps", "60", "--save-total-limit", "50"]
    with pytest.raises(
        OSError, match=r"the disk that holds .*run is full; --resume continues from checkpoint-\d+$"
    ) as caught:
        train(short_run, parse_arguments(flags, str(small_disk / "run")))
    assert "\n" not in str(caught.value)
    kept = str(caught.value).split()[-1]
    assert last_good_checkpoint(small_disk / "run") == small_disk / "run" / kept
    assert not (small_disk / "run" / UNFINISHED).exists()
    for folder in checkpoints(small_disk / "run")[1:]:
        shutil.rmtree(folder)  # as a user would make room
    flags = [*FLAGS, "--max-steps", "60", "--save-total-limit", "2"]
    assert train(short_run, parse_arguments(flags, str(small_disk / "run")), resume=True).steps == 60


def test_two_processes_never_train_into_one_folder(short_run, tmp_path):
    hold = "import sys; from pathlib import Path; from flashmhf.training.resuming import only_writer\n"
    hold += "with only_writer(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    folder = tmp_path / "a/b"
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(
            InputError, match=r"output-dir: expected a folder that no other process trains into, got .*a/b"
        ):
            train(short_run, parse_arguments(["--max-steps", "1"], str(folder)))
        holder.stdin.close()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed/.lock").touch()  # of a process that was killed
    with only_writer(tmp_path / "killed"):
        assert prepare_output_dir(tmp_path / "killed", TrainConfig(model="small"), False) is None
