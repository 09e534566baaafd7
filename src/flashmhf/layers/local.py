"""A parameter as the operators, which know plain tensors alone, want it."""

from torch import Tensor, nn


def local(parameter: nn.Parameter) -> Tensor:
    """This rank's shard of a parameter that tensor parallelism has distributed; else the parameter itself.

    DTensor is known by its method, so that a layer on one device does not import torch.distributed.
    """
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter
