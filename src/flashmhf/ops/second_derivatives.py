"""Second derivatives of the operators, through the reference: the same on every backend, at its memory cost."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flashmhf.ops.autocast import without_autocast


def differentiate_gradients(
    saved: Sequence[Tensor | None],
    needs: Sequence[bool],
    grad_grads: Sequence[Tensor | None],
    gradients: Callable[[list[Any]], Sequence[Tensor]],
) -> tuple[Tensor | None, ...]:
    """The backward of a backward operator.

    Args:
        saved: its tensor inputs.
        needs: which of them require a gradient.
        grad_grads: the gradients of its results.
        gradients: recomputes its results differentiably from copies of `saved`.
    """
    create_graph = torch.is_grad_enabled()
    device_type = next(x.device.type for x in saved if x is not None)
    with torch.enable_grad(), without_autocast(device_type):
        # Views, so that one tensor passed for two arguments gets a gradient for each.
        inputs = [None if x is None else x.view_as(x) for x in saved]
        needed = [x for x, need in zip(inputs, needs, strict=True) if need and x is not None]
        grads = gradients(list(inputs))
        used = [(grad, gg) for grad, gg in zip(grads, grad_grads, strict=True) if gg is not None and grad.requires_grad]
        if not used:
            return (None,) * len(inputs)
        first, vectors = zip(*used, strict=True)
        seconds = iter(torch.autograd.grad(first, needed, vectors, create_graph=create_graph, allow_unused=True))
    return tuple(next(seconds) if need else None for need in needs)
