"""The table of backends, in the order in which `auto` tries them, and the choice among them."""

import contextlib
import functools
import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from types import ModuleType

import torch

from flashmhf.ops.hopper import tiles as hopper_tiles
from flashmhf.ops.problem import Problem

logger = logging.getLogger(__name__)

TRITON_MIN_CAPABILITY = (8, 0)
TRITON_MAX_HEAD_DIM = 256
HOPPER_CAPABILITY = (9, 0)
HOPPER_MIN_TRITON = (3, 6)


@dataclass(frozen=True)
class Backend:
    """One implementation: a module with `forward`, `backward` and both of the prologue, and why it cannot run, if so.

    `unsupported_reason(problem)` needs only torch and find_spec, not the module; without a problem it answers for this
    machine in general. `auto_skip_reason(problem)` is why `auto` leaves a problem to another backend although this one
    can run it; `unproven(problem)` is what a user who names the backend should know.
    """

    name: str
    module: str
    unsupported_reason: Callable[[Problem | None], str | None]
    auto_skip_reason: Callable[[Problem], str | None] = lambda problem: None
    unproven: Callable[[Problem], str | None] = lambda problem: None


def _triton_why_not(problem: Problem | None) -> str | None:
    if find_spec("triton") is None:
        return "the package triton is not installed"
    if problem is None:
        return None if torch.cuda.is_available() else "needs a CUDA or ROCm GPU, and this machine shows none"
    if problem.device.type != "cuda":
        return f"needs tensors on a CUDA or ROCm GPU, got {problem.device.type}"
    if torch.version.hip is None and torch.cuda.get_device_capability(problem.device) < TRITON_MIN_CAPABILITY:
        return f"needs compute capability 8.0 or later, got {torch.cuda.get_device_capability(problem.device)}"
    if problem.dtype == torch.float64:
        return "runs float32, float16 and bfloat16, got float64"
    if problem.D > TRITON_MAX_HEAD_DIM:
        return f"runs head dims up to {TRITON_MAX_HEAD_DIM}, got {problem.D}"
    return None


def _hopper_why_not(problem: Problem | None) -> str | None:
    if reason := _triton_why_not(problem):
        return reason
    version = _triton_version()
    if version is not None and tuple(map(int, version.split(".")[:2])) < HOPPER_MIN_TRITON:
        return f"needs Triton 3.6 or later, got {version}"
    if torch.version.hip is not None:
        return "needs an NVIDIA GPU of compute capability 9.0"
    device = None if problem is None else problem.device
    if (capability := torch.cuda.get_device_capability(device)) != HOPPER_CAPABILITY:
        return f"needs compute capability 9.0, got {capability}"
    if problem is None:
        return None
    if problem.dtype not in (torch.bfloat16, torch.float16):
        return f"runs bfloat16 and float16, got {problem.dtype}"
    if problem.D % hopper_tiles.HEAD_DIM_MULTIPLE != 0:
        return f"runs head dims that are multiples of {hopper_tiles.HEAD_DIM_MULTIPLE}, got {problem.D}"
    return None


@functools.cache  # it is asked at every call of the operator, and reads files
def _triton_version() -> str | None:
    """Of the installed distribution, whichever of its names it has; None if it has another."""
    for name in ("triton", "pytorch-triton"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return None


def _hopper_auto_skip_reason(problem: Problem) -> str | None:
    tokens = hopper_tiles.FASTER_FROM.get(hopper_tiles.configuration(problem.D, problem.dtype))
    if tokens is None:
        return "has not been measured on a GPU to be right and faster for this head dim and dtype"
    return None if tokens <= problem.T else f"is faster from {tokens} tokens on"


def _hopper_unproven(problem: Problem) -> str | None:
    if hopper_tiles.configuration(problem.D, problem.dtype) in hopper_tiles.VERIFIED:
        return None
    return "no GPU has verified its kernels for this head dim and dtype: compare its results with another backend's"


def _runs_everywhere(problem: Problem | None) -> None:
    return None


BACKENDS = (
    Backend("hopper", "flashmhf.ops.hopper.backend", _hopper_why_not, _hopper_auto_skip_reason, _hopper_unproven),
    Backend("triton", "flashmhf.ops.triton.backend", _triton_why_not),
    Backend("blockwise", "flashmhf.ops.blockwise", _runs_everywhere),
    Backend("reference", "flashmhf.ops.reference", _runs_everywhere),
)


def backends(problem: Problem | None = None) -> dict[str, str | None]:
    """Every backend's name, and None or the reason why it cannot run `problem` (or anything) here.

    Args:
        problem: `Problem.of(q, k, u, v, gate)`, or None to ask about this machine in general.
    """
    return {backend.name: backend.unsupported_reason(problem) for backend in BACKENDS}


def check_name(name: str) -> str:
    """Returns a valid value of the argument `backend`; raises ValueError for any other."""
    names = ("auto", *(backend.name for backend in BACKENDS))
    if name not in names:
        raise ValueError(f"backend: expected one of {', '.join(names)}, got {name!r}")
    return name


def select(problem: Problem, name: str) -> ModuleType:
    """The module that runs `problem`: the first that can for `auto`, else the named one or an error.

    Raises:
        ValueError: no such backend, or the named one cannot run this problem; it never falls back.
    """
    check_name(name)
    if name != "auto":
        (backend,) = (backend for backend in BACKENDS if backend.name == name)
        if reason := backend.unsupported_reason(problem):
            raise ValueError(f"backend: {name!r} cannot run here: {reason}")
        if warning := backend.unproven(problem):
            _warn_once(name, warning)
        return _load(backend.module)
    passed_over: list[str] = []
    for backend in BACKENDS:
        reason = backend.unsupported_reason(problem) or backend.auto_skip_reason(problem)
        if reason is None:
            _log_choice(backend.name, problem.device.type, tuple(passed_over))
            return _load(backend.module)
        passed_over.append(f"{backend.name}: {reason}")
    raise AssertionError("blockwise runs everywhere")


@functools.cache
def _load(module: str) -> ModuleType:
    return importlib.import_module(module)


@functools.cache
def _warn_once(name: str, warning: str) -> None:
    logger.warning("FlashMHF's backend %r: %s", name, warning)


@functools.cache
def _log_choice(name: str, device_type: str, passed_over: tuple[str, ...]) -> None:
    reasons = "".join(f"; {reason}" for reason in passed_over)
    logger.info("FlashMHF on %s runs on the backend %r%s", device_type, name, reasons)
