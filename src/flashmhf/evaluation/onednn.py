"""Linear layers by oneDNN instead of MKL, for scoring in float32 on a CPU.

PyTorch's float32 products are MKL's, which does not use AVX-512 on CPUs other than Intel's: 110 GFLOP/s on a core of an
AMD EPYC (Zen 5), where oneDNN reaches 250. The operator here is the one that torch.compile calls.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeGuard

import torch
from torch import Tensor, nn


@contextmanager
def onednn_linear(model: nn.Module) -> Iterator[None]:
    """Within the context, linear layers with float32 weights on the CPU are oneDNN's. There is no derivative."""
    layers = [module for module in model.modules() if _is_plain_linear(module)] if _is_available() else []
    for layer in layers:
        layer.forward = partial(_linear, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _is_available() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """In float32, on the CPU, not quantised, with a forward that nothing has replaced."""
    if type(module) is not nn.Linear or "forward" in vars(module) or type(module.weight) is not nn.Parameter:
        return False
    return module.weight.device.type == "cpu" and module.weight.dtype == torch.float32


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    if x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return nn.functional.linear(x, layer.weight, layer.bias)
    return torch.ops.mkldnn._linear_pointwise(x, layer.weight, layer.bias, "none", [], "")
