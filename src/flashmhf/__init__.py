"""FlashMHF: a multi-head replacement for a Transformer's feed-forward layer, with fused kernels.

The names below are loaded when they are first used: `import flashmhf` does no device work and imports neither torch nor
transformers. It tells transformers' Auto classes about the models, now or once transformers is imported.
"""

import importlib
from typing import TYPE_CHECKING, Any

from flashmhf import auto_classes, extras

__version__ = "0.1.0"

_HOMES = {
    "flash_mhf": "flashmhf.ops.flash_mhf",
    "backends": "flashmhf.ops.backends",
    "Problem": "flashmhf.ops.problem",
    "FlashMHF": "flashmhf.layers",
    "replace_ffn": "flashmhf.models.replace",
}

__all__ = ["FlashMHF", "Problem", "backends", "flash_mhf", "replace_ffn"]

if TYPE_CHECKING:
    from flashmhf.layers import FlashMHF
    from flashmhf.models.replace import replace_ffn
    from flashmhf.ops.backends import backends
    from flashmhf.ops.flash_mhf import flash_mhf
    from flashmhf.ops.problem import Problem


def __getattr__(name: str) -> Any:
    if name == "models":
        return importlib.import_module("flashmhf.models")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "models", "__version__"])


extras.explain_failed_imports()
auto_classes.register()
