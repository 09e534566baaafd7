"""The table of backends, in the order in which `auto` tries them, and the choice among them."""

import functools
import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType

import torch

from flashmhf.ops.problem import Problem

logger = logging.getLogger(__name__)

TRITON_MIN_CAPABILITY = (8, 0)
TRITON_MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class Backend:
    """One implementation: a module with `forward` and `backward`, and the reason why it cannot run, if there is one.

    `why_not(problem)` answers from torch and find_spec alone, without importing the module; without a problem it speaks
    of this machine in general.
    """

    name: str
    module: str
    why_not: Callable[[Problem | None], str | None]


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


def _runs_everywhere(problem: Problem | None) -> None:
    return None


BACKENDS = (
    Backend("triton", "flashmhf.ops.triton.backend", _triton_why_not),
    Backend("blockwise", "flashmhf.ops.blockwise", _runs_everywhere),
    Backend("reference", "flashmhf.ops.reference", _runs_everywhere),
)


def backends(problem: Problem | None = None) -> dict[str, str | None]:
    """Every backend's name, and None or the reason why it cannot run `problem` (or anything) here.

    Args:
        problem: `Problem.of(q, k, u, v, gate)`, or None to ask about this machine in general.
    """
    return {backend.name: backend.why_not(problem) for backend in BACKENDS}


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
        if reason := backend.why_not(problem):
            raise ValueError(f"backend: {name!r} cannot run here: {reason}")
        return _load(backend.module)
    passed_over: list[str] = []
    for backend in BACKENDS:
        reason = backend.why_not(problem)
        if reason is None:
            _log_choice(backend.name, problem.device.type, tuple(passed_over))
            return _load(backend.module)
        passed_over.append(f"{backend.name}: {reason}")
    raise AssertionError("blockwise runs everywhere")


@functools.cache
def _load(module: str) -> ModuleType:
    return importlib.import_module(module)


@functools.cache
def _log_choice(name: str, device_type: str, passed_over: tuple[str, ...]) -> None:
    reasons = "".join(f"; {reason}" for reason in passed_over)
    logger.info("FlashMHF on %s runs on the backend %r%s", device_type, name, reasons)
