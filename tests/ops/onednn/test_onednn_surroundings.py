"""Environment variables, forks, workers and interrupts, each in a process of its own that has to end in time."""

import os

import offline
import pytest

pytestmark = pytest.mark.usefixtures("onednn")
TIMEOUT = 300  # seconds, on a busy machine
PRELUDE = """
import json, os, signal, sys, threading, time
import torch
from flashmhf import FlashMHF
from flashmhf.ops import backends
from flashmhf.ops.gated_mhf import gated_mhf
from flashmhf.ops.onednn import library

DTYPES = [x for x in (torch.float32, torch.bfloat16) if library.unsupported_reason(x) is None]

def make(dtype=torch.float32, T=1100):  # so small that PyTorch's own operators use one thread
    sizes = ((T, 1, 16), (1, 3, 30, 16), (1, 3, 30, 16), (1, 3, 30, 16), (1, 16, 3), (1, 16), (T, 1, 16))
    *leaves, dout = (torch.randn(size, device="cpu").to(dtype) for size in sizes)
    return [x.requires_grad_() for x in leaves], dout

def results(inputs, backend="onednn"):
    leaves, dout = inputs
    out = gated_mhf(*leaves, backend=backend)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

def equal(got, want):
    return all(map(torch.equal, got, want))

def close(got, want):
    return all((x - y).norm() <= (1e-5 if x.dtype == torch.float32 else 3e-2) * y.norm() for x, y in zip(got, want))
"""


def run(script: str, **variables: str) -> list:
    return offline.run(PRELUDE + script, timeout=TIMEOUT, **variables)


@pytest.mark.parametrize("threads", ["1", "3"])
def test_omp_num_threads(threads):
    script = """
problems = [make(dtype) for dtype in DTYPES]
first = [results(x) for x in problems]
print(json.dumps(torch.get_num_threads()))
print(json.dumps([equal(results(x), y) for x, y in zip(problems, first)]))
print(json.dumps([close(x, results(y, "blockwise")) for x, y in zip(first, problems)]))
torch.set_num_threads(2)
print(json.dumps([close(results(x), y) for x, y in zip(problems, first)]))
"""
    number, *right = run(script, OMP_NUM_THREADS=threads)
    assert 1 <= number <= int(threads)
    assert all(map(all, right))


@pytest.mark.slow
def test_fewer_threads_than_asked_for():
    script = """
torch.set_num_threads(4)
inputs = make(T=2200)
print(json.dumps(close(results(inputs), results(inputs, "blockwise"))))
"""
    assert run(script, OMP_THREAD_LIMIT="2") == [True]


def test_the_default_device_has_no_influence():
    script = """
torch.set_num_threads(2)
inputs = make(DTYPES[-1])
expected = results(inputs)
torch.set_default_device("meta")
library._unsupported_reason.cache_clear()
print(json.dumps([equal(results(inputs), expected), backends.backends()["onednn"]]))
"""
    assert run(script) == [[True, None]]


@pytest.mark.parametrize("randomness", ["error", "same", "different"])
def test_the_first_use_within_vmap(randomness):
    script = f"""
layer, samples = FlashMHF(32, 2, 3, 16), torch.randn(4, 5, 32)
library._unsupported_reason.cache_clear()
got = torch.vmap(layer, randomness={randomness!r})(samples)
print(json.dumps([close([got], [layer(samples)]), backends.backends()["onednn"]]))
"""
    assert run(script) == [[True, None]]


def test_the_first_use_within_a_fake_mode():
    script = """
from torch._subclasses import FakeTensorMode
library._unsupported_reason.cache_clear()
with FakeTensorMode():
    print(json.dumps([library.unsupported_reason(dtype) for dtype in DTYPES]))
"""
    assert set(*run(script)) == {None}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_fork_after_use():
    """The child has none of GNU OpenMP's threads, and PyTorch's own parallel operators would wait for them forever."""
    script = """
torch.set_num_threads(2)
problems = [make(dtype) for dtype in DTYPES]
expected = [results(x) for x in problems]
child = os.fork()
if child == 0:
    os._exit(7 if all(close(results(x), y) for x, y in zip(problems, expected)) else 1)
ends = time.monotonic() + 60
while (status := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < ends:
    time.sleep(0.05)
if status == (0, 0):
    os.kill(child, signal.SIGKILL)
print(json.dumps([os.waitstatus_to_exitcode(status[1]), all(map(equal, map(results, problems), expected))]))
"""
    assert run(script) == [[7, True]]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_workers_that_call_the_layer():
    """Of multiprocessing, and of a DataLoader, both forked after use."""
    script = """
import multiprocessing
from torch.utils.data import DataLoader, Dataset

torch.set_num_threads(2)
layer = FlashMHF(32, 2, 2, 24, backend="onednn")
samples = torch.randn(6, 400, 32)
expected = torch.stack([layer(x).detach() for x in samples])

class Samples(Dataset):
    def __len__(self):
        return len(samples)

    def __getitem__(self, i):
        x = samples[i].clone().requires_grad_()
        out = layer(x)
        out.sum().backward()
        assert x.grad.isfinite().all()
        return out.detach()

loader = DataLoader(Samples(), batch_size=2, num_workers=2, multiprocessing_context="fork", timeout=100)
print(json.dumps(close(list(torch.cat(list(loader))), list(expected))))
with multiprocessing.get_context("fork").Pool(2, torch.set_num_threads, [1]) as pool:  # as a DataLoader does
    got = pool.map_async(Samples().__getitem__, range(6)).get(100)
print(json.dumps(close(got, list(expected))))
"""
    assert run(script) == [True, True]


@pytest.mark.parametrize("threads", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_an_interrupt_in_the_middle_of_a_call(threads):
    """It is raised after the call at the latest; the next call is right, and no thread is left behind."""
    script = f"""
torch.set_num_threads({threads})
inputs = make(T=20_000)
expected = results(inputs)
tasks = "/proc/self/task" if os.path.isdir("/proc/self/task") else "."
count = lambda: [threading.active_count(), len(os.listdir(tasks))]
before, interrupted = count(), 0
for i in range(10):
    timer = threading.Timer(0.02 + 0.003 * i, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        while True:
            results(inputs)
    except KeyboardInterrupt:
        interrupted += 1
    timer.join()
    assert equal(results(inputs), expected)
print(json.dumps([interrupted, all(x <= y for x, y in zip(count(), before))]))
"""
    assert run(script) == [[10, True]]


def test_instructions_that_onednn_must_not_use():
    script = """
inputs, (low, _) = make(), make(torch.bfloat16)
try:
    gated_mhf(*low, backend="onednn")
except ValueError as error:
    print(json.dumps(str(error)))
print(json.dumps(bool(gated_mhf(*low).isfinite().all())))
print(json.dumps(close(results(inputs), results(inputs, "blockwise"))))
"""
    reason, *right = run(script, ONEDNN_MAX_CPU_ISA="AVX2")
    assert reason.startswith("backend: 'onednn' cannot run here: ")
    if "AVX-512 BF16 or AMX" not in reason:
        assert "ONEDNN_MAX_CPU_ISA forbids instructions" in reason
    assert right == [True, True]


def test_without_numbas_compiler():
    script = """
inputs = make()
try:
    results(inputs)
except ValueError as error:
    print(json.dumps([str(error), equal(results(inputs, "auto"), results(inputs, "blockwise"))]))
"""
    reason = "backend: 'onednn' cannot run here: Numba's compiler is disabled (NUMBA_DISABLE_JIT)"
    assert run(script, NUMBA_DISABLE_JIT="1") == [[reason, True]]
