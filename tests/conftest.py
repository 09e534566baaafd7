"""Settings for every test: no network, no GPU needed, uninitialised memory full of NaN."""

import json
import os

# Before anything imports triton: kernels run on the CPU, through Triton's interpreter. Offline compilation, which wants
# the real compiler, runs in processes of its own.
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch


@pytest.fixture(autouse=True)
def reproducible():
    """One thread (tests run in parallel processes) and a fixed seed."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def fresh_calls():
    """Backends and tables that a test changes are asked again, and not what another test found out."""
    from flashmhf.ops import call_cache

    call_cache.clear()


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
    """Makes a small model with random weights, the same every time; changes are of its configuration."""
    from flashmhf.models import FlashMHFConfig, FlashMHFForCausalLM

    def make(**changes):
        values = {
            "vocab_size": 320,
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 48,
            "init": "scaled",
        }
        torch.manual_seed(0)
        return FlashMHFForCausalLM(FlashMHFConfig(**(values | changes))).eval()

    return make


@pytest.fixture(scope="session")
def model_file(tmp_path_factory):
    """A configuration small enough to train in seconds."""
    file = tmp_path_factory.mktemp("configs") / "small.json"
    values = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "num_subnetworks": 3,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "init": "scaled",
    }
    file.write_text(json.dumps(values))
    return file
