"""What is compiled ahead is what a launch looks up in Triton's cache, for every kernel in every form."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def cases(mode: str, **variables: str) -> dict[str, object]:
    """What compile_ahead_cases.py prints, by case."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | variables
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT / "src")])
    command = [sys.executable, str(Path(__file__).with_name("compile_ahead_cases.py")), mode]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(line) for line in done.stdout.splitlines())


def test_a_launch_asks_for_what_was_compiled_ahead():
    """Of the same launch planned without data by one process, and on tensors by another."""
    ahead, launched = cases("ahead", PYTHONHASHSEED="1"), cases("launched", PYTHONHASHSEED="2")
    assert len(ahead) > 500
    assert ahead.keys() == launched.keys()
    assert [case for case in ahead if ahead[case] != launched[case]] == []


@pytest.mark.slow
def test_a_launch_finds_what_was_compiled_ahead(tmp_path):
    found = cases("compile", TRITON_CACHE_DIR=str(tmp_path))
    assert len(found) > 10
    assert [case for case in found if not found[case]] == []
