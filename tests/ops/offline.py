"""Runs a script that compiles kernels, in a process of its own, because the tests switch Triton to its interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(script: str, *arguments: object, timeout: float | None = None, **variables: str) -> list:
    """The parsed JSON lines that a script prints within `timeout` seconds, with these environment variables."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | variables
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT / "src")])
    command = [sys.executable, "-c", script, *map(str, arguments)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=timeout)
    return [json.loads(line) for line in result.stdout.splitlines()]
