"""The operators as plain PyTorch operators, for runtimes that do not know them: ONNX, and whatever reads ATen.

`torch.export` itself needs nothing from here: an exported program calls the operators, which run on this package's
backends wherever the program is loaded.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch._ops import OpOverload

from flashmhf.ops import reference
from flashmhf.ops.flash_mhf import flash_mhf  # noqa: F401  (registers the operator)
from flashmhf.ops.gated_mhf import rows
from flashmhf.ops.prologue import Prologue


def decompositions() -> dict[OpOverload, Callable[..., Tensor]]:
    """The formula of each operator, for `torch.export.ExportedProgram.run_decompositions`.

    The result writes the T x (E F) activations to memory, like eager PyTorch. The backward operators are not in it:
    exported programs are for inference.
    """
    return {torch.ops.flashmhf.flash_mhf.default: _flash_mhf, torch.ops.flashmhf.gated_mhf.default: _gated_mhf}


def _flash_mhf(q: Tensor, k: Tensor, u: Tensor, v: Tensor, gate: Tensor | None, backend: str) -> Tensor:
    return reference.forward(q, k, u, v, gate)


def _gated_mhf(
    q, k, u, v, gate_weight, norm_weight, gate_type: str, gate_total: float, norm_eps: float, backend: str
) -> Tensor:
    k, u, v = rows(k, u, v, gate_weight)
    return reference.gated_forward(q, k, u, v, gate_weight, norm_weight, Prologue(gate_type, gate_total, norm_eps))
