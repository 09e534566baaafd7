"""The steps of warm-up where nobody says how many, and that a run keeps those that it was begun with."""

import json
import shutil
from pathlib import Path

import pytest

from flashmhf.errors import InputError
from flashmhf.training.arguments import parse_arguments
from flashmhf.training.config import TrainConfig
from flashmhf.training.run import train
from flashmhf.training.run_files import TrainResult
from flashmhf.training.warmup import default_warmup

FLAGS = ["--per-device-train-batch-size", "2", "--logging-steps", "1", "--report-to", "none", "--disable-tqdm", "true"]
FLAGS += ["--save-steps", "20", "--eval-strategy", "no", "--learning-rate", "1e-3"]


def start(run: TrainConfig, folder: Path, *flags: str, resume: bool = False) -> TrainResult:
    return train(run, parse_arguments([*FLAGS, *flags], str(folder), resume=resume), resume=resume)


def rates(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [row["learning_rate"] for row in history if "loss" in row]


def recorded(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())["fingerprints"]["arguments"]


def edit(folder: Path, **changes) -> None:
    content = json.loads((folder / "run.json").read_text())
    content["fingerprints"]["arguments"] |= changes
    (folder / "run.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("steps", "warmup"),
    [(1, 0), (2, 1), (3, 1), (20, 2), (300, 30), (350, 35), (20_000, 2000), (20_010, 2000), (300_000, 2000)],
)
def test_a_tenth_of_the_run_but_at_most_two_thousand_steps(steps, warmup):
    assert default_warmup(steps) == warmup


def test_it_is_recorded_in_steps(short_run, tmp_path):
    start(short_run, tmp_path / "run", "--max-steps", "30", "--lr-scheduler-type", "constant_with_warmup")
    assert rates(tmp_path / "run") == pytest.approx([0, 1e-3 / 3, 2e-3 / 3, *[1e-3] * 27])
    assert recorded(tmp_path / "run")["warmup_steps"] == 3
    log = (tmp_path / "run/log.jsonl").read_text().splitlines()
    assert json.loads(log[0])["warmup_steps"] == 3
    assert json.loads((tmp_path / "run/training_args.json").read_text())["warmup_steps"] == 3


def test_steps_that_only_the_data_tell(short_run, tmp_path):
    result = start(short_run, tmp_path / "run", "--num-train-epochs", "0.02", "--lr-scheduler-type", "linear")
    assert recorded(tmp_path / "run")["warmup_steps"] == default_warmup(result.steps) > 1
    message = f"warmup-steps: expected fewer than the {result.steps} steps of the run, got 10000"
    with pytest.raises(InputError, match=message):
        start(short_run, tmp_path / "other", "--num-train-epochs", "0.02", "--warmup-steps", "10000")


def test_a_schedule_without_warmup_is_as_it_was(short_run, tmp_path):
    start(short_run, tmp_path / "run", "--max-steps", "2", "--lr-scheduler-type", "constant")
    assert rates(tmp_path / "run") == [1e-3, 1e-3]
    edit(tmp_path / "run", warmup_steps=0.02)  # as an earlier version recorded it
    start(short_run, tmp_path / "run", "--max-steps", "3", "--lr-scheduler-type", "constant", resume=True)
    assert rates(tmp_path / "run") == [1e-3] * 3


def test_a_longer_run_keeps_its_warmup(short_run, tmp_path):
    start(short_run, tmp_path / "run", "--max-steps", "20", "--lr-scheduler-type", "constant_with_warmup")
    start(short_run, tmp_path / "run", "--max-steps", "22", resume=True)
    assert rates(tmp_path / "run") == pytest.approx([0, 5e-4, *[1e-3] * 20])
    assert recorded(tmp_path / "run")["warmup_steps"] == 2


def test_a_run_of_an_earlier_version_keeps_its_schedule_and_its_precision(short_run, tmp_path, caplog):
    """What it took for granted is recorded, here a warm-up by share; none of it is given when the run is resumed."""
    old = ["--max-steps", "6", "--save-steps", "4"]
    given = ["--warmup-steps", "0.5", "--lr-scheduler-type", "cosine_with_min_lr", "--bf16", "false"]
    start(short_run, tmp_path / "run", *old, *given)
    whole = rates(tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoint-6")
    start(short_run, tmp_path / "run", *old, resume=True)
    assert rates(tmp_path / "run") == whole
    assert whole[3] == 1e-3
    now = recorded(tmp_path / "run")
    assert (now["warmup_steps"], now["bf16"], now["lr_scheduler_type"]) == (0.5, False, "cosine_with_min_lr")
    assert "from here on" not in caplog.text


def test_a_flag_that_is_given_is_honoured_and_said(short_run, tmp_path, caplog):
    start(short_run, tmp_path / "run", "--max-steps", "2", "--bf16", "true")
    start(short_run, tmp_path / "run", "--max-steps", "2", "--bf16", "false", resume=True)
    assert "bf16 was True before, and is False from here on" in caplog.text
    with pytest.raises(InputError, match="resume: expected the lr_scheduler_type of the earlier run"):
        start(short_run, tmp_path / "run", "--max-steps", "3", "--lr-scheduler-type", "cosine", resume=True)
