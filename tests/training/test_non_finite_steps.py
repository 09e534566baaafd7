"""Losses and gradients that are not finite, and losses that stand out: skipped, counted, named with their data."""

import json
import logging
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flashmhf.data.mixing import load_blocks
from flashmhf.data.shuffling import ShuffledBlocks
from flashmhf.data.tokenizer import byte_tokenizer
from flashmhf.errors import InputError, RunError
from flashmhf.models.loading import load_model
from flashmhf.training.arguments import parse_arguments
from flashmhf.training.config import TrainConfig
from flashmhf.training.non_finite_steps import FlaggedStep, LossWindow, _described, numbered
from flashmhf.training.run import train
from flashmhf.training.run_files import TrainResult
from flashmhf.training.trainer import PretrainingTrainer

FLAGS = ["--per-device-train-batch-size", "2", "--logging-steps", "1", "--report-to", "none", "--disable-tqdm", "true"]
FLAGS += ["--eval-strategy", "no", "--save-strategy", "no", "--logging-nan-inf-filter", "false", "--warmup-steps", "0"]


def start(run: TrainConfig, folder: Path, *flags: str, resume: bool = False, **changes) -> TrainResult:
    return train(
        replace(run, **changes), parse_arguments([*FLAGS, "--max-steps", "6", *flags], str(folder)), resume=resume
    )


def history(folder: Path, key: str) -> list[dict]:
    rows = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [row for row in rows if key in row]


@pytest.fixture
def spoil(monkeypatch):
    """Multiplies the losses of some steps, counted from 1; returns the weights' sums before every step."""

    def spoil(factors: dict[int, float]) -> list[float]:
        compute, sums = PretrainingTrainer.compute_loss, []

        def spoiled(self, model, inputs, *args, **options):
            if not model.training:
                return compute(self, model, inputs, *args, **options)
            sums.append(sum(parameter.double().sum().item() for parameter in model.parameters()))
            return compute(self, model, inputs, *args, **options) * factors.get(self.state.global_step + 1, 1.0)

        monkeypatch.setattr(PretrainingTrainer, "compute_loss", spoiled)
        return sums

    return spoil


@pytest.mark.parametrize("factor", [math.nan, math.inf, -math.inf])
def test_a_step_without_a_finite_loss_is_skipped(short_run, tmp_path, spoil, caplog, factor):
    sums = spoil({3: factor})
    with caplog.at_level(logging.WARNING, "flashmhf"):
        result = start(short_run, tmp_path / "run")
    assert result.steps == 6
    assert result.skipped_steps == 1
    assert sums[2] == sums[3]  # nothing was learnt from it, not even by weight decay
    assert len(set(sums)) == 5
    (row,) = history(tmp_path / "run", "skipped")
    assert row["step"] == 3
    assert len(row["blocks"]) == 2
    assert f"step 3 skipped: loss {factor}, gradient norm nan; blocks {row['blocks'][0]}, " in caplog.text
    assert all(torch.isfinite(p).all() for p in load_model(str(tmp_path / "run")).parameters())


def test_a_step_with_a_finite_loss_but_not_gradient_is_skipped(short_run, tmp_path, monkeypatch, caplog):
    step = PretrainingTrainer.training_step

    def overflowing(self, model, *args, **options):
        loss = step(self, model, *args, **options)
        if self.state.global_step == 1:
            next(model.parameters()).grad[0] = math.inf
        return loss

    monkeypatch.setattr(PretrainingTrainer, "training_step", overflowing)
    with caplog.at_level(logging.WARNING, "flashmhf"):
        assert start(short_run, tmp_path / "run").skipped_steps == 1
    assert "step 2 skipped: loss 5." in caplog.text
    assert "gradient norm inf" in caplog.text


def test_blocks_are_those_of_the_batch(short_run, tmp_path, spoil, monkeypatch):
    seen = []
    get = ShuffledBlocks.__getitem__

    def recording(self, index):
        item = get(self, index)
        seen.append(int(item["block"]))
        return item

    monkeypatch.setattr(ShuffledBlocks, "__getitem__", recording)
    spoil({1: math.nan, 2: math.nan})
    start(short_run, tmp_path / "run", "--gradient-accumulation-steps", "3")
    first, second = history(tmp_path / "run", "skipped")
    assert first["blocks"] + second["blocks"] == seen[:12]


def test_documents_are_those_of_the_blocks(short_run, corpus_folder, tmp_path, spoil, caplog):
    spoil({1: math.nan})
    with caplog.at_level(logging.WARNING, "flashmhf"):
        start(short_run, tmp_path / "run")
    (row,) = history(tmp_path / "run", "skipped")
    data = load_blocks(short_run.data, byte_tokenizer(), seed=42).train
    by_block = {int(item["block"]): item["input_ids"] for item in map(data.__getitem__, range(len(data)))}
    for block, description in zip(row["blocks"], row["documents"], strict=True):
        files = re.findall(rf"{corpus_folder}/(\d\d)\.txt", description)
        expected = "".join((corpus_folder / f"{name}.txt").read_text() + "\0" for name in files)
        text = byte_tokenizer().decode(by_block[block]).replace(byte_tokenizer().eos_token, "\0")
        assert text in expected
        assert f"of {corpus_folder} (" in description
    assert f"blocks {row['blocks'][0]}, {row['blocks'][1]}: documents {row['documents'][0]}; " in caplog.text


