"""Compiling ahead: a launch finds every kernel in Triton's cache."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from triton.backends.compiler import GPUTarget

import gpu_compile
from compile_kernels import Source

ROOT = Path(__file__).parents[2]


def cases(mode: str, **variables: str) -> dict[str, object]:
    """The output of compile_ahead_cases.py by case."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | variables
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT / "src")])
    command = [sys.executable, str(Path(__file__).with_name("compile_ahead_cases.py")), mode]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(line) for line in done.stdout.splitlines())


def test_launches_look_up_the_keys_compiled_ahead():
    """The same launch planned without data in one process, and on tensors in another."""
    ahead, launched = cases("ahead", PYTHONHASHSEED="1"), cases("launched", PYTHONHASHSEED="2")
    assert len(ahead) > 500
    assert ahead.keys() == launched.keys()
    assert [case for case in ahead if ahead[case] != launched[case]] == []


@pytest.mark.slow
def test_launches_find_the_kernels_compiled_ahead(tmp_path):
    found = cases("compile", TRITON_CACHE_DIR=str(tmp_path))
    assert len(found) > 10
    assert [case for case in found if not found[case]] == []


def test_launches_of_a_layer_are_compiled_ahead():
    missing = cases("layers")
    assert len(missing) > 5
    assert [case for case in missing if missing[case]] == []


@dataclass(frozen=True)
class Bad(Source):
    """A source whose compilation fails in one of three ways."""

    def compile(self):
        if self.kernel == "hangs":
            time.sleep(600)
        if self.kernel == "dies":
            os.abort()
        raise ValueError("no such\ninstruction")


@pytest.mark.slow
def test_a_compilation_that_hangs_or_dies_is_abandoned_and_the_next_succeeds():
    expected = {
        "fails": "ValueError: no such instruction",
        "hangs": "TimeoutError: no answer within 0.5 s",
        "dies": "EOFError: the compiler's process ended with exit code -6",
        "fails again": "ValueError: no such instruction",
    }
    got = {
        name: gpu_compile._compile(0.5, Bad("", name, {}, {}, {}, {}, GPUTarget("cuda", 90, 32))) for name in expected
    }
    assert got == expected
