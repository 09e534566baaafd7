"""Muon: gradient momentum, orthogonalised, as the update of the layers' matrices; AdamW for everything else.

Sources: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024); the scale of the update, with
which AdamW's learning rate and weight decay carry over, from Liu et al., arXiv 2502.16982, as `adjust_lr_fn=
"match_rms_adamw"` in torch.optim.Muon. That takes matrices of two dimensions only. K, U and V have three: each
sub-network's (F, D) block is a matrix of its own.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from flashmhf.errors import InputError
from flashmhf.layers import PKV, FlashMHF, SwiGLU
from flashmhf.layers.initialisation import SCALED_HIDDEN_RMS, SCALED_PKV_WEIGHT_RMS
from flashmhf.training.config import ADAMW, MUON, OPTIMIZERS
from flashmhf.training.learning_rates import scale_learning_rates
from flashmhf.training.precision import computes_bfloat16

OPTION = "optimizer"
ADAMW_NAMES = (OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED)
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # of the quintic iteration; singular values end between 0.7 and 1.2
ITERATIONS = 5
EPSILON = 1e-7
UPDATE_RMS = 0.2  # of AdamW's updates, by the source of the scale
MOMENTUM = 0.95
SCORE_RATE = 0.5  # measured: docs/parametrisation.md


def check_optimizer(name: str, arguments: TrainingArguments, mup_base_width: int | None) -> None:
    """Raises InputError if the optimizer is unknown or does not fit the other arguments."""
    if name not in OPTIMIZERS:
        raise InputError(f"{OPTION}: expected {' or '.join(OPTIMIZERS)}, got {name!r}")
    if name == ADAMW:
        return
    other = f"or --{OPTION} {ADAMW}"
    given = OptimizerNames(arguments.optim)
    if given not in ADAMW_NAMES:
        raise InputError(f"optim: expected none with --{OPTION} {MUON}, {other}, got {given.value}")
    version = (arguments.fsdp_plugin_args or {}).get("fsdp_version", "xla")
    if arguments.fsdp and version != 2:
        raise InputError(
            f"fsdp-config: expected version 2, the default, with --{OPTION} {MUON}, {other}, "
            f"got version {version}, which may flatten matrices"
        )
    if mup_base_width is not None:
        raise InputError(
            f"mup-base-width: expected none with --{OPTION} {MUON}, for which its factors were not derived, {other}, "
            f"got {mup_base_width}"
        )


def matrices(model: nn.Module) -> dict[Tensor, float]:
    """The parameters that Muon updates, with the factor on the learning rate of each.

    They are the weights of Linear modules but the head's, and K, U, V, whose last two dimensions are a matrix. Not the
    gate's weights: E columns for each head are no matrix worth orthogonalising. What a layer computes with is the
    product of a parameter and the fixed scale that follows it, so that product gets the update, whatever the scale: K
    and U of init="scaled", whose scale gives AdamW's steps the right size, move as if there were none. PKV's logits
    have the scale 1 / sqrt(head_dim); its softmax weights are as far from SiLU(M) N as stated here, so that its output
    changes as far. What scores are made with, K, U and a SwiGLU's gate_proj and up_proj, has SCORE_RATE.
    """
    output, embeddings = (getattr(model, f"get_{end}put_embeddings")() for end in ("out", "in"))
    factors: dict[Tensor, float] = {}
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not output:
            factors.setdefault(module.weight, 1.0)  # parents come first
        elif isinstance(module, SwiGLU):
            factors |= {module.gate_proj.weight: SCORE_RATE, module.up_proj.weight: SCORE_RATE}
        elif isinstance(module, FlashMHF):
            scores = SCORE_RATE / module.score_scale
            rows = (1 if module.gate_type is None else module.num_subnetworks) / module.output_scale
            factors |= {module.k: scores, module.u: scores, module.v: rows}
        elif isinstance(module, PKV):
            weights = module.num_slots / SCALED_PKV_WEIGHT_RMS
            factors |= {module.k: SCORE_RATE * module.head_dim**0.5, module.v: weights * SCALED_HIDDEN_RMS}
    factors.pop(embeddings.weight, None)
    return {parameter: factor for parameter, factor in factors.items() if parameter.requires_grad}


def gate_factors(model: nn.Module) -> dict[Tensor, float]:
    """Of the gates' weights, whose AdamW steps, too, are those without the scale that follows."""
    gates = (module for module in model.modules() if isinstance(module, FlashMHF) and module.gate_weight is not None)
    return {gate.gate_weight: 1 / gate.gate_scale for gate in gates if gate.gate_weight is not None}


