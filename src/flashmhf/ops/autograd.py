"""Derivatives of an operator, registered as `torch.library.register_autograd` does it, at a quarter of its host time.

That one spends some 25 us of Python a call, much of it to go through the dispatcher once more. Here the kernel is
called directly where the dispatcher would do nothing else: where a call has the keys of its device and of autograd
alone, that is unless a mode, a transform or a tensor subclass wants to see it.
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


def register_autograd(
    library: torch.library.Library,
    name: str,
    kernel: Callable[..., Tensor | list[Tensor]],
    differentiate: Callable[..., Sequence[Tensor | None]],
) -> None:
    """Makes an operator differentiable, which then saves its tensors and nothing else.

    Args:
        library: that defined it.
        name: of the operator, whose tensors come first and stand in no lists.
        kernel: what the operator runs on any device.
        differentiate: called as differentiate(tensors, options, needs, *output_gradients), where `options` is the rest
            of the inputs and `needs` says which tensors need a gradient; returns a gradient or None for each of them.
    """
    operator = getattr(getattr(torch.ops, library.ns), name).default
    tensors = sum("Tensor" in str(argument.type) for argument in operator._schema.arguments)

    def below_autograd(keyset: Any, *inputs: Any) -> Tensor | list[Tensor]:
        """keyset: None for a plain call."""
        with torch._C._AutoDispatchBelowAutograd():
            if keyset is None:
                return kernel(*inputs)
            return operator.redispatch(keyset & _BELOW_AUTOGRAD, *inputs)

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            *given, keyset, ctx.options = inputs
            result = below_autograd(keyset, *given, *ctx.options)
            ctx.save_for_backward(*given)
            return tuple(result) if isinstance(result, list) else result

        @staticmethod
        def backward(ctx: Any, *output_gradients: Any) -> Any:
            needs = ctx.needs_input_grad[:tensors]
            return *differentiate(ctx.saved_tensors, ctx.options, needs, *output_gradients), None, None

    # Function.apply looks for transforms, which a plain call has none of, before it calls its base's.
    plain_apply = super(torch.autograd.Function, Differentiable).apply

    def autograd_kernel(keyset: Any, *inputs: Any) -> Any:
        keyset = None if keyset.raw_repr() in _PLAIN else keyset
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs)):
            return below_autograd(keyset, *inputs)
        apply = plain_apply if keyset is None else Differentiable.apply
        result = apply(*inputs[:tensors], keyset, inputs[tensors:])
        return list(result) if isinstance(result, tuple) else result

    library.impl(name, autograd_kernel, "Autograd", with_keyset=True)
