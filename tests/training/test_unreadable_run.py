"""Every file of a run's folder, unreadable in every way: one line that names it, or an older checkpoint."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from damage import DAMAGES, assert_one_line, wrong_values
from flashmhf.errors import InputError, RunError
from flashmhf.reports.logged_run import read_history
from flashmhf.reports.run import write_run_report
from flashmhf.training.arguments import parse_arguments
from flashmhf.training.config import TrainConfig
from flashmhf.training.manifest import MANIFEST, write_manifest
from flashmhf.training.resuming import check_same_inputs, last_good_checkpoint, prepare_output_dir
from flashmhf.training.run import train
from flashmhf.training.run_files import read_fingerprints, read_result
from flashmhf.training.run_log import read_log

FLAGS = ["--per-device-train-batch-size", "2", "--report-to", "none", "--disable-tqdm", "true", "--save-steps", "2"]
FLAGS += ["--eval-strategy", "no", "--logging-steps", "1", "--save-total-limit", "9"]
ERRORS = (InputError, RunError, OSError)
OF_FOLDER = ("run.json", "result.json", "log.jsonl", "trainer_state.json", "config.json", "training_args.json")


@pytest.fixture(scope="module")
def finished(short_run, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "finished"
    train(short_run, parse_arguments([*FLAGS, "--max-steps", "4"], str(folder)))
    return folder


@pytest.fixture
def folder(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def restore(finished: Path, folder: Path, name: str) -> None:
    file = folder / name
    if file.is_dir():
        file.rmdir()
    file.unlink(missing_ok=True)
    shutil.copy2(finished / name, file)


def use(folder: Path, run: TrainConfig) -> list:
    """What commands do with the folder."""
    inputs = read_fingerprints(folder)

    def resume() -> None:
        prepare_output_dir(folder, run, resume=True)
        if inputs is not None:
            check_same_inputs(folder, inputs)

    return [
        resume,
        lambda: read_result(folder),
        lambda: read_log(folder),
        lambda: read_history(folder),
    ]


@pytest.mark.parametrize("name", OF_FOLDER)
def test_files_of_the_folder(short_run, finished, folder, name):
    actions = use(folder, short_run)
    for damage, apply in DAMAGES.items():
        apply(folder / name)
        for action in actions:
            message = assert_one_line(f"{name}, {damage}", action, ERRORS)
            assert message is None or name in message, (damage, message)
        restore(finished, folder, name)


@pytest.mark.parametrize("name", ["run.json", "result.json"])
def test_values_of_a_wrong_type(short_run, finished, folder, name):
    actions = use(folder, short_run)[:2]
    for what, content in wrong_values(folder / name):
        (folder / name).write_text(json.dumps(content))
        for action in actions:
            assert_one_line(f"{name}, {what}", action, ERRORS)


@pytest.mark.parametrize("name", ["run.json", "log.jsonl", "trainer_state.json"])
@pytest.mark.slow
def test_the_report(finished, folder, name):
    for damage, apply in DAMAGES.items():
        apply(folder / name)
        message = assert_one_line(
            f"{name}, {damage}", lambda: write_run_report(folder, folder.parent / "page.html"), ERRORS
        )
        assert message is None or name in message or "at least one logged loss" in message, (damage, message)
        restore(finished, folder, name)


LINES = (
    *(
        '{"step": "7", "time": 1}',
        '{"step": 7}',
        '{"step": 7, "time": null}',
        "[" * 200_000,
        '{"start": {}, "time": 1}',
    ),
    *('{"step": 1e300, "time": 1, "loss": "high"}', "7", '{"step": [], "start": {}, "time": []}', '{"step": 1e999}'),
)


def test_lines_of_the_log(folder):
    before = read_log(folder)
    with (folder / "log.jsonl").open("a") as file:
        file.write("\n".join(LINES))
    assert read_log(folder) == before


def test_files_of_a_checkpoint(short_run, finished, folder):
    newest, before = folder / "checkpoint-4", folder / "checkpoint-2"
    for name in sorted(path.name for path in newest.iterdir()):
        for apply in DAMAGES.values():
            apply(newest / name)
            assert last_good_checkpoint(folder) == before, name
            restore(finished, folder, f"checkpoint-4/{name}")
    for content in ('{"files":{"../../../etc/passwd":{"size":1,"sha256":"x"}}}', '{"files":[]}', '{"files":null}'):
        (newest / MANIFEST).write_text(content)
        assert last_good_checkpoint(folder) == before
    (newest / MANIFEST).write_text('{"files":{"config.json":{"size":"a","sha256":3}}}')
    assert last_good_checkpoint(folder) == before


def test_the_state_of_a_checkpoint_with_a_manifest_that_fits(folder):
    newest = folder / "checkpoint-4"
    for damage, apply in DAMAGES.items():
        if damage in ("folder", "dangling link"):
            continue  # its manifest cannot list them
        content = (newest / "trainer_state.json").read_bytes()
        apply(newest / "trainer_state.json")
        write_manifest(newest)
        assert last_good_checkpoint(folder) == folder / "checkpoint-2", damage
        (newest / "trainer_state.json").write_bytes(content)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("content", ["text", [], {"state": 7}, {}, torch.zeros(3)], ids=repr)
def test_the_state_of_something_else_is_named(short_run, folder, name, content):
    """The pickles are harmless, and the manifest fits them."""
    shutil.rmtree(folder / "checkpoint-4")
    torch.save(content, folder / "checkpoint-2" / name)
    write_manifest(folder / "checkpoint-2")
    arguments = parse_arguments([*FLAGS, "--max-steps", "4"], str(folder))
    with pytest.raises(InputError, match=r"resume: expected the state of this run, got checkpoint-2, which cannot be"):
        train(short_run, arguments, resume=True)
