"""What the launcher would look up in Triton's cache, and what compiling ahead leaves there.

    compile_ahead_cases.py ahead | launched      one JSON line a launch: [case, key]
    compile_ahead_cases.py layers                [case, keys of a layer's launches that its backend's case lacks]
    compile_ahead_cases.py compile               compiles ahead, launches, prints what only the launch had compiled

A process of its own, without the interpreter. No GPU: a driver that says "H100" is all that a launch asks before it
loads the compiled kernel.
"""

import functools
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import torch
from triton.compiler import make_backend
from triton.runtime import driver

from compile_kernels import TARGETS, Source, compiled_kernel
from flashmhf.layers import FlashMHF
from flashmhf.ops import backends, call_cache
from flashmhf.ops.hopper import backend as hopper
from flashmhf.ops.hopper.tiles import ForwardTile, backward_tile, forward_tile
from flashmhf.ops.prologue import Prologue
from flashmhf.ops.triton import backend as portable
from flashmhf.ops.triton import tiles
from flashmhf.ops.triton.launch import Launch
from flashmhf.ops.triton.tiles import Tile
from gpu_compile import compile_ahead
from gpu_kernels import BACKENDS, KernelCase, launches, recorded

CLASS = "sm_90a"
EVERYTHING = (True,) * 5
NEEDS = (EVERYTHING, (True,) + (False,) * 4, (False, True, False, False, False), (False,) * 4 + (True,))
# T, H, H_kv, E, F: a split decode step; stacked heads and tails; E, F and GROUP of one; sizes divisible by 16.
SIZES = ((16, 4, 4, 3, 384), (3, 4, 2, 3, 200), (300, 2, 2, 1, 1), (512, 16, 1, 16, 64))
PROLOGUES = (Prologue("sigmoid", 1.0, 1e-6), Prologue("softmax", 2.0, 1e-6))
FUSED = Tile(32, 64, 4, 2)
TABLE: list[KernelCase] = [
    *((name, SIZES[0], 64, torch.bfloat16, Tile(16, 32, 4, 2)) for name in tiles.KERNELS),
    ("forward", SIZES[3], 64, torch.float32, Tile(32, 32, 4, 2)),
    ("hopper_forward", SIZES[1], 96, torch.bfloat16, forward_tile(96)),
    ("hopper_forward", SIZES[0], 64, torch.float16, ForwardTile(64, 64, 2)),
    ("hopper_backward", SIZES[1], 128, torch.bfloat16, backward_tile(128)),
    *((name, SIZES[0], 64, torch.bfloat16, None) for name in ("prologue_forward", "prologue_backward", *BACKENDS)),
]


class Driver:
    """What a launch asks before it loads the compiled kernel."""

    def get_current_target(self):
        return TARGETS[CLASS]

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


class CaughtError(Exception):
    """In the place of a compilation: its source, target and options."""


def catch(source, target=None, options=None, **_):
    raise CaughtError(source, target, options)


def key(call: Callable[[], object]) -> str:
    """Everything but the environment that the name of a compiled kernel on the disk is a hash of."""
    try:
        call()
    except CaughtError as caught:
        source, target, options = caught.args
    backend = make_backend(target)
    options = backend.parse_options({**(options or {}), **source.parse_options()})
    return f"{source.hash()} {backend.hash()} {options.hash()}"


