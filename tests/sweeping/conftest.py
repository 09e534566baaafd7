"""Sweeps of a tiny model on little text, with training runs that are made up."""

from types import SimpleNamespace

import pytest

from flashmhf.data.config import DataConfig
from flashmhf.training.config import TrainConfig
from made_up_sweeps import finish, made_up_loss, sweep_settings


@pytest.fixture
def settings(corpus_folder, model_file):
    data = DataConfig(source=str(corpus_folder), context_length=64, validation_tokens=512)
    defaults = {"models": (str(model_file),), "train": TrainConfig(model="", data=data)}
    return lambda **changes: sweep_settings(**(defaults | changes))


@pytest.fixture
def training(monkeypatch) -> SimpleNamespace:
    """In place of processes, a loss that can be changed, or None of a run that fails; notes what was trained."""
    fake = SimpleNamespace(loss=made_up_loss, trained=[])

    def train_runs(runs, jobs, environment, progress, watch) -> None:
        for run in runs:
            if not run.finished:
                fake.trained.append(run.folder.name)
                loss = fake.loss(run)
                if loss is not None:
                    finish(run, loss)

    monkeypatch.setattr("flashmhf.sweeping.run.train_runs", train_runs)
    return fake
