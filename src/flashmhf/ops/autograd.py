"""Registers an operator's derivative like `torch.library.register_autograd`, at a quarter of its host time.

The library's version spends some 25 us of Python per call, much of it on a second pass through the dispatcher. Here the
kernel is called directly whenever the dispatcher would do nothing else: when the call has only the dispatch keys of its
device and of autograd, so no mode, transform or tensor subclass needs to see it.

Under the transforms of `torch.func` an autograd kernel is called once per level, on that level's wrappers, and passes
its arguments on to the next level. Reverse mode records its node there, as for any operator of PyTorch. Forward mode
has no kernel of its own: where an argument has a tangent, the formula is computed by differentiable operators instead.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd import forward_ad

from flashmhf.ops.autocast import without_autocast

_BELOW_AUTOGRAD = torch._C._after_autograd_keyset
_PLAIN = frozenset(
    (DispatchKeySet(device) | DispatchKeySet(autograd)).raw_repr()
    for device, autograd in ((DispatchKey.CPU, DispatchKey.AutogradCPU), (DispatchKey.CUDA, DispatchKey.AutogradCUDA))
)

Kernel = Callable[..., Tensor | list[Tensor]]
Differentiate = Callable[..., Sequence[Tensor | None]]


def register_autograd(
    library: torch.library.Library, name: str, kernel: Kernel, differentiate: Differentiate, formula: Kernel
) -> None:
    """Makes an operator differentiable. It saves its tensor arguments and nothing else.

    Args:
        library: defines the operator.
        name: the operator, whose tensors come before all other arguments, none of them in a list.
        kernel: what the operator runs on any device.
        differentiate: called as differentiate(tensors, options, needs, *output_gradients), where `options` are the
            other arguments and `needs` says which tensors require a gradient; returns a gradient or None per tensor.
        formula: the same as `kernel`, in operators that are differentiable in both modes.
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
    apply = _apply_at_a_level(function, plain_apply)

    def autograd_kernel(keyset: Any, *inputs: Any) -> Any:
        keyset = None if keyset.raw_repr() in _PLAIN else keyset
        if _may_have_tangents(keyset, inputs[0]) and any(map(_has_tangent, inputs[:num_tensors])):
            with without_autocast(inputs[0].device.type):
                return formula(*inputs)
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs)):
            return below_autograd(keyset, *inputs)
        result = (plain_apply if keyset is None else apply)(*inputs[:num_tensors], keyset, inputs[num_tensors:])
        return list(result) if isinstance(result, tuple) else result

    library.impl(name, autograd_kernel, "Autograd", with_keyset=True)


def is_transformed() -> bool:
    """Whether a transform of `torch.func` or forward-mode differentiation is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _apply_at_a_level(function: Any, plain_apply: Callable[..., Any]) -> Callable[..., Any]:
    """Under a transform `Function.apply` would start at the outermost level again; this stays at the kernel's."""

    def apply(*inputs: Any) -> Any:
        if not torch._C._are_functorch_transforms_active():
            return function.apply(*inputs)
        with enable_single_level_autograd_function():
            return plain_apply(*inputs)

    return apply


def _may_have_tangents(keyset: Any, x: Tensor) -> bool:
    """Programs of torch.compile, which trace subclasses, enter a dual level without setting `_current_level`."""
    if forward_ad._current_level >= 0:
        return True
    return keyset is not None and (type(x) is not Tensor or torch._C._are_functorch_transforms_active())


def _has_tangent(x: Tensor | None) -> bool:
    return x is not None and forward_ad.unpack_dual(x, level=0).tangent is not None


def _autograd_function(below_autograd: Kernel, differentiate: Differentiate, num_tensors: int) -> Any:
    """A torch.autograd.Function of (*tensors, keyset, options)."""

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            *tensors, keyset, ctx.options = inputs
            if keyset is None or not torch._C._are_functorch_transforms_active():
                result = below_autograd(keyset, *tensors, *ctx.options)
            else:  # the levels below differentiate, too, and `apply` has switched that off
                with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                    result = below_autograd(keyset, *tensors, *ctx.options)
            ctx.save_for_backward(*tensors)
            return tuple(result) if isinstance(result, list) else result

        @staticmethod
        def backward(ctx: Any, *output_gradients: Any) -> Any:
            needs = ctx.needs_input_grad[:num_tensors]
            return *differentiate(ctx.saved_tensors, ctx.options, needs, *output_gradients), None, None

    return Differentiable
