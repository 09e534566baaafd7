"""The table of backends, in the order in which `auto` tries them, and how one is selected."""

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

from flashmhf.extras import missing
from flashmhf.ops.hopper import tiles as hopper_tiles
from flashmhf.ops.onednn import library as onednn_library
from flashmhf.ops.problem import Problem

logger = logging.getLogger(__name__)

TRITON_MIN_CAPABILITY = (8, 0)
TRITON_MAX_HEAD_DIM = 256
HOPPER_CAPABILITY = (9, 0)
HOPPER_MIN_TRITON = (3, 6)
ONEDNN_DTYPES = (torch.float32, torch.bfloat16)
TRITON_KERNELS = f"{__package__}.triton.common"
ONEDNN_BACKEND = f"{__package__}.onednn.backend"  # a Kernel Hub build leaves it out


@dataclass(frozen=True)
class Backend:
    """One implementation: a module with `forward`, `backward`, `prologue_forward` and `prologue_backward`.

    `unsupported_reason(problem)` says why it cannot run a problem (None: on this machine at all), without importing the
    module. `auto_skip_reason(problem)` says why `auto` skips it although it can run the problem.
    `warning(problem)` is logged once when a user selects the backend by name.
    """

    name: str
    module: str
    unsupported_reason: Callable[[Problem | None], str | None]
    auto_skip_reason: Callable[[Problem], str | None] = lambda problem: None
    warning: Callable[[Problem], str | None] = lambda problem: None


def interprets_triton() -> bool:
    """Whether Triton's kernels run in its interpreter, also on CPU tensors: see TRITON_INTERPRET. Imports triton."""
    return missing("triton") is None and importlib.import_module(TRITON_KERNELS).INTERPRETED


def _triton_unsupported_reason(problem: Problem | None) -> str | None:
    if reason := missing("triton"):
        return reason
    reason = _interpreter_unsupported_reason(problem) if interprets_triton() else _gpu_unsupported_reason(problem)
    if reason is not None or problem is None:
        return reason
    if problem.dtype == torch.float64:
        return "supports float32, float16 and bfloat16, got float64"
    if problem.D > TRITON_MAX_HEAD_DIM:
        return f"supports head dims up to {TRITON_MAX_HEAD_DIM}, got {problem.D}"
    return None


def _interpreter_unsupported_reason(problem: Problem | None) -> str | None:
    if not importlib.import_module(TRITON_KERNELS).LIBRARY_INTERPRETED:
        return "TRITON_INTERPRET was set after triton was imported; set it before"
    if problem is not None and problem.device.type not in ("cpu", "cuda"):
        return f"needs tensors on a CPU or GPU for Triton's interpreter (TRITON_INTERPRET), got {problem.device.type}"
    if problem is not None and problem.dtype == torch.bfloat16:
        return "Triton's interpreter (TRITON_INTERPRET) multiplies bfloat16 wrongly; use float32 or float16"
    return None


def _gpu_unsupported_reason(problem: Problem | None) -> str | None:
    if problem is None:
        if torch.version.cuda is None and torch.version.hip is None:
            return f"needs a CUDA or ROCm GPU, and PyTorch {torch.__version__} is built without either"
        return None if torch.cuda.is_available() else "needs a CUDA or ROCm GPU, and none is available"
    if problem.device.type != "cuda":
        late = problem.device.type == "cpu" and importlib.import_module("triton").knobs.runtime.interpret
        hint = " (TRITON_INTERPRET was set after the kernels were imported)" if late else ""
        return f"needs tensors on a CUDA or ROCm GPU, got {problem.device.type}{hint}"
    if torch.version.hip is None and torch.cuda.get_device_capability(problem.device) < TRITON_MIN_CAPABILITY:
        return f"needs compute capability 8.0 or later, got {torch.cuda.get_device_capability(problem.device)}"
    return None


def _hopper_unsupported_reason(problem: Problem | None) -> str | None:
    if problem is not None and problem.device.type != "cuda":
        return f"needs tensors on a CUDA GPU, got {problem.device.type}"
    if interprets_triton():
        return "Triton's interpreter (TRITON_INTERPRET) does not run Gluon kernels"
    if reason := _triton_unsupported_reason(problem):
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
        return f"supports bfloat16 and float16, got {problem.dtype}"
    if problem.D % hopper_tiles.HEAD_DIM_MULTIPLE != 0:
        return f"supports head dims that are multiples of {hopper_tiles.HEAD_DIM_MULTIPLE}, got {problem.D}"
    return None


