"""Everything that only a GPU can show, in one command that begins nothing new after nine minutes.

    python benchmarks/gpu.py [--sections correctness,op,layer] [--time-limit 540] [--output benchmarks/results/gpu]

Writes OUTPUT.json, .md and .png. Cases that do not start within the time limit are left for the next run of the same
command, which goes on where the last one ended, as long as code, machine and versions are the same.
`--dry-run` builds every case on the CPU at toy sizes; with TRITON_INTERPRET=1 that includes the Triton kernels.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from flashmhf.benchmarking import Row
from gpu_bench import Bench, Case, check_device
from gpu_correctness import correctness, graphs
from gpu_hopper import hopper, hopper_tune
from gpu_model import model
from gpu_record import Record
from gpu_sanitizer import sanitizer
from gpu_speed import decode, growth, growth_fit, layer, op
from tune import proposal, tune

SUMMARIES: dict[str, Callable[[list[Row]], Any]] = {"growth": growth_fit, "tune": proposal}
SECTIONS: dict[str, Callable[[Bench], Iterator[Case]]] = {
    "correctness": correctness,
    "hopper": hopper,
    "graphs": graphs,
    "op": op,
    "layer": layer,
    "decode": decode,
    "growth": growth,
    "model": model,
    "sanitizer": sanitizer,
    "hopper_tune": hopper_tune,
    "tune": tune,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument("--time-limit", type=float, default=540, metavar="SECONDS")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/gpu"))
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    names = arguments.sections.split(",")
    for name in names:
        if name not in SECTIONS:
            parser.error(f"--sections: expected some of {', '.join(SECTIONS)}, got {name!r}")
    check_device(parser, arguments.dry_run)
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler would print its every start and stop
    torch.manual_seed(time.time_ns() % 2**31)  # fresh data every time
    bench = Bench(arguments.dry_run, arguments.time_limit)
    record = Record(arguments.output, bench)
    for name in names:
        record.run(name, SECTIONS[name](bench), SUMMARIES.get(name))
        section = record.sections[name]
        state = "" if section["complete"] else "; incomplete"
        print(f"{name}: {len(section['rows'])} rows in {section['elapsed_s']:.0f} s{state}", flush=True)
    left = [name for name in names if not record.sections[name]["complete"]]
    if left:
        print(f"left for the next run: {', '.join(left)}")
    if failures := record.failures():
        print(f"{len(failures)} failures, the first: {failures[0]}")
        raise SystemExit(1)


if __name__ == "__main__":
    main()
