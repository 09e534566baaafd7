"""How many training runs fit side by side on this machine: in cores or GPUs, and in memory."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

from flashmhf.comparison.plan import MatchedVariant, Plan
from flashmhf.estimates.memory import estimate_memory
from flashmhf.training.arguments import parse_arguments

PROCESS_MIB = 700  # of a training process besides what `estimate_memory` counts: Python, PyTorch, transformers
MEMORY_SHARE = 0.8  # of the available memory
CGROUP = Path("/sys/fs/cgroup")  # of a container: its limits, in files


def count_jobs(plan: Plan, environment: Mapping[str, str]) -> int:
    """One run per GPU, or on a CPU one single-threaded run per core as far as memory allows; at most all runs.

    Several small models on one thread each train more tokens/s together than one after the other on all threads. If the
    runs take several rounds, as few at a time as finish in the same number of rounds.

    Args:
        plan: of the comparison.
        environment: variables of the runs' processes; OMP_NUM_THREADS is what each run takes.
    """
    runs = max(len(plan.variants) * len(plan.settings.seeds), len(plan.sweep()))
    arguments: Any = parse_arguments(list(plan.settings.training_flags), str(plan.output_dir))
    if gpus := torch.cuda.device_count():
        limit = gpus
    elif not arguments.use_cpu:
        limit = 1  # an accelerator without an index that processes could be given
    else:
        limit = min(cores(environment), _fitting(plan.variants, arguments, plan.settings.data.context_length))
    limit = max(1, min(limit, runs))
    rounds = -(-runs // limit)
    return -(-runs // rounds)


def cores(environment: Mapping[str, str]) -> int:
    """Those that this process may use, each counted once, in units of the threads that the environment fixes."""
    number = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, *period = _of_cgroup("cpu.max") or ["max"]
    if quota != "max":
        number = min(number, int(quota) // int(period[0]))
    threads = environment.get("OMP_NUM_THREADS", "")
    if threads.isdecimal() and int(threads) > 0:
        return number // int(threads)
    return min(number, torch.get_num_threads())  # which leaves out hyperthreads


def _fitting(variants: Iterable[MatchedVariant], arguments: Any, context_length: int) -> int:
    """Runs that fit into memory at a time, if each is the largest."""
    sequences = arguments.per_device_train_batch_size
    peaks = [
        estimate_memory(variant.config, "ddp", 1, sequences, context_length, arguments.bf16).peak
        for variant in variants
    ]
    return int(MEMORY_SHARE * _available_mib() / (PROCESS_MIB + max(peaks)))


def _available_mib() -> float:
    available = psutil.virtual_memory().available
    limit, used, stat = (_of_cgroup(f"memory.{name}") for name in ("max", "current", "stat"))
    if limit and limit[0] != "max" and used:
        cached = int(stat[stat.index("inactive_file") + 1]) if stat and "inactive_file" in stat else 0
        available = min(available, int(limit[0]) - int(used[0]) + cached)
    return available / 2**20


def _of_cgroup(file: str) -> list[str] | None:
    """The words of a file of control groups, version 2; None outside of one."""
    try:
        return (CGROUP / file).read_text().split()
    except OSError:
        return None
