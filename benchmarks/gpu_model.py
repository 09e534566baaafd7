"""Section `model`: training and generation of whole language models against their SwiGLU presets."""

import functools
from collections.abc import Iterator
from typing import Any

from flashmhf.benchmarking.model import bench_generation, bench_training
from gpu_bench import Bench, Case

SIZES = ("370m", "1.3b")
REPEATS = 5


def model(bench: Bench) -> Iterator[Case]:
    """Training step at 2048 tokens a sequence; 128 new tokens after a prompt of 512."""
    batch_size, context_length, prompt_length, new_tokens = (1, 16, 8, 2) if bench.dry_run else (8, 2048, 512, 128)
    batch_sizes = (1,) if bench.dry_run else (1, 16)
    options: dict[str, Any] = {"dtype": bench.dtype, "device": bench.device, "repeats": 1 if bench.dry_run else REPEATS}
    pairs = {size: (f"swiglu-{size}", f"flashmhf-{size}") for size in (("tiny",) if bench.dry_run else SIZES)}
    for size, names in pairs.items():
        training = functools.partial(bench_training, names, batch_size, context_length, **options)
        yield f"training {size}", training
    for cache in ("dynamic", "static"):  # the static one is compiled, which takes longest
        for size, names in pairs.items():
            for batch in batch_sizes:
                generation = functools.partial(bench_generation, names, batch, prompt_length, new_tokens, **options)
                yield f"generation {size} batch {batch} {cache}", functools.partial(generation, cache=cache)