def test_the_blocks_with_the_worst_losses_come_first(short_run, tmp_path, monkeypatch):
    compute, seen = PretrainingTrainer.compute_loss, []

    def one_in_three(self, model, inputs, *args, **options):
        loss = compute(self, model, inputs, *args, **options)
        return loss * {2: math.nan, 3: 2.0}.get(len(seen), 1.0) if model.training else loss

    get = PretrainingTrainer.training_step

    def recording(self, model, inputs, *args, **options):
        seen.append(inputs["block"].tolist())
        return get(self, model, inputs, *args, **options)

    monkeypatch.setattr(PretrainingTrainer, "compute_loss", one_in_three)
    monkeypatch.setattr(PretrainingTrainer, "training_step", recording)
    start(short_run, tmp_path / "run", "--gradient-accumulation-steps", "3")
    (row,) = history(tmp_path / "run", "skipped")
    assert row["blocks"] == seen[1] + seen[2] + seen[0]


def test_a_message_names_a_bounded_number_of_blocks():
    def step(blocks, documents) -> FlaggedStep:
        return FlaggedStep(step=1, found={"spike": 9.0}, blocks=list(blocks), documents=documents)

    steps = [step(range(n, n + 40), [f"d{i}" for i in range(n, n + 16)]) for n in (0, 100)]
    numbers = ", ".join(map(str, range(16)))
    assert _described(steps) == f"{numbers} and 64 more: documents d0; d100; d1; d101 and 76 more"
    assert _described([step([5], [])]) == "5: documents not known of a stream"
    assert _described([step([], [])]) == "unknown"


def test_a_stream_has_blocks_without_documents(short_run, tmp_path, spoil, caplog):
    spoil({2: math.nan})
    with caplog.at_level(logging.WARNING, "flashmhf"):
        start(replace(short_run, data=replace(short_run.data, streaming=True)), tmp_path / "run")
    (row,) = history(tmp_path / "run", "skipped")
    assert (row["blocks"], row["documents"]) == ([2, 3], [])
    assert "; blocks 2, 3: documents not known of a stream" in caplog.text


def test_too_many_in_a_row_end_the_run_with_a_saved_state(short_run, tmp_path, spoil):
    spoil({1: math.nan, 3: math.nan, 4: math.nan})
    message = (
        r"max-non-finite-steps: expected a finite loss and gradient within 2 steps, got none in steps 3 to 4 "
        r"\(blocks \d+, \d+, \d+, \d+: documents .*\.txt.*\); checkpoint-4 holds the weights from before them"
    )
    with pytest.raises(RunError, match=message):
        start(short_run, tmp_path / "run", max_non_finite_steps=2)
    saved = tmp_path / "run/checkpoint-4"
    rows = [row for row in json.loads((saved / "trainer_state.json").read_text())["log_history"] if "skipped" in row]
    assert [row["step"] for row in rows] == [1, 3, 4]
    spoil({})
    again = start(
        short_run, tmp_path / "run", max_non_finite_steps=2, resume=True
    )  # continues with the data after them
    assert (again.steps, again.skipped_steps) == (6, 3)


def test_a_spike_is_named_and_learnt_from(short_run, tmp_path, spoil, caplog, monkeypatch):
    monkeypatch.setattr("flashmhf.training.non_finite_steps.MIN_LOSSES", 3)
    sums = spoil({5: 50.0})
    with caplog.at_level(logging.WARNING, "flashmhf"):
        start(short_run, tmp_path / "run", "--learning-rate", "1e-9")
    (row,) = history(tmp_path / "run", "spike")
    assert row["step"] == 5
    assert row["spike"] > 200
    assert f"loss spike at step 5: {row['spike']:.4g}, expected below" in caplog.text
    assert f"blocks {row['blocks'][0]}, {row['blocks'][1]}" in caplog.text
    assert len(set(sums)) == 6


def test_the_window_of_losses():
    window = LossWindow()
    losses = [5 + 0.1 * math.sin(step) for step in range(200)]
    assert [window.limit_passed(loss) for loss in losses] == [None] * 200
    limit = window.limit_passed(6.0)
    assert limit == pytest.approx(5 + 6 * 0.1 / math.sqrt(2), abs=0.05)
    constant = LossWindow()
    assert [constant.limit_passed(3.0) for _ in range(50)] == [None] * 50
    assert constant.limit_passed(3.01) is None
    assert LossWindow().limit_passed(1e9) is None


def test_numbered_streams():
    stream = torch.utils.data.DataLoader([{"input_ids": 5}, {"input_ids": 6}], batch_size=None)
    rows = list(numbered(iter_only(stream)))
    assert [row["block"] for row in rows] == [0, 1]


def iter_only(rows):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(rows)

    return Stream()


def test_a_limit_below_one_is_refused(short_run, tmp_path):
    with pytest.raises(InputError, match="max-non-finite-steps: expected 1 or more, got 0"):
        start(short_run, tmp_path / "run", max_non_finite_steps=0)
    assert not (tmp_path / "run").exists()
