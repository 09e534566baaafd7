"""The operators under `torch.vmap`: one call of the same operator on a larger problem.

If only tokens are batched (q, gate, output gradient), the batch becomes another leading dimension. If weights or their
gradients are, it is folded into the heads: B samples of H heads with parameters of their own are B H heads. A
gradient per sample of a weight therefore takes B times the weight's memory twice, for the result and for the copies.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

# The shape of a tensor argument: TOKENS (..., H, X), WEIGHTS (H, ...).
TOKENS, WEIGHTS = "tokens", "weights"

Check = Callable[[tuple[Any, ...], tuple[Any, ...]], Any]
Dims = Sequence[int | None]
Rule = Callable[..., tuple[Any, Any]]


def register_vmap(library: torch.library.Library, name: str, roles: tuple[str, ...], check: Check) -> None:
    """Registers the batching rules of an operator and of its backward operator.

    Args:
        library: defines both operators.
        name: the operator. Its backward, `{name}_backward`, takes the output gradient before the operator's tensors and
            `needs` after them, and returns the gradients that are needed.
        roles: TOKENS or WEIGHTS for each of the operator's tensors.
        check: called as check(tensors, options) with the tensors of one sample; raises what is wrong with them.
    """
    operators = getattr(torch.ops, library.ns)
    forward, backward = getattr(operators, name).default, getattr(operators, f"{name}_backward").default

    def forward_rule(info: Any, in_dims: Dims, *inputs: Any) -> tuple[Tensor, int]:
        tensors, options = inputs[: len(roles)], inputs[len(roles) :]
        check(tuple(map(_one_sample, tensors, in_dims)), options)
        batch = _Batch(size=info.batch_size, fold=_has_batched_weight(roles, in_dims))
        out = forward(*map(batch.join, tensors, roles, in_dims), *options)
        return batch.split(out, TOKENS), 0

    def backward_rule(info: Any, in_dims: Dims, *inputs: Any) -> tuple[list[Tensor], list[int]]:
        input_roles = (TOKENS, *roles)
        tensors, (needs, *options) = inputs[: len(input_roles)], inputs[len(input_roles) :]
        result_roles = [role for role, need in zip(roles, needs, strict=True) if need]
        batch = _Batch(size=info.batch_size, fold=_has_batched_weight(input_roles, in_dims) or WEIGHTS in result_roles)
        grads = backward(*map(batch.join, tensors, input_roles, in_dims), needs, *options)
        return list(map(batch.split, grads, result_roles)), [0] * len(grads)

    for operator, rule in ((forward, forward_rule), (backward, backward_rule)):
        torch.library.register_vmap(operator, rule, lib=library)
        library.impl(operator, _older_vmap_kernel(operator, rule), "Batched")


@dataclass(frozen=True)
class _Batch:
    """How a batch is joined to the operator's dimensions: folded into the heads, or as the first dimension."""

    size: int
    fold: bool

    def join(self, x: Tensor | None, role: str, dim: int | None) -> Tensor | None:
        if x is None or (role == WEIGHTS and not self.fold):
            return x
        x = x.expand(self.size, *x.shape) if dim is None else x.movedim(dim, 0)
        if not self.fold:
            return x
        if role == TOKENS:
            x = x.movedim(0, -3)
            return x.reshape(*x.shape[:-3], self.size * x.shape[-2], x.shape[-1])
        return x.reshape(self.size * x.shape[1], *x.shape[2:])

    def split(self, x: Tensor, role: str) -> Tensor:
        """The opposite of `join` for a result; its batch is dimension 0."""
        if not self.fold:
            return x
        if role == TOKENS:
            return x.reshape(*x.shape[:-2], self.size, x.shape[-2] // self.size, x.shape[-1]).movedim(-3, 0)
        return x.reshape(self.size, x.shape[0] // self.size, *x.shape[1:])


@dataclass(frozen=True)
class _OlderVmapInfo:
    """What a rule reads of `torch._functorch.autograd_function.VmapInfo`."""

    batch_size: int


def _older_vmap_kernel(operator: Any, rule: Rule) -> Callable[..., Any]:
    """For `torch.autograd.grad(..., is_grads_batched=True)` and gradcheck, whose vmap has batched tensors of its own.

    A tensor does not tell which levels it is batched at. Removing a level that it does not have adds a dimension of
    size 1, so such dimensions are no batch.
    """

    def kernel(*inputs: Any) -> Any:
        arguments = list(inputs)
        places = [i for i, x in enumerate(arguments) if isinstance(x, Tensor)]
        for level in range(_older_vmap_nesting(), 0, -1):
            in_dims: list[int | None] = [None] * len(arguments)
            for i in places:
                x = torch._remove_batch_dim(arguments[i], level, 1, 0)
                arguments[i], in_dims[i] = (x.squeeze(0), None) if x.shape[0] == 1 else (x, 0)
            sizes = {arguments[i].shape[0] for i in places if in_dims[i] == 0}
            if sizes:
                (batch_size,) = sizes
                out, _ = rule(_OlderVmapInfo(batch_size), in_dims, *arguments)
                return pytree.tree_map(lambda x, level=level: torch._add_batch_dim(x, 0, level), out)
        return operator(*arguments)

    return kernel


def _older_vmap_nesting() -> int:
    torch._C._vmapmode_increment_nesting()
    return torch._C._vmapmode_decrement_nesting()


def _has_batched_weight(roles: Sequence[str], in_dims: Dims) -> bool:
    return any(role == WEIGHTS and dim is not None for role, dim in zip(roles, in_dims, strict=False))


def _one_sample(x: Tensor | None, dim: int | None) -> Tensor | None:
    return x if x is None or dim is None else x.select(dim, 0)
