"""The model of memory against the allocator, and what does not fit."""

import re

import pytest
from parallel_cases import training_peak_mib

from flashmhf.errors import InputError
from flashmhf.estimates.memory import layout_memory, plan
from flashmhf.models import FlashMHFConfig
from ranks import run_ranks

SEQUENCES, LENGTH = 4, 256
CONFIGS = {
    "flashmhf": {},
    "swiglu": {"ffn_type": "swiglu"},
    "parameters first": {"hidden_size": 512, "intermediate_size": 3072},
}


def config(**options) -> FlashMHFConfig:
    return FlashMHFConfig.from_preset("flashmhf-tiny", num_hidden_layers=2, vocab_size=2048, **options)


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS.keys())
def test_the_peak_of_one_process(options):
    planned = layout_memory(config(**options), "ddp", 1, SEQUENCES, LENGTH, False)["peak"]
    assert training_peak_mib(config(**options), None, SEQUENCES, LENGTH) == pytest.approx(planned, rel=0.15)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("layout", ["ddp", "fsdp", "tp"])
@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS.keys())
def test_the_peak_of_two_processes(tmp_path, layout, options):
    planned = layout_memory(config(**options), layout, 2, SEQUENCES, LENGTH, False)["peak"]
    measured = run_ranks(training_peak_mib, 2, tmp_path, config(**options), layout, SEQUENCES, LENGTH)
    print(f"{layout}: {planned:.1f} MiB planned, {measured:.1f} MiB measured")
    assert measured == pytest.approx(planned, rel=0.15)


def test_time_is_flops_over_throughput():
    planned = plan(config(), 8, tokens=10**9, sequences=1, gpu="h100", utilisation=0.5)
    assert planned["hours"] == pytest.approx(planned["gpu_hours"] / 8)
    twice = plan(config(), 8, tokens=2 * 10**9, sequences=1, gpu="h100", utilisation=0.25)
    assert twice["hours"] == pytest.approx(4 * planned["hours"])


def test_a_layout_that_cannot_be_says_why():
    reason = layout_memory(config(), "tp", 3, 1, 64, False)
    assert re.fullmatch(r"num_attention_heads: expected a multiple of the number of GPUs 3, got 4", str(reason))
    with pytest.raises(InputError, match="utilisation: expected more than 0, at most 1, got 2"):
        plan(config(), 1, tokens=1, sequences=1, utilisation=2)
    with pytest.raises(InputError, match=r"gpu: expected one of .*, got 'tpu'"):
        plan(config(), 1, tokens=1, sequences=1, gpu="tpu")


def test_tied_embeddings():
    tied, untied = (config(tie_word_embeddings=tie) for tie in (True, False))
    ours = [layout_memory(c, "tp", 2, 1, 64, True)["parameters"] for c in (tied, untied)]
    assert ours[0] == pytest.approx(ours[1], rel=0.01)  # whole once, or two halves