def tensors(size: tuple[int, ...], D: int, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """q, k, u, v, gate, dout."""
    T, H, H_kv, E, F = size
    q, dout = (torch.zeros(T, H, D, dtype=dtype, device=device) for _ in range(2))
    k, u, v = (torch.zeros(H_kv, E, F, D, dtype=dtype, device=device) for _ in range(3))
    return [q, k, u, v, torch.zeros(T, H, E, device=device), dout]


def backend_launches(backend, size, D, dtype, device: str) -> Iterator[tuple[str, list[Launch]]]:
    """Of a backend's own functions: with and without a gate, all gradients and some, a batch that is no flat view."""
    q, k, u, v, gate, dout = tensors(size, D, dtype, device)
    for r in (gate, None):
        yield f"forward {r is None}", recorded(functools.partial(backend.forward, q, k, u, v, r))
        for needs in NEEDS if r is not None else NEEDS[:-1]:
            with_r = (*needs[:4], needs[4] and r is not None)
            call = functools.partial(backend.backward, dout, q, k, u, v, r, with_r)
            yield f"backward {r is None} {needs}", recorded(call)
    batch = torch.zeros(3, 2 * 20, *q.shape[1:], dtype=dtype, device=device)[:, :20]
    yield "batch", recorded(functools.partial(backend.forward, batch, k, u, v, None))


def prologue_launches(size, D, dtype, device: str) -> Iterator[tuple[str, list[Launch]]]:
    q, *_, gate, dout = tensors(size, D, dtype, device)
    H, E = gate.shape[-2:]
    weights = [torch.zeros(*shape, dtype=dtype, device=device) for shape in ((H, D, E), (H, D))]
    for prologue, has_gate, has_norm in itertools.product(PROLOGUES, (True, False), (True, False)):
        gate_weight, norm_weight = (x if has else None for x, has in zip(weights, (has_gate, has_norm), strict=True))
        name = f"{prologue.gate_type} {has_gate} {has_norm}"
        forward = functools.partial(portable.prologue_forward, q, gate_weight, norm_weight, prologue)
        yield f"prologue forward {name}", recorded(forward)
        dgate = gate if has_gate else None
        backward = functools.partial(portable.prologue_backward, q, gate_weight, norm_weight, prologue, dout, dgate)
        yield f"prologue backward {name}", recorded(backward)


def everything(device: str) -> Iterator[tuple[str, list[Launch]]]:
    """Everything that can be launched, by name; two calls with two devices give the same names."""
    for case in TABLE:
        yield f"{case}", launches(CLASS, case, device)
    for size, D, dtype in itertools.product(SIZES, (48, 64), (torch.bfloat16, torch.float32)):
        for name, some in backend_launches(portable, size, D, dtype, device):
            yield f"portable {size} {D} {dtype} {name}", some
        for name, some in prologue_launches(size, D, dtype, device):
            yield f"{size} {D} {dtype} {name}", some
    mended = patch.object(tiles, "miscompiles_transposed_results", lambda name: False)
    with mended, patch.object(tiles, "FUSED_FASTER", {(CLASS, 64)}):
        for name, some in backend_launches(portable, SIZES[0], 64, torch.bfloat16, device):
            yield f"one pass {name}", some
    for size, D, dtype in itertools.product(SIZES, (64, 96, 128, 256), (torch.bfloat16, torch.float16)):
        for name, some in backend_launches(hopper, size, D, dtype, device):
            yield f"hopper {size} {D} {dtype} {name}", some


def keys(mode: str) -> None:
    with patch("triton.compile", catch), patch("triton.compiler.compile", catch):
        for name, some in everything("meta" if mode == "ahead" else "cpu"):
            for i, launch in enumerate(some):
                ahead = functools.partial(compiled_kernel, launch, TARGETS[CLASS])
                print(json.dumps([f"{name} {i}", key(ahead if mode == "ahead" else launch.run)]))


def layers() -> None:
    """Layers as benchmarks and models run them, with few tokens and many."""
    modules = {"triton": portable, "hopper": hopper}
    for (name, module), T, q_norm in itertools.product(modules.items(), (1, 16, 200), (False, True)):
        call_cache.clear()
        with patch.object(backends, "select", lambda problem, name, module=module: module):
            layer = FlashMHF(256, 4, 3, 40, init="scaled", q_norm=q_norm, dtype=torch.bfloat16)
            x = torch.zeros(T, 256, dtype=torch.bfloat16, requires_grad=True)
            launched = recorded(lambda layer=layer, x=x: layer(x).sum().backward())
            launched += recorded(lambda layer=layer, x=x: layer(x[None]).sum().backward())
        ahead = {Source.of(launch, TARGETS[CLASS]).key for launch in planned(name, T)}
        missing = [launch for launch in launched if Source.of(launch, TARGETS[CLASS]).key not in ahead]
        assert len(launched) >= 6, launched
        print(json.dumps([f"{name} {T} {q_norm}", [launch.kernel.__name__ for launch in missing]]))


def planned(backend: str, T: int) -> list[Launch]:
    return launches(CLASS, (backend, (T, 4, 4, 3, 40), 64, torch.bfloat16, None))


def compile_and_launch() -> None:
    """One JSON line a launch of the table: what was not found, as the compiler's listener tells it."""
    for case, compiled in zip(TABLE, compile_ahead(CLASS, TABLE), strict=True):
        assert not isinstance(compiled, str), (case, compiled)
    kept = set(Path(os.environ["TRITON_CACHE_DIR"]).iterdir())
    for case in TABLE:
        for i, launch in enumerate(launches(CLASS, case, "cpu")):
            options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
            launch.kernel.warmup(**launch.arguments, grid=launch.grid, **options)
            found = set(Path(os.environ["TRITON_CACHE_DIR"]).iterdir()) == kept
            print(json.dumps([f"{case} {i}", found]))


if __name__ == "__main__":
    driver.set_active(Driver())
    on_a_gpu = patch("flashmhf.ops.triton.launch.has_fast_tanh", lambda device, dtype: dtype.itemsize == 2)
    with on_a_gpu, patch.object(tiles, "device_class", lambda device: CLASS):
        {"compile": compile_and_launch, "layers": layers}.get(sys.argv[1], functools.partial(keys, sys.argv[1]))()