class Muon(torch.optim.AdamW):
    """AdamW whose groups with `muon=True` are updated by Muon, with the same learning rate and weight decay.

    Args:
        groups: of parameters, as for any optimizer; split by rule and factor.
        matrices: (..., m, n), whose last two dimensions are a matrix each, with the factor on their learning rate.
        others: of AdamW's parameters, those with a factor.
        options: of torch.optim.AdamW; `lr` may be a tensor.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        matrices: Mapping[Tensor, float],
        others: Mapping[Tensor, float] | None = None,
        **options: Any,
    ) -> None:
        split = []
        for group in groups:
            for muon in (False, True):
                chosen = [parameter for parameter in group["params"] if (parameter in matrices) == muon]
                if chosen:
                    split.append({**group, "params": chosen, "muon": muon})
        super().__init__(split, **options)
        self._step_supports_amp_scaling = False  # fused AdamW unscales gradients and skips steps itself; Muon does not
        scale_learning_rates(self, {**(others or {}), **matrices})

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

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises InputError if the state has other groups: the rates of some matrices were others."""
        saved, here = (
            [len(group["params"]) for group in groups] for groups in (state_dict["param_groups"], self.param_groups)
        )
        if saved != here:
            raise InputError(
                f"resume: expected an optimizer's state with groups of {here} parameters, got {saved}: it is of a "
                "version of flashmhf with other rates, which can resume it"
            )
        super().load_state_dict(state_dict)

    def _update(self, group: dict[str, Any]) -> None:
        rate = group["lr"]
        if isinstance(rate, Tensor):  # read by no host, so that a CUDA graph can replay the step
            rate = rate.double()  # what a float computes
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                device = parameter.device if group["fused"] or group["capturable"] else None
                state["step"] = torch.zeros((), dtype=torch.float32, device=device)  # as AdamW's, to load a state
                state["momentum"] = torch.zeros_like(parameter)
            state["step"] += 1
            momentum = state["momentum"].lerp_(parameter.grad, 1 - MOMENTUM)
            update = orthogonalised(parameter.grad.lerp(momentum, MOMENTUM))  # Nesterov's
            parameter.mul_(1 - rate * group["weight_decay"])
            parameter.sub_(update.mul_(rate * UPDATE_RMS * math.sqrt(max(parameter.shape[-2:]))))


def orthogonalised(matrix: Tensor) -> Tensor:
    """U V^T of the singular value decomposition U S V^T, approximately: (..., m, n) -> the same shape and dtype."""
    if isinstance(matrix, DTensor):
        return _orthogonalised_shards(matrix)
    if matrix.numel() == 0:  # of a rank without a block of K, U or V
        return matrix
    a, b, c = NEWTON_SCHULZ
    x = matrix.to(torch.bfloat16 if computes_bfloat16(use_cpu=matrix.device.type == "cpu") else torch.float32)
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT.contiguous()
    x = x.flatten(0, -3) if x.dim() > 2 else x.unsqueeze(0)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + EPSILON)
    for _ in range(ITERATIONS):
        gram = torch.bmm(x, x.mT)  # `@` would copy the transpose of a single matrix
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).reshape(matrix.shape).to(matrix.dtype)


def _orthogonalised_shards(matrix: DTensor) -> DTensor:
    """Each rank computes the matrices of which it has a part, and keeps that part.

    Blocks sharded over the dimensions before the last two are complete: K, U and V sharded by heads or sub-networks
    need no communication.
    """
    mesh, blocks = matrix.device_mesh, range(matrix.dim() - 2)
    gathered = [one if getattr(one, "dim", None) in blocks else Replicate() for one in matrix.placements]
    local = orthogonalised(matrix.redistribute(placements=gathered).to_local())
    whole = DTensor.from_local(local, mesh, gathered, run_check=False, shape=matrix.shape, stride=matrix.stride())
    return whole.redistribute(placements=matrix.placements)
