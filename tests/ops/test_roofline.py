"""The roofline model against counts by hand."""

import pytest
import torch

from flashmhf.ops.problem import Problem
from flashmhf.ops.roofline import (
    GPUS,
    Gpu,
    Work,
    backward_dkuv_work,
    backward_dq_work,
    backward_work,
    forward_work,
)


def problem(**changes) -> Problem:
    values = {"T": 100, "H": 4, "H_kv": 2, "E": 3, "F": 40, "D": 16, "dtype": torch.bfloat16}
    return Problem(**{**values, "device": torch.device("cpu"), "has_gate": True, **changes})


Q, GATE, WEIGHT = 100 * 4 * 16 * 2, 100 * 4 * 3 * 4, 2 * 3 * 40 * 16 * 2  # bytes
PRODUCT = 2 * 100 * 4 * 16 * 120


def test_each_tensor_is_counted_once():
    assert forward_work(problem()) == Work(3 * PRODUCT, Q + GATE + 3 * WEIGHT, Q)
    assert backward_dq_work(problem()) == Work(5 * PRODUCT, 2 * Q + GATE + 3 * WEIGHT, Q + GATE)
    assert backward_dkuv_work(problem()) == Work(6 * PRODUCT, 2 * Q + GATE + 3 * WEIGHT, 3 * WEIGHT)
    assert backward_work(problem()).flops == 11 * PRODUCT
    assert forward_work(problem(has_gate=False)).read_bytes == Q + 3 * WEIGHT
    assert forward_work(problem(dtype=torch.float32)).written_bytes == 2 * Q


def test_minimum_time_is_the_longer_of_computing_and_moving():
    gpu = Gpu(tflops_16bit=100, tflops_32bit=10, bandwidth_tb_s=2)
    computing, moving = Work(10**12, 10**6, 10**6), Work(10**6, 10**9, 10**9)
    assert computing.min_ms(gpu, torch.float16) == pytest.approx(10)
    assert computing.min_ms(gpu, torch.float32) == pytest.approx(100)
    assert moving.min_ms(gpu, torch.float16) == pytest.approx(1)
    assert (computing.bound(gpu, torch.float16), moving.bound(gpu, torch.float16)) == ("compute", "memory")


def test_decode_is_bound_by_reading_the_weights():
    """The 1.3B shape on an H200: one layer's weights at 4.8 TB/s."""
    decode = problem(T=1, H=16, H_kv=16, E=15, F=384, D=128)
    weights = 3 * 16 * 15 * 384 * 128 * 2
    assert forward_work(decode).bound(GPUS["h200"], torch.bfloat16) == "memory"
    assert forward_work(decode).min_ms(GPUS["h200"], torch.bfloat16) == pytest.approx(weights / 4.8e9, rel=0.01)
