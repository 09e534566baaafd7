"""Memory estimates against the allocator's peak, and what cannot be trained."""

import re

import pytest
from parallel_cases import training_peak_mib

from flashmhf.errors import InputError
from flashmhf.estimates.memory import TrainingSetup, estimate_memory, estimate_training
from flashmhf.models import FlashMHFConfig
from ranks import run_ranks

SEQUENCES, LENGTH = 4, 256
CONFIGS = {
    "flashmhf": {},
    "swiglu": {"ffn_type": "swiglu", "q_norm": False},
    "parameters first": {"hidden_size": 512, "intermediate_size": 3072},
}


def config(**options) -> FlashMHFConfig:
    return FlashMHFConfig.from_preset("flashmhf-tiny", num_hidden_layers=2, vocab_size=2048, **options)


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS.keys())
def test_the_estimated_peak_is_the_allocators_in_one_process(options):
    estimated = estimate_memory(config(**options), "ddp", 1, SEQUENCES, LENGTH, False).peak
    assert training_peak_mib(config(**options), None, SEQUENCES, LENGTH) == pytest.approx(estimated, rel=0.15)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("parallelism", ["ddp", "fsdp", "tp"])
@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS.keys())
def test_the_estimated_peak_is_the_allocators_in_two_processes(tmp_path, parallelism, options):
    estimated = estimate_memory(config(**options), parallelism, 2, SEQUENCES, LENGTH, False).peak
    measured = run_ranks(training_peak_mib, 2, tmp_path, config(**options), parallelism, SEQUENCES, LENGTH)
    print(f"{parallelism}: {estimated:.1f} MiB estimated, {measured:.1f} MiB measured")
    assert measured == pytest.approx(estimated, rel=0.15)


def setup(**changes) -> TrainingSetup:
    values = {"gpus": 1, "gpu": "h100", "tokens": 1, "sequences": 1, "context_length": 64}
    return TrainingSetup(**(values | {"bf16": True, "utilisation": 0.5} | changes))


def test_hours_are_flops_over_throughput():
    estimate = estimate_training(config(), setup(gpus=8, tokens=10**9))
    assert estimate.hours == pytest.approx(estimate.gpu_hours / 8)
    twice = estimate_training(config(), setup(gpus=8, tokens=2 * 10**9, utilisation=0.25))
    assert twice.hours == pytest.approx(4 * estimate.hours)


def test_an_impossible_parallelism_has_its_reason_in_place_of_memory():
    reason = estimate_training(config(), setup(gpus=3)).memory["tp"]
    assert re.fullmatch(r"num_attention_heads: expected a multiple of the number of GPUs 3, got 4", str(reason))


def test_values_out_of_range_are_named():
    with pytest.raises(InputError, match="utilisation: expected more than 0, at most 1, got 2"):
        estimate_training(config(), setup(utilisation=2))
    with pytest.raises(InputError, match=r"gpu: expected one of .*, got 'tpu'"):
        estimate_training(config(), setup(gpu="tpu"))


def test_tied_embeddings_are_replicated_and_untied_ones_are_sharded():
    tied, untied = (config(tie_word_embeddings=tie) for tie in (True, False))
    ours = [estimate_memory(c, "tp", 2, 1, 64, True).parameters for c in (tied, untied)]
    assert ours[0] == pytest.approx(ours[1], rel=0.01)  # one complete copy, or two halves