@functools.cache  # needed for every new problem, and reads files
def _triton_version() -> str | None:
    """The version of Triton's distribution under either of its names, or None if neither is installed."""
    for name in ("triton", "pytorch-triton"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return None


def _hopper_auto_skip_reason(problem: Problem) -> str | None:
    if problem.D > TRITON_MAX_HEAD_DIM:
        return f"supports head dims up to {TRITON_MAX_HEAD_DIM}, got {problem.D}"
    tokens = hopper_tiles.FASTER_FROM.get(hopper_tiles.configuration(problem.D, problem.dtype))
    if tokens is None:
        return "has not been measured to be correct and faster on a GPU for this head dim and dtype"
    return None if tokens <= problem.T else f"is faster only from {tokens} tokens on"


def _hopper_warning(problem: Problem) -> str | None:
    if hopper_tiles.configuration(problem.D, problem.dtype) in hopper_tiles.VERIFIED:
        return None
    return "its kernels have not been verified on a GPU for this head dim and dtype; compare with another backend"


def _triton_auto_skip_reason(problem: Problem) -> str | None:
    if problem.device.type == "cpu":  # known without importing triton
        return "runs on a CPU only in Triton's interpreter (TRITON_INTERPRET), for debugging"
    return "Triton's interpreter (TRITON_INTERPRET) is for debugging" if interprets_triton() else None


def _triton_warning(problem: Problem) -> str | None:
    return "runs in Triton's interpreter (TRITON_INTERPRET), thousands of times slower" if interprets_triton() else None


def _onednn_unsupported_reason(problem: Problem | None) -> str | None:
    if problem is not None and problem.device.type != "cpu":
        return f"needs tensors on a CPU, got {problem.device.type}"
    if find_spec(ONEDNN_BACKEND) is None:
        return "is not part of this build, which may import only torch and triton"
    if reason := missing("numba"):
        return reason
    if problem is not None and problem.dtype not in ONEDNN_DTYPES:
        return f"supports float32 and bfloat16, got {problem.dtype}"
    if problem is not None and problem.dtype == torch.bfloat16 and problem.D % 2 != 0:
        return f"supports even head dims with bfloat16, got {problem.D}"
    dtype = torch.float32 if problem is None else problem.dtype
    return onednn_library.unsupported_reason(dtype) or _numba_unsupported_reason()


@functools.cache
def _numba_unsupported_reason() -> str | None:
    """Imports numba, which fails beside a version of NumPy that it does not support."""
    try:
        numba = importlib.import_module("numba")
    except ImportError as error:
        return f"the package numba cannot be imported: {str(error).splitlines()[0]}"
    return "Numba's compiler is disabled (NUMBA_DISABLE_JIT)" if numba.config.DISABLE_JIT else None


def _runs_everywhere(problem: Problem | None) -> None:
    return None


BACKENDS = (
    Backend(
        "hopper",
        f"{__package__}.hopper.backend",
        _hopper_unsupported_reason,
        _hopper_auto_skip_reason,
        _hopper_warning,
    ),
    Backend(
        "triton",
        f"{__package__}.triton.backend",
        _triton_unsupported_reason,
        _triton_auto_skip_reason,
        _triton_warning,
    ),
    Backend(
        "onednn",
        ONEDNN_BACKEND,
        _onednn_unsupported_reason,
    ),
    Backend("blockwise", f"{__package__}.blockwise", _runs_everywhere),
    Backend("reference", f"{__package__}.reference", _runs_everywhere),
)


def backends(problem: Problem | None = None) -> dict[str, str | None]:
    """Every backend's name, and the reason why it cannot run `problem` here, or None if it can.

    Args:
        problem: `Problem.of(q, k, u, v, gate)`, or None for this machine in general.

    Returns:
        In the order in which "auto" tries them. None does not mean that "auto" would take it: it also skips what is
        not known to be fast.
    """
    return {backend.name: backend.unsupported_reason(problem) for backend in BACKENDS}


def check_name(name: str) -> str:
    """Returns `name` if it is a valid value of the argument `backend`; raises ValueError otherwise."""
    names = ("auto", *(backend.name for backend in BACKENDS))
    if name not in names:
        raise ValueError(f"backend: expected one of {', '.join(names)}, got {name!r}")
    return name


def select(problem: Problem, name: str) -> ModuleType:
    """The module that runs `problem`: for "auto" the first backend that can, otherwise the named one.

    Raises:
        ValueError: no such backend, or the named one cannot run this problem; there is no fallback.
    """
    check_name(name)
    if name != "auto":
        (backend,) = (backend for backend in BACKENDS if backend.name == name)
        if reason := backend.unsupported_reason(problem):
            raise ValueError(f"backend: {name!r} cannot run here: {reason}")
        if warning := backend.warning(problem):
            _warn_once(name, warning)
        return _load(backend.module)
    skipped: list[str] = []
    for backend in BACKENDS:
        # The reason to skip first: it needs no import of triton.
        reason = backend.auto_skip_reason(problem) or backend.unsupported_reason(problem)
        if reason is None:
            _log_choice(backend.name, problem.device.type, tuple(skipped))
            return _load(backend.module)
        skipped.append(f"{backend.name}: {reason}")
    raise AssertionError("blockwise runs everywhere")


@functools.cache
def _load(module: str) -> ModuleType:
    return importlib.import_module(module)


@functools.cache
def _warn_once(name: str, warning: str) -> None:
    logger.warning("FlashMHF backend %r: %s", name, warning)


@functools.cache
def _log_choice(name: str, device_type: str, skipped: tuple[str, ...]) -> None:
    reasons = "".join(f"; skipped {reason}" for reason in skipped)
    logger.info("FlashMHF on %s runs on the backend %r%s", device_type, name, reasons)
