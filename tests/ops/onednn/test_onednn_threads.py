"""The number of threads changes roundings only, the same number gives the same bits, and callers do not interfere."""

import os
import threading

import pytest
import torch
from problems import Shape, make_inputs

from flashmhf.ops.gated_mhf import gated_mhf

SHAPE = Shape((211,), 4, 2, 3, 91, 8)


def results(inputs: list) -> list[torch.Tensor]:
    """Of the operator with norm and gate."""
    q, k, u, v, _, dout = inputs
    generator = torch.Generator().manual_seed(0)
    H, D, E = q.shape[-2], q.shape[-1], k.shape[1]
    weights = [torch.randn(size, generator=generator) for size in ((H, D, E), (H, D))]
    leaves = [x.detach().requires_grad_() for x in (q, k, u, v, *weights)]
    out = gated_mhf(*leaves, backend="onednn")
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def assert_equal(got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    for mine, other in zip(got, want, strict=True):
        assert torch.equal(mine, other)


def test_the_number_of_threads_changes_roundings_only(dtype, cut):
    inputs = make_inputs(SHAPE, dtype)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    expected = None
    for threads in (1, 2, 3, 5, 2):  # changed between calls of the same metadata
        cut(threads, 128, SHAPE.D, dtype)
        got = results(inputs)
        for _ in range(3):
            assert_equal(results(inputs), got)
        expected = expected or got
        torch.testing.assert_close(got, expected, **tolerance)


def test_eight_threads_at_once(dtype, cut):
    """Forward and backward on different sizes, with the bits of calls one after another."""
    cut(3, 128, SHAPE.D, dtype)
    problems = [make_inputs(Shape((20 + 37 * i,), 2, 1 + i % 2, 3, 40 + 11 * i, 8), dtype) for i in range(8)]
    expected = [results(inputs) for inputs in problems]
    start, wrong = threading.Barrier(len(problems)), []

    def work(i: int) -> None:
        torch.set_num_threads(3)  # of this thread
        start.wait(60)
        try:
            for _ in range(4):
                assert_equal(results(problems[i]), expected[i])
        except Exception as error:  # exceptions in a thread are not propagated
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(len(problems))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="sets the CPUs of a thread, as on Linux")
def test_one_core(dtype, cut):
    cut(3, 128, SHAPE.D, dtype)
    inputs = make_inputs(SHAPE, dtype)
    expected, before = results(inputs), os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert_equal(results(inputs), expected)
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads, as on Linux")
def test_no_threads_are_left_behind(cut):
    cut(2, 128, SHAPE.D)
    inputs = make_inputs(SHAPE, torch.float32)
    results(inputs)
    before = threading.active_count(), len(os.listdir("/proc/self/task"))
    for _ in range(50):
        results(inputs)
    assert threading.active_count() <= before[0]
    assert len(os.listdir("/proc/self/task")) <= before[1]
