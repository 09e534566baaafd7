"""Runs that the tests of training start."""

import pytest

from flashmhf.data.config import DataConfig
from flashmhf.training.config import TrainConfig


@pytest.fixture(scope="session")
def run(corpus_folder, model_file) -> TrainConfig:
    """A tiny model on small documents."""
    data = DataConfig(source=str(corpus_folder), context_length=32, validation_tokens=2048)
    return TrainConfig(model=str(model_file), data=data)


@pytest.fixture(scope="session")
def short_run(corpus_folder, model_file) -> TrainConfig:
    """The same with shorter blocks and few of them for validation: a step takes milliseconds."""
    data = DataConfig(source=str(corpus_folder), context_length=16, validation_tokens=64)
    return TrainConfig(model=str(model_file), data=data)
