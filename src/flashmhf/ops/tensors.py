"""The tensors of a call and of its gradients, under one name each."""

from typing import NamedTuple

import torch
from torch import Tensor


class Inputs(NamedTuple):
    """q (..., H, D), k, u, v (H_kv, E, F, D), gate (..., H, E) or None."""

    q: Tensor
    k: Tensor
    u: Tensor
    v: Tensor
    gate: Tensor | None


class Gradients(NamedTuple):
    """Gradients of `Inputs`; None where none is needed."""

    dq: Tensor | None
    dk: Tensor | None
    du: Tensor | None
    dv: Tensor | None
    dgate: Tensor | None

    @classmethod
    def empty(cls, inputs: Inputs, needs: tuple[bool, ...]) -> "Gradients":
        """Uninitialised and contiguous, in the dtypes of the inputs."""
        return cls(
            *(
                torch.empty(x.shape, dtype=x.dtype, device=x.device) if x is not None and need else None
                for x, need in zip(inputs, needs, strict=True)
            )
        )

    @property
    def of_weights(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """dk, du and dv."""
        return self.dk, self.du, self.dv
