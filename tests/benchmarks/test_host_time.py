"""Repeated launches bypass Triton's Python: the launcher in C must get the same arguments as through it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

LAUNCHES = """
import sys, torch
from triton.runtime import driver
import host_time
from flashmhf.ops import call_cache
from flashmhf.ops.gated_mhf import gated_mhf

recorded = []

class Launcher:  # in place of the one in C
    def __init__(self, source, metadata):
        self.source = source
    def __call__(self, x, y, z, stream, function, packed, launch_metadata, enter, leave, *arguments):
        made_for = self.source.name, str(self.source.signature), str(self.source.attrs)
        recorded.append((made_for, (x, y, z), stream, packed, arguments))

host_time._Driver.launcher_cls = Launcher

def normal(argument, names):
    base = getattr(argument, "base", argument)
    if not isinstance(base, torch.Tensor):
        return argument
    name = names.get(base.data_ptr(), "new"), base.dtype
    if base is argument:
        return name
    assert base.data_ptr() % 16 == 0
    return name, list(argument.shape), list(argument.strides), argument.block_shape, str(argument.layout)

def launches(make):
    torch.manual_seed(0)
    inputs = make()
    names = {x.data_ptr(): name for x, name in zip(inputs, ("q", "k", "u", "v", "gate_weight", "norm_weight"))}
    recorded.clear()
    leaves = [x.requires_grad_() for x in inputs]
    gated_mhf(*leaves, backend=backend).sum().backward()
    return [(*rest, [normal(x, names) for x in arguments]) for *rest, arguments in recorded]

def new(*shape):
    return torch.randn(shape, dtype=torch.bfloat16)

def inputs(T=200, F=48, H=2):
    return [new(T, H, 64), *(new(1, 2, F, 64) for _ in range(3)), new(H, 64, 2), new(H, 64)]

def shifted(index):
    def make():
        given = inputs()
        x = given[index]
        given[index] = new(x.numel() + 1)[1:].view(x.shape)
        return given
    return make

VARIANTS = {
    "plain": inputs,
    "other tokens": lambda: inputs(T=201),
    "rows not a multiple of 16": lambda: inputs(F=50),
    "q not aligned": shifted(0),
    "k not aligned": shifted(1),
    "gate_weight not aligned": shifted(4),
    "q in the middle": lambda: [new(200, 3, 64)[:, 1:], *inputs()[1:]],
    "decode": lambda: inputs(T=1),
    "one head": lambda: inputs(H=1),
    "float16": lambda: [x.half() for x in inputs()],
}
backend = sys.argv[1]
with host_time.fake_gpu(few_tokens=True):
    for make in VARIANTS.values():
        launches(make)
    again = {name: launches(make) for name, make in VARIANTS.items()}
    for name, make in VARIANTS.items():
        call_cache.clear()
        assert again[name] == launches(make), name
        assert len(again[name]) >= 4, name
    steps = [step for call in call_cache._cache.values() for step in call.program.steps]
    launches = [step.__self__ for step in steps if hasattr(step, "__self__")]
    assert launches
    assert all("runner" in str(launch.start) for launch in launches)
    assert len({str(found) for found in again.values()}) == len(VARIANTS)
"""


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["triton", "hopper"])
def test_repeated_launches_pass_the_arguments_that_triton_passes(backend, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = f"{BENCHMARKS}{os.pathsep}{BENCHMARKS.parent / 'src'}"
    done = subprocess.run([sys.executable, "-c", LAUNCHES, backend], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_benchmark_of_host_time_runs_and_writes_csv(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = f"{BENCHMARKS}{os.pathsep}{BENCHMARKS.parent / 'src'}"
    command = [sys.executable, str(BENCHMARKS / "host_time.py"), "--repeats", "1", "--output", str(tmp_path / "x.csv")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "x.csv").exists()
