"""Steps `training` and `generation`: whole language models against their SwiGLU presets.

One model at a time is on the device, since two of 1.3B with AdamW and activations may not fit. They are compared by
`mfu_of_matmul` or tokens/s; matmul throughput is measured together with each model.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

from flashmhf.benchmarking.measuring import Row
from flashmhf.benchmarking.model import bench_generation, bench_training
from flashmhf.benchmarking.workloads import ModelWorkload
from gpu_bench import Bench, Case
from gpu_checks import SMOKE_DIM

REPEATS = 5


def training(bench: Bench, size: str) -> Iterator[Case]:
    """A step with AdamW at 2048 tokens per sequence, on each backend that passed."""
    batch_size, context_length = (1, 16) if bench.dry_run else (8, 2048)
    for name, backend in _models(bench, size):
        workload = ModelWorkload(models=(name,), batch_size=batch_size, context_length=context_length)
        measure = functools.partial(bench_training, workload, **_options(bench, backend))
        yield Case(f"{name} {backend or ''}".strip(), functools.partial(_alone, measure))


def generation(bench: Bench, size: str = "370m") -> Iterator[Case]:
    """128 new tokens after a prompt of 512, on each backend that passed."""
    prompt_length, new_tokens = (8, 2) if bench.dry_run else (512, 128)
    for batch_size in (1,) if bench.dry_run else (1, 16):
        for name, backend in _models(bench, size):
            workload = ModelWorkload(
                models=(name,), batch_size=batch_size, context_length=prompt_length, new_tokens=new_tokens
            )
            measure = functools.partial(bench_generation, workload, **_options(bench, backend))
            yield Case(f"{name} {backend or ''} batch {batch_size}", functools.partial(_alone, measure))


def _models(bench: Bench, size: str) -> Iterator[tuple[str, str | None]]:
    size = "tiny" if bench.dry_run else size
    yield f"swiglu-{size}", None
    for backend in bench.passed_backends(SMOKE_DIM, bench.dtype):
        yield f"flashmhf-{size}", bench.runs_as(backend)


def _options(bench: Bench, backend: str | None) -> dict[str, Any]:
    repeats = 1 if bench.dry_run else REPEATS
    return {"dtype": bench.dtype, "device": bench.device, "repeats": repeats, "backend": backend}


def _alone(measure: Callable[[], list[Row]]) -> list[Row]:
    """Without the ratio of a model to itself."""
    return [{key: value for key, value in row.items() if key != "ratio"} for row in measure()]
