"""Several processes on one machine: a function in a gloo process group, with a time limit."""

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT_S = 120


def run_ranks(function: Callable[..., Any], world_size: int, folder: Path, *arguments: Any) -> Any:
    """Returns what `function(*arguments)` returns on rank 0; raises the error of the first rank to fail."""
    context = mp.start_processes(
        _rank, (function, world_size, str(folder), arguments), world_size, join=False, start_method="spawn"
    )
    deadline = time.monotonic() + TIMEOUT_S
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < deadline, f"{function}: expected an end within {TIMEOUT_S} s"
    finally:
        for process in context.processes:
            process.kill()
    return torch.load(folder / "result.pt")


def _rank(rank: int, function: Callable[..., Any], world_size: int, folder: str, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting-point",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=TIMEOUT_S / 2),
    )
    result = function(*arguments)
    if rank == 0:
        torch.save(result, Path(folder) / "result.pt")
    dist.barrier()
    dist.destroy_process_group()
