"""A finished command typed again with --resume goes through the end of training once more and changes nothing."""

import json
import shutil
import signal
from pathlib import Path

import pytest

from flashmhf.errors import InputError, RunError
from flashmhf.training.arguments import parse_arguments
from flashmhf.training.callbacks import StopOnSignal
from flashmhf.training.config import TrainConfig
from flashmhf.training.manifest import MANIFEST
from flashmhf.training.run import train
from flashmhf.training.run_files import TrainResult

FLAGS = ["--per-device-train-batch-size", "4", "--report-to", "tensorboard", "--disable-tqdm", "true"]
# The first checkpoint, of the highest loss, is the best one for sure.
BEST = ["--max-steps", "6", "--eval-steps", "2", "--save-steps", "2", "--save-total-limit", "9"]
BEST += ["--load-best-model-at-end", "true", "--metric-for-best-model", "loss", "--greater-is-better", "true"]


def start(run: TrainConfig, folder: Path, *flags: str, resume: bool = False) -> TrainResult:
    return train(run, parse_arguments([*FLAGS, *flags], str(folder)), resume=resume)


def state(folder: Path) -> dict:
    return json.loads((folder / "trainer_state.json").read_text())


def test_the_best_model_stays_and_so_does_the_result(run, tmp_path):
    first = start(run, tmp_path / "run", *BEST)
    weights, curves = (tmp_path / "run/model.safetensors").read_bytes(), list((tmp_path / "run/runs").rglob("events.*"))
    assert weights == (tmp_path / "run/checkpoint-2/model.safetensors").read_bytes()
    again = start(run, tmp_path / "run", *BEST, resume=True)
    assert (tmp_path / "run/model.safetensors").read_bytes() == weights
    assert (again.steps, again.validation_loss, again.train_loss) == (6, first.validation_loss, first.train_loss)
    assert list((tmp_path / "run/runs").rglob("events.*")) == curves
    assert not any(row.get("train_loss") == 0 for row in state(tmp_path / "run")["log_history"])


def test_the_newest_checkpoint_stays_next_to_the_best_one(run, tmp_path):
    """Without it, the command typed again would train from the best one on."""
    start(run, tmp_path / "run", *BEST, "--save-total-limit", "1")
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-6"]
    log = (tmp_path / "run/log.jsonl").read_text()
    start(run, tmp_path / "run", *BEST, "--save-total-limit", "1", resume=True)
    again = (tmp_path / "run/log.jsonl").read_text().removeprefix(log)
    assert '"loss"' not in again


def test_the_best_checkpoint_is_found_in_a_folder_that_was_moved(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start(run, Path("run"), *BEST)
    weights = Path("run/model.safetensors").read_bytes()
    Path("run").rename("elsewhere")
    start(run, tmp_path / "elsewhere", *BEST, resume=True)
    assert Path("elsewhere/model.safetensors").read_bytes() == weights
    assert state(Path("elsewhere"))["best_model_checkpoint"] == str(tmp_path / "elsewhere/checkpoint-2")


def test_a_best_checkpoint_that_is_gone_or_damaged_is_not_replaced_by_the_last(run, tmp_path):
    start(run, tmp_path / "run", *BEST)
    weights = (tmp_path / "run/model.safetensors").read_bytes()
    (tmp_path / "run/checkpoint-2" / MANIFEST).unlink()
    with pytest.raises(RunError, match=r"load-best-model-at-end: expected the files .*checkpoint-2, got manifest.json"):
        start(run, tmp_path / "run", *BEST, resume=True)
    shutil.rmtree(tmp_path / "run/checkpoint-2")
    with pytest.raises(
        InputError, match=r"load-best-model-at-end: expected checkpoint-2, the best so far, in .*run, g"
    ):
        start(run, tmp_path / "run", *BEST, resume=True)
    assert (tmp_path / "run/model.safetensors").read_bytes() == weights


@pytest.mark.parametrize(
    ("before", "after", "steps"),
    [
        (["--max-steps", "2"], ["--max-steps", "4"], 4),
        (["--max-steps", "4"], ["--max-steps", "2"], 4),
        (["--max-steps", "2"], ["--num-train-epochs", "0.012"], 4),
        (["--num-train-epochs", "0.006"], ["--num-train-epochs", "0.012"], 4),
    ],
)
def test_the_arguments_of_the_new_command_say_whether_it_is_finished(run, tmp_path, before, after, steps):
    flags = ("--eval-strategy", "no", "--save-steps", "2")
    start(run, tmp_path / "run", *before, *flags)
    assert start(run, tmp_path / "run", *after, *flags, resume=True).steps == steps


def test_a_run_that_was_killed_before_its_model_was_saved_is_completed(run, tmp_path):
    first = start(run, tmp_path / "run", *BEST)
    weights = (tmp_path / "run/model.safetensors").read_bytes()
    for name in ("model.safetensors", "result.json", "trainer_state.json"):
        (tmp_path / "run" / name).unlink()
    assert start(run, tmp_path / "run", *BEST, resume=True).validation_loss == first.validation_loss
    assert (tmp_path / "run/model.safetensors").read_bytes() == weights
    assert (tmp_path / "run/result.json").is_file()


def test_a_checkpoint_without_its_optimizer_is_not_resumed_with_a_new_one(run, tmp_path):
    flags = ("--eval-strategy", "no", "--save-steps", "2")
    start(run, tmp_path / "bare", "--max-steps", "2", "--save-only-model", "true", *flags)
    assert start(run, tmp_path / "bare", "--max-steps", "2", *flags, resume=True).steps == 2  # none is needed
    with pytest.raises(InputError, match="resume: expected a checkpoint with the optimizer's state, got checkpoint-2"):
        start(run, tmp_path / "bare", "--max-steps", "4", *flags, resume=True)


def test_a_signal_saves_a_checkpoint_although_only_better_ones_are_saved(run, tmp_path, monkeypatch):
    """The Trainer would forget it in a step that evaluates without finding a better model."""
    ended = StopOnSignal.on_step_end

    def at_the_second_step(stop, args, state, control, **options):
        if state.global_step == 2:
            stop._receive(signal.SIGTERM, None)
        return ended(stop, args, state, control, **options)

    monkeypatch.setattr(StopOnSignal, "on_step_end", at_the_second_step)
    flags = ("--max-steps", "4", "--save-strategy", "best", "--eval-steps", "1", "--greater-is-better", "true")
    result = start(run, tmp_path / "run", *flags, "--metric-for-best-model", "loss")
    assert (result.steps, result.interrupted_by) == (2, signal.SIGTERM)
    assert (tmp_path / "run/checkpoint-2").is_dir()
