"""Registers an operator's derivative like `torch.library.register_autograd`, at a quarter of its host time.

The library's version spends some 25 us of Python per call, much of it on a second pass through the dispatcher. Here the
kernel is called directly whenever the dispatcher would do nothing else: when the call has only the dispatch keys of its
device and of autograd, so no mode, transform or tensor subclass needs to see it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet

_BELOW_AUTOGRAD = torch._C._after_autograd_keyset
_PLAIN = frozenset(
    (DispatchKeySet(device) | DispatchKeySet(autograd)).raw_repr()
    for device, autograd in ((DispatchKey.CPU, DispatchKey.AutogradCPU), (DispatchKey.CUDA, DispatchKey.AutogradCUDA))
)

Kernel = Callable[..., Tensor | list[Tensor]]
Differentiate = Callable[..., Sequence[Tensor | None]]


def register_autograd(library: torch.library.Library, name: str, kernel: Kernel, differentiate: Differentiate) -> None:
    """Makes an operator differentiable. It saves its tensor arguments and nothing else.

    Args:
        library: defines the operator.
        name: the operator, whose tensors come before all other arguments, none of them in a list.
        kernel: what the operator runs on any device.
        differentiate: called as differentiate(tensors, options, needs, *output_gradients), where `options` are the
            other arguments and `needs` says which tensors require a gradient; returns a gradient or None per tensor.
    """
    operator = getattr(getattr(torch.ops, library.ns), name).default
    num_tensors = sum("Tensor" in str(argument.type) for argument in operator._schema.arguments)

    def below_autograd(keyset: Any, *inputs: Any) -> Tensor | list[Tensor]:
        """keyset: None for a plain call."""
        with torch._C._AutoDispatchBelowAutograd():
            if keyset is None:
                return kernel(*inputs)
            return operator.redispatch(keyset & _BELOW_AUTOGRAD, *inputs)

    function = _autograd_function(below_autograd, differentiate, num_tensors)
    # Function.apply checks for transforms, of which a plain call has none, before it calls its base class.
    plain_apply = super(torch.autograd.Function, function).apply

    def autograd_kernel(keyset: Any, *inputs: Any) -> Any:
        keyset = None if keyset.raw_repr() in _PLAIN else keyset
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs)):
            return below_autograd(keyset, *inputs)
        apply = plain_apply if keyset is None else function.apply
        result = apply(*inputs[:num_tensors], keyset, inputs[num_tensors:])
        return list(result) if isinstance(result, tuple) else result

    library.impl(name, autograd_kernel, "Autograd", with_keyset=True)


def _autograd_function(below_autograd: Kernel, differentiate: Differentiate, num_tensors: int) -> Any:
    """A torch.autograd.Function of (*tensors, keyset, options)."""

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            *tensors, keyset, ctx.options = inputs
            result = below_autograd(keyset, *tensors, *ctx.options)
            ctx.save_for_backward(*tensors)
            return tuple(result) if isinstance(result, list) else result

        @staticmethod
        def backward(ctx: Any, *output_gradients: Any) -> Any:
            needs = ctx.needs_input_grad[:num_tensors]
            return *differentiate(ctx.saved_tensors, ctx.options, needs, *output_gradients), None, None

    return Differentiable
