"""Whether a child's weight may be read instead of calling the child."""

from torch import nn
from torch.nn.modules import module as torch_module


def is_plain(child: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling `child` runs `kind.forward` and nothing else.

    A parent that fuses a child's computation into its own reads the child's weight and never calls it. Hooks, adapters
    and parametrisations of the child would have no effect, and an offloaded weight would not be there; such a child
    must be called.
    """
    if type(child) is not kind or "forward" in child.__dict__:
        return False
    return not (  # as in nn.Module.__call__
        child._forward_hooks
        or child._forward_pre_hooks
        or child._backward_hooks
        or child._backward_pre_hooks
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )
