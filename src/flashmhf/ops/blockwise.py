"""FlashMHF in plain PyTorch on any device, with memory bounded by one block of tokens.

The work is cut into tiles of (parameter heads, tokens, parameter rows). A tile's activations live in a workspace that
is allocated once and reused; the backward pass recomputes them. The G = H / H_kv heads of a group share their
parameters and are packed into the token dimension, G times as many tokens of one parameter head, so that the matrix
products also sum over the group. Accumulation over tiles is float32 for 16-bit inputs.

Activations have the inputs' dtype and are multiplied in the reference's order, so that they overflow or vanish only
where the reference's do. float16 on a CPU, which few CPUs multiply fast, is computed in float32, and rounded where the
Triton kernels round.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from flashmhf.ops.prologue import backward as prologue_backward
from flashmhf.ops.prologue import forward as prologue_forward
from flashmhf.ops.slices import slices
from flashmhf.ops.tensors import Gradients, Inputs

__all__ = ["backward", "forward", "prologue_backward", "prologue_forward"]

CPU_TILE_ELEMENTS = 2**19  # measured: docs/log.md, "Tile of the blockwise backend"
ACCELERATOR_TILE_ELEMENTS = 2**24
EXACT_GATE_TOKENS = 16  # up to here the error of a rounded gate would not average out
MIN_TILE_ROWS = 512  # narrower products do not fill a CPU's matrix unit

Factors = tuple[Tensor, ...]  # whose product is the gate; none without a gate


def forward(q: Tensor, k: Tensor, u: Tensor, v: Tensor, gate: Tensor | None) -> Tensor:
    """q (..., H, D), k, u, v (H_kv, E, F, D), gate (..., H, E) or None -> (..., H, D) in q's dtype."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    plan = Plan.of(q, k)
    workspace = _Workspace(q, gate)
    sum_dtype = _sum_dtype(q)
    for heads in plan.heads():
        for tokens in plan.tokens():
            q_block = plan.block_of(q, heads, tokens, workspace, "q")
            gate_factors = plan.gate_of(gate, heads, tokens, workspace)
            out_block = workspace.zeros("out", q_block.shape, sum_dtype)
            for subnetworks, width in plan.parameter_rows():
                k_rows, u_rows, v_rows = plan.rows_of((k, u, v), (heads, subnetworks, width), workspace)
                m, n = workspace.tiles("mn", q_block, k_rows)
                torch.bmm(q_block, k_rows.mT, out=m)
                torch.bmm(q_block, u_rows.mT, out=n)
                p = torch.ops.aten.silu_(m).mul_(n)
                _apply_gate(p, gate_factors, subnetworks, out=p)
                _add_product(out_block, workspace.round(p), v_rows)
            plan.store(out, heads, tokens, out_block)
    return out


