"""The layers to compare, by name: FlashMHF, and what one would use or write instead, at equal FLOPs."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, cast

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flashmhf.benchmarking.chunked import chunked_mhf
from flashmhf.benchmarking.workloads import LayerShape
from flashmhf.layers import FlashMHF, SwiGLU
from flashmhf.layers.former_shapes import ROWS
from flashmhf.ops.backends import BACKENDS, select
from flashmhf.ops.problem import Problem


class NaiveMHF(nn.Module):
    """The straightforward layer: every head's activations in memory, matrix products in the best layout."""

    def __init__(self, layer: FlashMHF) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        layer: Any = self.layer
        q_THD = layer._query(x)
        gate_THE = torch.einsum("thd,hde->the", q_THD, layer._gate_weight()).float().sigmoid()
        gate_HTE = (gate_THE / gate_THE.sum(-1, keepdim=True) * layer.output_scale).transpose(0, 1).to(x.dtype)
        k_HRD, u_HRD, v_HRD = (layer._rows(name).flatten(1, 2) for name in ROWS)
        out_HTD = self.sub_networks(q_THD.transpose(0, 1), k_HRD, u_HRD, v_HRD, gate_HTE)
        return layer.out_proj(out_HTD.transpose(0, 1).flatten(1))

    def sub_networks(self, q_HTD: Tensor, k_HRD: Tensor, u_HRD: Tensor, v_HRD: Tensor, gate_HTE: Tensor) -> Tensor:
        """The operator, heads in front, E x F = R."""
        p_HTR = nnf.silu(q_HTD @ k_HRD.mT) * (q_HTD @ u_HRD.mT)
        p_HTR = (p_HTR.unflatten(-1, (gate_HTE.shape[-1], -1)) * gate_HTE.unsqueeze(-1)).flatten(-2)
        return p_HTR @ v_HRD


class Chunked(NaiveMHF):
    """The layer with `chunked_mhf`; `mib` limits the size of each of a chunk's activations."""

    def __init__(self, layer: FlashMHF, mib: int) -> None:
        super().__init__(layer)
        self.elements = mib * 2**20 // layer.k.element_size()

    def sub_networks(self, q_HTD: Tensor, k_HRD: Tensor, u_HRD: Tensor, v_HRD: Tensor, gate_HTE: Tensor) -> Tensor:
        return chunked_mhf(q_HTD, k_HRD, u_HRD, v_HRD, gate_HTE, self.elements)


class LigerSwiGLU(SwiGLU):
    """SwiGLU with liger-kernel's fused activation, which saves the two projections and recomputes their product."""

    def forward(self, x: Tensor) -> Tensor:
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction  # type: ignore[import-not-found]

        return self.down_proj(LigerSiLUMulFunction.apply(self.gate_proj(x), self.up_proj(x)))


class Checkpointed(nn.Module):
    """A layer whose activations are recomputed in the backward pass."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.layer, x, use_reentrant=False)


def _flash(shape: LayerShape, dtype: torch.dtype, device: torch.device, backend: str = "auto") -> FlashMHF:
    sizes = (shape.hidden_size, shape.num_heads, shape.num_subnetworks, shape.subnetwork_size)
    return FlashMHF(*sizes, init="scaled", backend=backend, dtype=dtype, device=device)


def _swiglu(shape: LayerShape, dtype: torch.dtype, device: torch.device) -> SwiGLU:
    return SwiGLU(shape.hidden_size, shape.swiglu_size, init="scaled", dtype=dtype, device=device)


def _liger(shape: LayerShape, dtype: torch.dtype, device: torch.device) -> nn.Module:
    if find_spec("liger_kernel") is None:
        raise ValueError("variants: expected the package liger-kernel for 'swiglu-liger', got none")
    return LigerSwiGLU(shape.hidden_size, shape.swiglu_size, init="scaled", dtype=dtype, device=device)


def _compiled(module: nn.Module) -> nn.Module:
    torch.compiler.reset()  # its cache and its recompile limit belong to the code, not to the module
    return cast(nn.Module, torch.compile(module, dynamic=False))


# Builders. A chunk's activations fit a large L2 cache; those of `chunked-large` make cuBLAS's products larger.
LAYERS: dict[str, Callable[[LayerShape, torch.dtype, torch.device], nn.Module]] = {
    "swiglu": _swiglu,
    "swiglu-compiled": lambda *arguments: _compiled(_swiglu(*arguments)),
    "swiglu-liger": _liger,
    "swiglu-checkpointed": lambda *arguments: Checkpointed(_swiglu(*arguments)),
    "naive": lambda *arguments: NaiveMHF(_flash(*arguments)),
    "chunked": lambda *arguments: Chunked(_flash(*arguments), mib=8),
    "chunked-large": lambda *arguments: Chunked(_flash(*arguments), mib=128),
    "flashmhf": _flash,
    "flashmhf-triton": lambda shape, dtype, device: _flash(shape, dtype, device, "triton"),
    "flashmhf-hopper": lambda shape, dtype, device: _flash(shape, dtype, device, "hopper"),
    "flashmhf-compiled": lambda *arguments: _compiled(_flash(*arguments)),
}


def build_layers(
    shape: LayerShape, names: tuple[str, ...], dtype: torch.dtype, device: torch.device
) -> dict[str, nn.Module]:
    """The named layers, each with its own random parameters."""
    return {name: LAYERS[name](shape, dtype, device) for name in names}


def backend_of(module: nn.Module, tokens: int, dtype: torch.dtype) -> str | None:
    """The backend that runs the FlashMHF layers of a layer or model; None if it has none."""
    layer = next((inner for inner in module.modules() if isinstance(inner, FlashMHF)), None)
    if layer is None or isinstance(module, NaiveMHF):
        return None
    H_kv, E, F, D = layer.rows_shape
    problem = Problem(tokens, layer.num_heads, H_kv, E, F, D, dtype, layer.k.device, layer.gate_type is not None)
    chosen = select(problem, layer.backend).__name__
    return next(backend.name for backend in BACKENDS if backend.module == chosen)
