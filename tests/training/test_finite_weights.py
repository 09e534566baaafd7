"""Models that are not finite: no training starts from them, they are saved nowhere, and every file stays JSON."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flashmhf.errors import RunError
from flashmhf.models.loading import load_model
from flashmhf.training.arguments import parse_arguments
from flashmhf.training.checkpoints import checkpoints
from flashmhf.training.config import TrainConfig
from flashmhf.training.run import train
from flashmhf.training.trainer import PretrainingTrainer

FLAGS = ["--per-device-train-batch-size", "4", "--logging-steps", "1", "--report-to", "none", "--disable-tqdm", "true"]
FLAGS += ["--max-steps", "6", "--save-steps", "2", "--eval-steps", "2"]


def start(run: TrainConfig, folder: Path, *flags: str, resume: bool = False):
    return train(run, parse_arguments([*FLAGS, *flags], str(folder)), resume=resume)


def poison_after(monkeypatch, step: int, value: float = math.nan) -> None:
    """The optimizer's step with this number makes one weight NaN or infinite."""
    create = PretrainingTrainer.create_optimizer

    def created(trainer, *args, **options):
        optimizer = create(trainer, *args, **options)
        take = optimizer.step

        def poisoned(*args, **options):
            take(*args, **options)
            if trainer.state.global_step + 1 == step:
                trainer.model.model.norm.weight.data[0] = value

        optimizer.step = poisoned
        return optimizer

    monkeypatch.setattr(PretrainingTrainer, "create_optimizer", created)


def check_json(folder: Path) -> None:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} in a file of {folder}")

    for file in folder.rglob("*.json*"):
        for line in file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]:
            json.loads(line, parse_constant=refuse)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("limit", [1, 1000])
def test_weights_that_stop_being_finite_end_the_run_and_keep_the_good_checkpoints(
    run, tmp_path, monkeypatch, value, limit
):
    poison_after(monkeypatch, 4, value)
    with pytest.raises(
        RunError, match=r"weights: expected finite values after step \d, got NaN .* in model.norm.weight"
    ):
        start(replace(run, max_non_finite_steps=limit), tmp_path / "run", "--save-total-limit", "1")
    assert [folder.name for folder in checkpoints(tmp_path / "run")] == ["checkpoint-2"]
    assert not (tmp_path / "run/model.safetensors").exists()
    assert not (tmp_path / "run/result.json").exists()
    check_json(tmp_path / "run")
    monkeypatch.undo()
    assert start(run, tmp_path / "run", resume=True).steps == 6


def test_checkpoints_of_skipped_steps_displace_no_older_one(run, tmp_path, monkeypatch):
    """Finite weights after which no loss is finite: only older ones may be of use."""
    compute = PretrainingTrainer.compute_loss

    def overflows(trainer, model, *args, **options):
        loss = compute(trainer, model, *args, **options)
        return loss * math.inf if model.training and trainer.state.global_step >= 3 else loss

    monkeypatch.setattr(PretrainingTrainer, "compute_loss", overflows)
    result = start(replace(run, max_non_finite_steps=1000), tmp_path / "run", "--save-total-limit", "1")
    assert result.skipped_steps == 3
    assert [folder.name for folder in checkpoints(tmp_path / "run")] == ["checkpoint-6", "checkpoint-4", "checkpoint-2"]


def test_the_last_step_is_checked_too(run, tmp_path, monkeypatch):
    poison_after(monkeypatch, 6)
    with pytest.raises(RunError, match="weights: expected finite values after step 6"):
        start(run, tmp_path / "run", "--save-strategy", "no", "--eval-strategy", "no")
    assert not (tmp_path / "run/model.safetensors").exists()


def test_training_does_not_start_from_a_model_that_is_not_finite(run, tmp_path):
    start(run, tmp_path / "first")
    model = load_model(str(tmp_path / "first"))
    model.model.norm.weight.data[3] = math.nan
    model.save_pretrained(tmp_path / "first")
    with pytest.raises(RunError, match=r"finite weights, got NaN .*model.norm.weight"):
        start(replace(run, model=str(tmp_path / "first")), tmp_path / "second")
    assert not (tmp_path / "second").exists()


def test_a_validation_loss_that_is_not_finite_is_no_result(run, tmp_path, monkeypatch, caplog):
    """One bad batch of many: the Trainer would leave it out of the mean."""
    step = PretrainingTrainer.prediction_step
    batches = []

    def overflows_once(trainer, *args, **options):
        loss, *others = step(trainer, *args, **options)
        batches.append(loss)
        return (loss * math.nan if len(batches) % 3 == 1 else loss), *others

    monkeypatch.setattr(PretrainingTrainer, "prediction_step", overflows_once)
    with pytest.raises(RunError, match="validation loss: expected a finite one after step 6, got nan; the final model"):
        start(run, tmp_path / "run", "--load-best-model-at-end", "true")
    assert "validation loss at step 2 is nan" in caplog.text
    assert not (tmp_path / "run/model.safetensors").exists()
    state = json.loads((tmp_path / "run/checkpoint-6/trainer_state.json").read_text())
    assert (state["best_metric"], state["best_global_step"]) == (None, None)
    assert [row["eval_loss"] for row in state["log_history"] if "eval_loss" in row] == [None, None, None]
    check_json(tmp_path / "run")


def test_skipped_steps_leave_valid_json(run, tmp_path, monkeypatch):
    """The Trainer's running sum would stay NaN after one infinite loss."""
    compute = PretrainingTrainer.compute_loss

    def overflows(trainer, model, *args, **options):
        loss = compute(trainer, model, *args, **options)
        return loss * math.inf if model.training and trainer.state.global_step == 2 else loss

    monkeypatch.setattr(PretrainingTrainer, "compute_loss", overflows)
    result = start(run, tmp_path / "run", "--logging-nan-inf-filter", "false")
    assert result.skipped_steps == 1
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    rows = [line for line in lines if "loss" in line]
    assert [row["step"] for row in rows if row["loss"] is None] == [3]
    assert result.train_loss == rows[-1]["loss"]
    check_json(tmp_path / "run")


def test_full_evaluation_in_half_precision_leaves_the_weights_as_they_were(run, tmp_path):
    start(run, tmp_path / "plain")
    start(run, tmp_path / "half", "--bf16-full-eval", "true")
    plain, half = (load_model(str(tmp_path / name)).state_dict() for name in ("plain", "half"))
    assert all(half[name].dtype == torch.float32 and torch.equal(half[name], plain[name]) for name in plain)
