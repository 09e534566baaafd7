"""The promise that flashmhf train takes every flag of transformers.TrainingArguments, flag by flag."""

import dataclasses
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flag_cases import Outcome, Refused, Runs
from flags_of_learning import LEARNING
from flags_of_running import RUNNING
from safetensors.torch import load_file
from transformers import TrainingArguments
from transformers.utils import logging as transformers_logging

import flashmhf.training.run as training_run
from flashmhf.data.config import DataConfig
from flashmhf.errors import InputError, RunError
from flashmhf.training.arguments import parse_arguments
from flashmhf.training.config import TrainConfig
from flashmhf.training.run_log import read_log
from flashmhf.training.trainer import PretrainingTrainer

FLAGS = "--max-steps 3 --per-device-train-batch-size 4 --learning-rate 0.01 --logging-steps 1 --eval-strategy no"
FLAGS += " --disable-tqdm true --report-to none"
FIELDS = {field.name for field in dataclasses.fields(TrainingArguments)}
CASES = [case for name, cases in (LEARNING | RUNNING).items() if name in FIELDS for case in cases]


@pytest.fixture(scope="module")
def config(corpus_folder, model_file) -> TrainConfig:
    data = DataConfig(source=str(corpus_folder), context_length=32, validation_tokens=1024)
    return TrainConfig(model=str(model_file), data=data)


def train(config: TrainConfig, folder: Path, flags: str, *, resume: bool = False) -> Outcome:
    make, trainers = training_run._trainer, []

    def made(*args):
        trainers.append(make(*args))
        return trainers[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_run, "_trainer", made)
        arguments = parse_arguments(shlex.split(f"{FLAGS} {flags}"), str(folder))
        result = training_run.train(config, arguments, resume=resume)
    return Outcome(
        result=result,
        trainer=trainers[0],
        folder=folder,
        rows=read_log(folder).rows,
        weights=load_file(folder / "model.safetensors"),
    )


@pytest.fixture(scope="module")
def base(config, tmp_path_factory) -> Outcome:
    return train(config, tmp_path_factory.mktemp("base") / "run", "")


@pytest.fixture(autouse=True)
def global_settings():
    """Puts back what some flags set for the whole process."""
    verbosity = transformers_logging.get_verbosity()
    yield
    transformers_logging.set_verbosity(verbosity)
    torch.use_deterministic_algorithms(False)


def test_every_field_is_in_the_table():
    assert (LEARNING | RUNNING).keys() >= FIELDS


@pytest.mark.parametrize("case", [each for each in CASES if isinstance(each, Refused)], ids=lambda case: case.flags)
def test_a_value_that_cannot_be_honoured_is_refused_in_one_line(case, tmp_path):
    with pytest.raises(InputError) as caught:
        parse_arguments(shlex.split(f"{FLAGS} {case.flags}"), str(tmp_path / "run"))
    assert case.text in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("case", [each for each in CASES if isinstance(each, Runs)], ids=lambda case: case.flags)
def test_a_value_has_its_effect(case, config, base, tmp_path):
    outcome = replace(train(config, tmp_path / "run", case.flags), base=base)
    assert case.effect(outcome)


@pytest.mark.slow
def test_flags_of_resuming(config, tmp_path):
    flags = "--lr-scheduler-type constant --save-steps 2"
    whole = train(config, tmp_path / "whole", flags)
    for name, equal in (("restore-callback-states-from-checkpoint", True), ("ignore-data-skip", False)):
        folder = tmp_path / name
        train(config, folder, f"{flags} --max-steps 2")
        resumed = replace(train(config, folder, f"{flags} --{name} true", resume=True), base=whole)
        assert resumed.result.steps == 3
        assert resumed.same_weights() == equal


@pytest.mark.slow
def test_a_batch_that_does_not_fit_is_made_smaller(config, tmp_path, monkeypatch):
    """The run starts again within its first step, and that step's batch is not counted twice."""
    step = PretrainingTrainer.training_step

    def small_memory(trainer, model, inputs, *args, **options):
        if len(inputs["input_ids"]) > 2 and trainer.state.global_step >= first:
            trainer.guard.add(torch.tensor(float("nan")), None)
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return step(trainer, model, inputs, *args, **options)

    monkeypatch.setattr(PretrainingTrainer, "training_step", small_memory)
    first = 0
    run = train(config, tmp_path / "run", "--auto-find-batch-size true")
    assert (run.result.steps, run.result.skipped_steps) == (3, 0)
    assert run.result.tokens in (3 * 2 * 32, 3 * 32)
    first = 2  # it would train the same weights from the first step on again
    with pytest.raises(RunError, match=r"auto-find-batch-size: .* got no memory after step 2"):
        train(config, tmp_path / "late", "--auto-find-batch-size true")
