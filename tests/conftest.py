"""Settings for every test: no network, no GPU needed, uninitialised memory full of NaN."""

import json
import logging
import os
import signal

# Before anything imports triton: kernels run on the CPU, through Triton's interpreter. Offline compilation, which needs
# the real compiler, runs in separate processes.
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import pytest
import torch

# The same examples in every run: a failure belongs to the change under test. --hypothesis-profile=explore draws others.
hypothesis.settings.register_profile("reproducible", derandomize=True)
hypothesis.settings.register_profile("explore")
hypothesis.settings.load_profile("reproducible")


def pytest_configure() -> None:
    """A shell starts background jobs with SIGINT ignored, and processes under test would inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def reproducible():
    """One thread (tests run in parallel processes) and a fixed seed."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def fresh_calls():
    """Forgets what earlier calls found, since tests change backends and tables."""
    from flashmhf.ops import call_cache

    call_cache.clear()


@pytest.fixture(autouse=True)
def logger_levels():
    """Restored: the commands set them for their process."""
    loggers = [logging.getLogger(name) for name in ("flashmhf", "flashmhf.ops.backends")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture
def poisoned_memory():
    """Fills whatever torch.empty and its kin return with NaN."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory):
    """Thirty small documents with enough structure that a model learns something from them in a few steps."""
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(30):
        (folder / f"{i:02d}.txt").write_text(
            f"Document {i}. " + "the quick brown fox jumps over the lazy dog. " * (20 + i)
        )
    return folder


@pytest.fixture(scope="session")
def make_model():
    """`tiny.tiny_model`, for evaluation."""
    from tiny import tiny_model

    return lambda **changes: tiny_model(**changes).eval()


@pytest.fixture(scope="session")
def model_file(tmp_path_factory):
    """The tiny model's configuration, to train in seconds."""
    from tiny import SIZES

    file = tmp_path_factory.mktemp("configs") / "small.json"
    values = {"num_subnetworks": 3, "max_position_embeddings": 128, "tie_word_embeddings": True, "init": "scaled"}
    file.write_text(json.dumps(SIZES | values))
    return file