def backward(
    dout: Tensor, q: Tensor, k: Tensor, u: Tensor, v: Tensor, gate: Tensor | None, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients for q, k, u, v and gate, None where `needs` says so."""
    grads = Gradients.empty(Inputs(q, k, u, v, gate), needs)
    plan = Plan.of(q, k)
    workspace = _Workspace(q, gate)
    sum_dtype = _sum_dtype(q)
    for heads in plan.heads():
        weight_sums = [
            None if grad is None else workspace.zeros(name, grad[heads].shape, sum_dtype)
            for name, grad in zip(("dk", "du", "dv"), grads.of_weights, strict=True)
        ]
        for tokens in plan.tokens():
            q_block = plan.block_of(q, heads, tokens, workspace, "q")
            dout_block = plan.block_of(dout, heads, tokens, workspace, "dout")
            gate_factors = plan.gate_of(gate, heads, tokens, workspace)
            dq_sum = dgate_sum = None
            if grads.dq is not None:
                dq_sum = workspace.zeros("dq", q_block.shape, sum_dtype)
            if grads.dgate is not None:
                dgate_sum = workspace.zeros("dgate", gate_factors[0].shape, sum_dtype)
            for subnetworks, width in plan.parameter_rows():
                _backward_tile(
                    workspace,
                    (q_block, dout_block, gate_factors),
                    plan.rows_of((k, u, v), (heads, subnetworks, width), workspace),
                    (dq_sum, dgate_sum),
                    tuple(None if s is None else s[:, subnetworks, width].flatten(1, 2) for s in weight_sums),
                    subnetworks,
                )
            plan.store(grads.dq, heads, tokens, dq_sum)
            plan.store(grads.dgate, heads, tokens, dgate_sum)
        for grad, weight_sum in zip(grads.of_weights, weight_sums, strict=True):
            if grad is not None and weight_sum is not None:
                grad[heads] = weight_sum
    return grads


def _backward_tile(
    workspace: "_Workspace",
    blocks: tuple[Tensor, Tensor, Factors],
    rows: tuple[Tensor, ...],
    block_sums: tuple[Tensor | None, Tensor | None],
    row_sums: tuple[Tensor | None, ...],
    subnetworks: slice,
) -> None:
    """Accumulates one tile's gradients. Four buffers: m, n, a (SiLU(M), P, and SiLU(M) again) and d = dA."""
    q, dout, gate = blocks
    k, u, v = rows
    dq_sum, dgate_sum = block_sums
    dk_sum, du_sum, dv_sum = row_sums
    m, n, a, d = workspace.tiles("mnad", q, k)
    torch.bmm(q, k.mT, out=m)
    torch.bmm(q, u.mT, out=n)
    p = torch.ops.aten.silu.out(m, out=a).mul_(n)
    if dv_sum is not None:
        _add_product(dv_sum, workspace.round(_apply_gate(p, gate, subnetworks, out=d)).mT, dout)
    if dq_sum is None and dgate_sum is None and dk_sum is None and du_sum is None:
        return
    torch.bmm(dout, v.mT, out=d)
    if dgate_sum is not None:
        products = p.mul_(d).unflatten(-1, (subnetworks.stop - subnetworks.start, -1))
        dgate_sum[..., subnetworks] += products.sum(-1)
    _apply_gate(d, gate, subnetworks, out=d)
    dn = workspace.round(torch.ops.aten.silu.out(m, out=a).mul_(d))  # again: a fifth buffer saves 4 % in bfloat16
    dm = workspace.round(torch.ops.aten.silu_backward.grad_input(d.mul_(n), m, grad_input=m))
    if dq_sum is not None:
        _add_product(dq_sum, dm, k)
        _add_product(dq_sum, dn, u)
    if dk_sum is not None:
        _add_product(dk_sum, dm.mT, q)
    if du_sum is not None:
        _add_product(du_sum, dn.mT, q)


@dataclass(frozen=True)
class Plan:
    """How a problem is cut into tiles: a function of shapes and device only."""

    T: int
    H_kv: int
    E: int
    F: int
    G: int
    block_heads: int
    block_tokens: int
    block_subnetworks: int
    block_width: int

    @classmethod
    def of(cls, q: Tensor, k: Tensor) -> "Plan":
        T, (H_kv, E, F, _) = math.prod(q.shape[:-2]), k.shape
        G = q.shape[-2] // H_kv
        budget = CPU_TILE_ELEMENTS if q.device.type == "cpu" else ACCELERATOR_TILE_ELEMENTS
        target_rows = max(MIN_TILE_ROWS, budget // max(T * G, 1))
        width = _even_share(F, math.ceil(F / target_rows))
        subnetworks = _even_share(E, round(E * width / target_rows)) if width == F else 1
        rows = subnetworks * width
        tokens = _even_share(T, math.ceil(T / max(budget // (rows * G), 1)))
        heads = _even_share(H_kv, math.ceil(H_kv / max(budget // (rows * G * tokens), 1)))
        return cls(T, H_kv, E, F, G, heads, tokens, subnetworks, width)

    def heads(self) -> Iterator[slice]:
        return slices(self.H_kv, self.block_heads)

    def tokens(self) -> Iterator[slice]:
        return slices(self.T, self.block_tokens)

    def parameter_rows(self) -> Iterator[tuple[slice, slice]]:
        for subnetworks in slices(self.E, self.block_subnetworks):
            for width in slices(self.F, self.block_width):
                yield subnetworks, width

    def block_of(
        self,
        x: Tensor,
        heads: slice,
        tokens: slice,
        workspace: "_Workspace",
        name: str,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Copies a block of x (..., H, X) to (heads, tokens x G, X), in the tiles' dtype unless another is given."""
        x_KTGX = x.reshape(self.T, self.H_kv, self.G, x.shape[-1])[tokens, heads].transpose(0, 1)
        return workspace.empty(name, x_KTGX.shape, dtype or workspace.dtype).copy_(x_KTGX).flatten(1, 2)

    def rows_of(
        self, weights: tuple[Tensor, ...], rows: tuple[slice, slice, slice], workspace: "_Workspace"
    ) -> tuple[Tensor, ...]:
        """(heads, sub-networks x width, D) of each weight in the tiles' dtype; copied only if that is another."""
        views = (weight[rows] for weight in weights)
        if weights[0].dtype != workspace.dtype:
            views = (workspace.empty(f"weight {i}", x.shape, workspace.dtype).copy_(x) for i, x in enumerate(views))
        return tuple(x.flatten(1, 2) for x in views)

    def gate_of(self, gate: Tensor | None, heads: slice, tokens: slice, workspace: "_Workspace") -> Factors:
        """A block of the gate as it is, or as one or two factors in the tiles' dtype.

        PyTorch's CPU backend multiplies mixed dtypes several times more slowly, so a float32 gate is rounded to
        bfloat16 there, unless there are so few tokens that its error would not average out.
        """
        if gate is None:
            return ()
        dtype = torch.promote_types(workspace.dtype, gate.dtype)
        rounds = gate.device.type == "cpu" and (dtype, workspace.dtype) == (torch.float32, torch.bfloat16)
        if not rounds or self.T <= EXACT_GATE_TOKENS:
            return (self.block_of(gate, heads, tokens, workspace, "gate", dtype),)
        if workspace.gate_is_normal:
            return (self.block_of(gate, heads, tokens, workspace, "gate"),)
        return _bfloat16_factors(self.block_of(gate, heads, tokens, workspace, "exact gate", dtype))

    def store(self, x: Tensor | None, heads: slice, tokens: slice, block: Tensor | None) -> None:
        """Writes a block (heads, tokens x G, X) into the contiguous x (..., H, X)."""
        if x is not None and block is not None:
            x_TKGX = x.view(self.T, self.H_kv, self.G, x.shape[-1])
            x_TKGX[tokens, heads] = block.unflatten(1, (-1, self.G)).transpose(0, 1)


def _even_share(size: int, parts: int) -> int:
    """The block size that cuts `size` into at most `parts` nearly equal parts, at least 1."""
    return max(math.ceil(size / max(min(parts, size), 1)), 1)


class _Workspace:
    """The buffers of one call, by name: freshly allocated memory would be page-faulted in again for every block."""

    def __init__(self, q: Tensor, gate: Tensor | None) -> None:
        self._gate = gate
        self._device = q.device
        self._input_dtype = q.dtype
        # The dtype of tiles.
        self.dtype = torch.float32 if q.dtype == torch.float16 and q.device.type == "cpu" else q.dtype
        self._memory: dict[str, Tensor] = {}

    @functools.cached_property
    def gate_is_normal(self) -> bool:
        """Whether every value of the gate is positive and in bfloat16's normal range; False if that is not certain."""
        assert self._gate is not None
        smallest, largest = torch.aminmax(self._gate) if self._gate.numel() else (1.0, 1.0)
        info = torch.finfo(torch.bfloat16)
        return bool(smallest >= info.smallest_normal and largest <= info.max)

    def empty(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Uninitialised; overwrites an earlier buffer of the same name."""
        size = math.prod(shape)
        if name not in self._memory or self._memory[name].numel() < size:
            self._memory[name] = torch.empty(size, dtype=dtype, device=self._device)
        return self._memory[name][:size].view(shape)

    def zeros(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return self.empty(name, shape, dtype).zero_()

    def tiles(self, names: str, x_block: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        """One uninitialised (heads, tokens x G, rows) tile for each letter of `names`."""
        shape = (*x_block.shape[:-1], rows.shape[1])
        return tuple(self.empty(name, shape, self.dtype) for name in names)

    def round(self, tile: Tensor) -> Tensor:
        """The tile, its values rounded to the inputs' dtype."""
        if tile.dtype == self._input_dtype:
            return tile
        return tile.copy_(self.empty("rounded", tile.shape, self._input_dtype).copy_(tile))


def _bfloat16_factors(gate: Tensor) -> Factors:
    """The gate in bfloat16; with a power of two split off values that bfloat16 cannot hold with full precision."""
    _, exponent = torch.frexp(gate)
    excess = (exponent - 127).clamp_min(0) + (exponent + 125).clamp_max(0)
    excess = torch.where(gate.isfinite() & (gate != 0), excess, 0)
    if not excess.any():
        return (gate.bfloat16(),)
    scale = torch.ldexp(torch.ones_like(gate), excess)
    return ((gate / scale).bfloat16(), scale.bfloat16())


def _apply_gate(tile: Tensor, gate: Factors, subnetworks: slice, out: Tensor) -> Tensor:
    """The product of a tile and the gate, written to `out`, which may be the tile; without a gate the tile."""
    for factor in gate:
        factor_of_tile = factor[..., subnetworks].unsqueeze(-1)
        sizes = (factor_of_tile.shape[-2], -1)
        torch.mul(tile.unflatten(-1, sizes), factor_of_tile, out=out.unflatten(-1, sizes))
        tile = out
    return tile


def _sum_dtype(like: Tensor) -> torch.dtype:
    return torch.float32 if like.dtype in (torch.float16, torch.bfloat16) else like.dtype


def _add_product(sums: Tensor, a: Tensor, b: Tensor) -> None:
    """sums += a @ b, accumulated in the dtype of `sums`."""
    if sums.dtype == a.dtype:
        sums.baddbmm_(a, b)
    else:
        sums.add_(torch.bmm(a, b))
