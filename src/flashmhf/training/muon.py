"""Muon: gradient momentum, orthogonalised, as the update of the layers' matrices; AdamW for everything else.

Sources: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024); the scale of the update, with
which AdamW's learning rate and weight decay carry over, from Liu et al., arXiv 2502.16982, as `adjust_lr_fn=
"match_rms_adamw"` in torch.optim.Muon. That takes matrices of two dimensions only. K, U and V have three: each
sub-network's (F, D) block is a matrix of its own.
"""

import math
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from transformers import PreTrainedModel, TrainingArguments
from transformers.training_args import OptimizerNames

from flashmhf.errors import InputError
from flashmhf.layers import PKV, FlashMHF
from flashmhf.training.precision import computes_bfloat16

OPTION = "optimizer"
ADAMW, MUON = OPTIMIZERS = ("adamw", "muon")
ADAMW_NAMES = (OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED)
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # of the quintic iteration; singular values end between 0.7 and 1.2
ITERATIONS = 5
EPSILON = 1e-7
UPDATE_RMS = 0.2  # of AdamW's updates, by the source of the scale
MOMENTUM = 0.95


def check_optimizer(name: str, arguments: TrainingArguments, mup_base_width: int | None) -> None:
    """Raises InputError if the optimizer is unknown or does not fit the other arguments."""
    if name not in OPTIMIZERS:
        raise InputError(f"{OPTION}: expected {' or '.join(OPTIMIZERS)}, got {name!r}")
    if name == ADAMW:
        return
    if arguments.optim not in ADAMW_NAMES:
        raise InputError(f"optim: expected none of its own with --{OPTION} {MUON}, got {arguments.optim}")
    if arguments.fsdp:
        raise InputError(f"{OPTION}: expected {ADAMW} with --fsdp, which flattens matrices or hides them, got {MUON}")
    if mup_base_width is not None:
        raise InputError(f"mup-base-width: expected none with --{OPTION} {MUON}, which it was not derived for")


def matrices(model: nn.Module) -> set[Tensor]:
    """The parameters that Muon updates: weights of Linear modules but the head's, and K, U, V, whose last two
    dimensions are a matrix. Not the gate's weights: E columns for each head are no matrix worth orthogonalising."""
    output = cast(PreTrainedModel, model).get_output_embeddings()
    found: set[Tensor] = set()
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not output:
            found.add(module.weight)
        elif isinstance(module, FlashMHF):
            found |= {module.k, module.u, module.v}
        elif isinstance(module, PKV):
            found |= {module.k, module.v}
    embedding = cast(PreTrainedModel, model).get_input_embeddings().weight
    return {parameter for parameter in found if parameter is not embedding and parameter.requires_grad}


class Muon(torch.optim.AdamW):
    """AdamW whose groups with `muon=True` are updated by Muon, with the same learning rate and weight decay.

    Args:
        groups: of parameters, as for any optimizer; those in `matrices` are split off into groups of their own.
        matrices: (..., m, n); the last two dimensions are a matrix each.
        options: of torch.optim.AdamW.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], matrices: set[Tensor], **options: Any) -> None:
        split = []
        for group in groups:
            for muon in (False, True):
                chosen = [parameter for parameter in group["params"] if (parameter in matrices) == muon]
                if chosen:
                    split.append({**group, "params": chosen, "muon": muon})
        super().__init__(split, **options)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        for group in groups:
            if group["muon"]:
                self._update(group)
        self.param_groups = [group for group in groups if not group["muon"]]
        try:
            super().step()
        finally:
            self.param_groups = groups
        return loss

    def _update(self, group: dict[str, Any]) -> None:
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)  # AdamW expects one when a state is loaded
                state["momentum"] = torch.zeros_like(parameter)
            state["step"] += 1
            momentum = state["momentum"].lerp_(parameter.grad, 1 - MOMENTUM)
            update = orthogonalised(parameter.grad.lerp(momentum, MOMENTUM))  # Nesterov's
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(update, alpha=-group["lr"] * UPDATE_RMS * math.sqrt(max(parameter.shape[-2:])))


def orthogonalised(matrix: Tensor) -> Tensor:
    """U V^T of the singular value decomposition U S V^T, approximately: (..., m, n) -> the same shape and dtype."""
    if isinstance(matrix, DTensor):  # every rank computes all of it and keeps its part
        everywhere = [Replicate()] * matrix.device_mesh.ndim
        result = DTensor.from_local(orthogonalised(matrix.full_tensor()), matrix.device_mesh, everywhere)
        return result.redistribute(placements=matrix.placements)
    a, b, c = NEWTON_SCHULZ
    x = matrix.to(torch.bfloat16 if computes_bfloat16(use_cpu=matrix.device.type == "cpu") else torch.float32)
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT.contiguous()
    x = x.flatten(0, -3) if x.dim() > 2 else x.unsqueeze(0)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + EPSILON)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).reshape(matrix.shape).to(matrix.dtype)
