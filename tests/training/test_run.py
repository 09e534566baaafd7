"""Training runs: what they leave, resuming, and refusals."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flashmhf.data.config import DataConfig
from flashmhf.data.tokenizer import is_byte_tokenizer, load_tokenizer
from flashmhf.errors import InputError
from flashmhf.models.loading import load_model
from flashmhf.training.arguments import parse_arguments
from flashmhf.training.config import TrainConfig
from flashmhf.training.run import train
from flashmhf.training.run_files import TrainResult
from flashmhf.training.run_log import read_log
from flashmhf.training.throughput import Clock
from flashmhf.training.trainer import PretrainingTrainer

FLAGS = ["--per-device-train-batch-size", "4", "--learning-rate", "1e-2", "--logging-steps", "1", "--report-to", "none"]
FLAGS += ["--disable-tqdm", "true"]


def start(run: TrainConfig, folder: Path, *flags: str, resume: bool = False) -> TrainResult:
    return train(run, parse_arguments([*FLAGS, *flags], str(folder)), resume=resume)


def losses(folder: Path) -> dict[int, float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return {row["step"]: row["loss"] for row in history if "loss" in row}


def test_a_run_learns_and_leaves_a_complete_model(run, tmp_path):
    result = start(run, tmp_path / "run", "--max-steps", "30", "--eval-steps", "10", "--save-steps", "10")
    assert result.steps == 30
    assert result.tokens == 30 * 4 * 32
    assert result.interrupted_by is None
    curve = losses(tmp_path / "run")
    assert curve[30] < curve[1] - 1
    assert result.bits_per_byte == pytest.approx(result.validation_loss / 0.6931, rel=0.01)
    assert result.tokens_per_second > 0
    assert result.peak_memory_mib > 10
    assert load_model(str(tmp_path / "run")).config.vocab_size == 320
    assert is_byte_tokenizer(load_tokenizer(str(tmp_path / "run")))
    assert sorted(p.name for p in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-20", "checkpoint-30"]


def test_resuming_gives_the_uninterrupted_run(run, tmp_path):
    flags = ("--save-steps", "6", "--eval-strategy", "no", "--max-steps", "12")
    start(run, tmp_path / "uninterrupted", *flags)
    start(run, tmp_path / "cut", *flags)
    shutil.rmtree(tmp_path / "cut/checkpoint-12")
    (tmp_path / "cut/model.safetensors").unlink()
    start(run, tmp_path / "cut", *flags, resume=True)
    assert losses(tmp_path / "cut") == losses(tmp_path / "uninterrupted")
    first, second = (load_model(str(tmp_path / name)).state_dict() for name in ("uninterrupted", "cut"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_resumed_run_counts_its_own_tokens(run, tmp_path, monkeypatch):
    """The speed of the first line after a resume does not count the tokens before it."""
    monkeypatch.setattr(Clock, "lap", lambda clock: (1.0, 0.0))
    flags = ("--save-steps", "3", "--max-steps", "6", "--eval-strategy", "no")
    start(run, tmp_path / "run", *flags)
    shutil.rmtree(tmp_path / "run/checkpoint-6")
    start(run, tmp_path / "run", *flags, resume=True)
    assert {row["tokens_per_second"] for row in read_log(tmp_path / "run").rows if "loss" in row} == {4 * 32}


SPEED = ("tokens_per_second", "tflops_per_second", "data_wait_share", "memory_mib")


def test_every_log_line_has_throughput_memory_and_waiting(run, tmp_path):
    flags = ("--save-steps", "3", "--max-steps", "6", "--report-to", "tensorboard")
    start(run, tmp_path / "run", *flags)
    shutil.rmtree(tmp_path / "run/checkpoint-6")
    (tmp_path / "run/model.safetensors").unlink()
    start(run, tmp_path / "run", *flags, resume=True)
    log = read_log(tmp_path / "run")
    assert [(entry.step, entry.processes) for entry in log.starts] == [(0, 1), (3, 1)]
    rows = [row for row in log.rows if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for row in rows:
        assert all(row[name] > 0 for name in SPEED), row
        assert row["data_wait_share"] < 1
    events = EventAccumulator(str(max((tmp_path / "run/runs").iterdir())))
    events.Reload()
    assert {f"train/{name}" for name in SPEED} <= set(events.Tags()["scalars"])


def test_a_finished_run_is_evaluated_again_and_nothing_else(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ("--max-steps", "3", "--save-steps", "3", "--report-to", "tensorboard")
    first = start(run, Path("run"), *flags)
    curves = sorted(Path("run/runs").rglob("events.*"))
    again = start(run, Path("run"), *flags, resume=True)
    assert (again.steps, again.validation_loss) == (3, first.validation_loss)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert sorted(Path("run/runs").rglob("events.*")) == curves != []


def test_a_full_disk_keeps_the_last_good_checkpoint(run, tmp_path, monkeypatch):
    flags = ("--max-steps", "6", "--save-steps", "2", "--eval-strategy", "no")
    save, written = torch.save, []

    def save_until_full(content, file, *args, **options):
        written.append(file)
        if "checkpoint-4" in str(file):
            Path(file).write_bytes(b"truncated")
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos")
        save(content, file, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save_until_full)
        with pytest.raises(RuntimeError, match="unexpected pos"):  # there is room: not explained away
            start(run, tmp_path / "other", *flags)
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        with pytest.raises(OSError, match=r"output-dir: the disk .* is full; --resume continues from checkpoint-2$"):
            start(run, tmp_path / "run", *flags)
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    assert start(run, tmp_path / "run", *flags, resume=True).steps == 6


def test_training_starts_from_a_trained_model(run, tmp_path):
    start(run, tmp_path / "first", "--max-steps", "20", "--eval-strategy", "no")
    again = TrainConfig(
        model=str(tmp_path / "first"),
        data=DataConfig(source=run.data.source, context_length=32, validation_tokens=2048),
    )
    start(again, tmp_path / "second", "--max-steps", "2", "--eval-strategy", "no")
    assert losses(tmp_path / "second")[1] < losses(tmp_path / "first")[1] - 1


def test_a_stream_is_trained_on(tmp_path, model_file):
    rows = [json.dumps({"text": f"row {i} " + "again and again " * 10}) for i in range(400)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    run = TrainConfig(
        model=str(model_file),
        data=DataConfig(source=str(tmp_path / "rows.jsonl"), context_length=32, streaming=True, validation_tokens=2048),
    )
    result = start(run, tmp_path / "run", "--max-steps", "5", "--eval-strategy", "no")
    assert result.steps == 5
    assert result.validation_loss > 0


def test_activation_checkpointing_gives_the_same_losses(run, tmp_path):
    start(run, tmp_path / "plain", "--max-steps", "3", "--eval-strategy", "no")
    start(run, tmp_path / "recomputed", "--max-steps", "3", "--eval-strategy", "no", "--gradient-checkpointing", "true")
    assert losses(tmp_path / "recomputed") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)


def test_output_folders_that_hold_something_else_are_refused(run, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").write_text("mine")
    with pytest.raises(
        InputError, match=r"output-dir: expected a new or empty folder, or --resume, got .* with thesis.tex"
    ):
        start(run, tmp_path / "full")
    with pytest.raises(InputError, match=r"resume: expected a run's folder with run.json"):
        start(run, tmp_path / "full", resume=True)
    with pytest.raises(InputError, match="output-dir: expected a folder, got the file"):
        start(run, tmp_path / "full/thesis.tex")
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["thesis.tex"]


def test_a_run_that_ended_before_its_first_step_leaves_no_folder_that_is_refused(run, tmp_path, monkeypatch):
    """With --resume or without it, with other settings too: there is nothing to lose."""
    other = replace(run, data=replace(run.data, context_length=64))
    for name, resume in (("new", False), ("resumed", True)):
        with monkeypatch.context() as patch:
            patch.setattr(PretrainingTrainer, "training_step", lambda *args, **options: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                start(run, tmp_path / name, "--max-steps", "2", "--report-to", "tensorboard", "--eval-on-start", "true")
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == ["log.jsonl", "run.json", "runs"]
        assert start(other, tmp_path / name, "--max-steps", "2", resume=resume).steps == 2
    with pytest.raises(InputError, match="output-dir: expected a new or empty folder"):
        start(run, tmp_path / "new", "--max-steps", "2")


def test_resuming_another_run_is_refused(run, tmp_path):
    start(run, tmp_path / "run", "--max-steps", "1", "--eval-strategy", "no")
    other = TrainConfig(
        model=run.model, data=DataConfig(source=run.data.source, context_length=64, validation_tokens=2048)
    )
    with pytest.raises(InputError, match="resume: expected the context_length of the earlier run, 32, got 64"):
        start(other, tmp_path / "run", resume=True)


def test_models_and_tokenizers_that_do_not_fit_are_refused(run, tmp_path):
    def refused(message: str, **changes) -> None:
        model = changes.pop("model", run.model)
        changed = replace(run, model=model, data=replace(run.data, **changes))
        with pytest.raises(InputError, match=message):
            start(changed, tmp_path / "never")
        assert not (tmp_path / "never").exists()

    refused(
        "model: expected a preset, a JSON file or a folder, got 'flashmhf-2t'; did you mean flashmhf-",
        model="flashmhf-2t",
    )
    refused("context-length: expected 2 to the model's 128, got 129", context_length=129)
    refused("tokenizer: expected bytes, a tokenizer's folder or a Hub id, got 'no/such'", tokenizer="no/such")
    (tmp_path / "bad.json").write_text('{"hidden_size": 33, "num_attention_heads": 3, "num_ffn_heads": 2}')
    refused(
        "model: .*bad.json: hidden_size: expected a multiple of num_ffn_heads 2, got 33",
        model=str(tmp_path / "bad.json"),
    )
    (tmp_path / "bad.json").write_text("not JSON")
    refused("expected a JSON object in .*bad.json", model=str(tmp_path / "bad.json"))


def test_another_tokenizer_for_a_trained_model_is_refused(run, tmp_path, corpus_folder):
    from flashmhf.data.tokenizer import train_bpe

    start(run, tmp_path / "first", "--max-steps", "1", "--eval-strategy", "no")
    train_bpe(["the quick brown fox"] * 9, 262).save_pretrained(tmp_path / "bpe")
    other = TrainConfig(
        model=str(tmp_path / "first"),
        data=DataConfig(source=run.data.source, tokenizer=str(tmp_path / "bpe"), context_length=32),
    )
    with pytest.raises(InputError, match=r"tokenizer: expected the one in .*first \(258 tokens\)"):
        start(other, tmp_path / "second")
