"""Steps `machine` and `compile`: what this machine is and how fast, and kernels compiled ahead of their launch."""

import functools
import itertools
import platform
import shutil
import subprocess
from collections.abc import Iterable, Iterator

import torch

from flashmhf.benchmarking.measuring import Row, copy_call, dtype_name, interleaved_times, matmul_call
from flashmhf.ops.triton.tiles import device_class
from gpu_bench import Bench, Case
from gpu_checks import CANDIDATE_SIZE, FEW_TOKENS_SIZES, HEAD_DIMS, SMOKE_DIM, SMOKE_SIZES, portable_cases
from gpu_compile import compile_ahead
from gpu_kernels import KernelCase, Size

QUERY = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu,pstate"
OPERATOR_TOKENS = 4096


def machine(bench: Bench) -> Iterator[Case]:
    """Versions and settings; matmul throughput and copy bandwidth, twice, to show their spread."""
    yield Case("facts", functools.partial(_facts, bench))
    for time in ("first", "second"):
        yield Case(f"peaks, {time}", functools.partial(_peaks, bench))


def _facts(bench: Bench) -> list[Row]:
    row: Row = {"python": platform.python_version(), "kernel": platform.release()}
    if tool := shutil.which("nvidia-smi"):
        done = subprocess.run([tool, f"--query-gpu={QUERY}", "--format=csv,noheader"], capture_output=True, text=True)
        row["nvidia_smi"] = done.stdout.strip() or done.stderr.strip()
    if not bench.dry_run:
        properties = torch.cuda.get_device_properties(bench.device)
        row |= {
            "cuda": torch.version.cuda,
            "multiprocessors": properties.multi_processor_count,
            "l2_mib": properties.L2_cache_size / 2**20,
            "memory_gib": properties.total_memory / 2**30,
        }
    return [row]


def _peaks(bench: Bench) -> list[Row]:
    matmul, flops = matmul_call(bench.device, bench.dtype)
    copy, copied_bytes = copy_call(bench.device)
    times = interleaved_times({"matmul": matmul, "copy": copy}, bench.device, bench.repeats)
    common = {"dtype": dtype_name(bench.dtype)}
    return [
        {"variant": "cublas", **common, **vars(times["matmul"]), "tflops": flops / times["matmul"].median_ms / 1e9},
        {"variant": "copy", **vars(times["copy"]), "gb_s": copied_bytes / times["copy"].median_ms / 1e6},
    ]


def compile_first(bench: Bench) -> Iterator[Case]:
    """What `smoke` and `op` launch at head dim 128: whole backends as shipped, then the candidate tiles."""
    operator = [(OPERATOR_TOKENS, *_sizes(bench, name)) for name in bench.shapes]
    sizes = [*SMOKE_SIZES, *operator]
    yield from _backends(bench, [*sizes, *FEW_TOKENS_SIZES], (SMOKE_DIM,), (torch.bfloat16,))
    yield from _candidates(bench, sizes, (SMOKE_DIM,))


def compile_second(bench: Bench) -> Iterator[Case]:
    """What `rounds`, `dims` and `tiles` launch."""
    yield from _backends(bench, [CANDIDATE_SIZE], HEAD_DIMS, (torch.bfloat16, torch.float16))
    yield from _candidates(bench, [CANDIDATE_SIZE], (64, 256))
    for dtype, cases in portable_cases(bench).items():
        yield Case(f"tiles {dtype_name(dtype)}", functools.partial(_compile, bench, cases))


def _backends(
    bench: Bench, sizes: list[Size], dims: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
) -> Iterator[Case]:
    for dtype in dtypes:
        cases: list[KernelCase] = [
            KernelCase(backend, size, D, dtype, None)
            for size in sizes
            for D in dims
            for backend in bench.backends(*size[1:], D, dtype)
        ]
        yield Case(f"backends {dtype_name(dtype)}", functools.partial(_compile, bench, cases))


def _candidates(bench: Bench, sizes: list[Size], dims: tuple[int, ...]) -> Iterator[Case]:
    variants = [variant for D in dims for variant in bench.variants(D, torch.bfloat16) if variant.tile is not None]

    def compilations() -> Iterator[KernelCase]:
        for variant, size in itertools.product(variants, sizes):
            with variant.in_place():  # during planning
                yield KernelCase(variant.backend, size, variant.D, torch.bfloat16, None)

    yield Case("candidates", functools.partial(_compile, bench, compilations()))


def _compile(bench: Bench, cases: Iterable[KernelCase]) -> list[Row]:
    """Counts kernels; one that does not compile fails again at its launch."""
    if bench.dry_run:
        return [{"cases": sum(1 for _ in cases)}]
    results = compile_ahead(device_class(bench.device), cases)
    errors = [result for result in results if isinstance(result, str)]
    return [{"cases": len(results), "errors": errors}]


def _sizes(bench: Bench, name: str) -> tuple[int, int, int, int]:
    """H, H_kv, E and F of a shape."""
    shape = bench.shapes[name]
    return shape.num_heads, shape.num_heads, shape.num_subnetworks, shape.subnetwork_size
