"""A run of recipe_runs.py: every knob, and the model with its initial weights.

Every initial value is set here, with random numbers in the order of the recorded runs, whatever the constants of
`layers/initialisation.py` are.
"""

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from flashmhf import flash_mhf
from flashmhf.layers import FlashMHF, SwiGLU
from flashmhf.layers.initialisation import REFERENCE_GAIN, REFERENCE_STD, init_orthogonal
from flashmhf.layers.multi_head import HeadRMSNorm
from flashmhf.models import FlashMHFConfig, FlashMHFForCausalLM

OUTPUT_NORM_SCALE = 0.6
ATTENTION_HEAD = 64
SWIGLU_ROWS = 748  # at a width of 256


@dataclass(frozen=True, kw_only=True)
class RecipeRun:
    """One training run.

    Attributes:
        variant: flashmhf or swiglu, as in the tiny presets.
        seed: of the initial weights and of the order of the blocks.
        steps, batch: of 256 bytes a sequence.
        optimizer: adamw, or muon (AdamW for embeddings, norms and gates).
        learning_rate: of AdamW.
        muon_learning_rate: of Muon.
        embedding_learning_rate, gate_learning_rate: AdamW's for these; None: learning_rate.
        row_rate: multiplies the learning rate of K and U (gate_proj and up_proj).
        value_rate: multiplies the learning rate of V (down_proj).
        in_rate, out_rate: multiply the learning rates of W_in and of W_out.
        attention_rate: multiplies the learning rate of attention's matrices.
        weight_decay: of everything but norms.
        warmup: share of the steps, linear.
        schedule: after the warm-up: "cosine" to a tenth, or "linear" to zero.
        score_rms: M, N and the gate's logits start with this RMS, if q has 1 (without q_norm: 0.707).
        output_gain: V's (down_proj's) standard deviation, times sqrt(d_ff).
        in_proj, out_proj: "orthogonal", or "xavier" (uniform).
        in_gain, out_gain: their gains.
        residual_gain: multiplies o_proj and W_out (down_proj) at the beginning.
        attention: q, k, v and o_proj normal with std 0.02 ("llama") or 1 / sqrt(fan-in) ("fan_in").
        embedding_std: standard deviation of the embeddings.
        tied: the head shares the embeddings; otherwise its std is 0.02.
        heads: of the feed-forward layer.
        subnetworks: of each head, with the same rows in all.
        gate: "sigmoid", "free" (2 sigmoid, which does not sum to a constant), or None.
        q_norm: the feed-forward layer's norm per head.
        qk_norm: attention's norm per head.
        score_scale, gate_scale: None: heads.
        output_scale: None: subnetworks.
        rows: K, U and V (gate_proj, up_proj, down_proj) are "normal", or "orthogonal" with the same RMS.
        blocks: what Muon orthogonalises at once: "matrix" (of a sub-network), "head" (all sub-networks of a head), or
            "cut" (SwiGLU's matrices in 4 x 4 blocks).
        output_norm: a norm per head of S before W_out, with a learned scale that starts at 0.6.
        layers: of the model.
        width: of the model, in attention heads of 64; SwiGLU's rows are in proportion to it.
        branch_scale: what attention's and the feed-forward layer's outputs are multiplied by in the forward pass.
        guided: share of the steps during which a SwiGLU beside each feed-forward layer fades from all to none of its
            output (self-guided training: Wei et al., arXiv 2406.16450).
    """

    variant: str = "flashmhf"
    seed: int = 0
    steps: int = 350
    batch: int = 8
    optimizer: str = "adamw"
    learning_rate: float = 7e-4
    muon_learning_rate: float | None = None
    embedding_learning_rate: float | None = None
    gate_learning_rate: float | None = None
    row_rate: float = 1.0
    value_rate: float = 1.0
    in_rate: float = 1.0
    out_rate: float = 1.0
    attention_rate: float = 1.0
    weight_decay: float = 0.1
    warmup: float = 0.1
    schedule: str = "cosine"
    score_rms: float = 0.64
    output_gain: float = 2.5
    in_proj: str = "xavier"
    in_gain: float = 0.707
    out_proj: str = "xavier"
    out_gain: float = 0.707
    residual_gain: float = 1.0
    attention: str = "llama"
    embedding_std: float = 0.02
    tied: bool = True
    heads: int = 4
    subnetworks: int = 3
    gate: str | None = "sigmoid"
    q_norm: bool = True
    qk_norm: bool = False
    score_scale: float | None = None
    gate_scale: float | None = None
    output_scale: float | None = None
    rows: str = "normal"
    blocks: str = "matrix"
    output_norm: bool = False
    layers: int = 4
    width: int = 256
    branch_scale: float = 1.0
    guided: float = 0.0


FIELDS = tuple(field.name for field in fields(RecipeRun))


def build(run: RecipeRun, **sizes: int) -> FlashMHFForCausalLM:
    """The model with its initial weights; `sizes` replace values of its configuration."""
    values: dict[str, Any] = {"init": "reference", "tie_word_embeddings": run.tied, "qk_norm": run.qk_norm}
    values |= {"num_hidden_layers": run.layers, "hidden_size": run.width}
    values |= {"num_attention_heads": run.width // ATTENTION_HEAD, "num_key_value_heads": run.width // ATTENTION_HEAD}
    if run.variant == "flashmhf":
        scale = float(run.heads)
        values |= {"num_ffn_heads": run.heads, "gate_type": run.gate and "sigmoid", "q_norm": run.q_norm}
        values |= {"score_scale": scale if run.score_scale is None else run.score_scale}
        if run.gate is not None:
            values |= {"num_subnetworks": run.subnetworks}
            values |= {"output_scale": float(run.subnetworks) if run.output_scale is None else run.output_scale}
            values |= {"gate_scale": scale if run.gate_scale is None else run.gate_scale}
    else:
        values |= {"intermediate_size": SWIGLU_ROWS * run.width // 256}
    torch.manual_seed(run.seed)
    model = FlashMHFForCausalLM(FlashMHFConfig.from_preset(f"{run.variant}-tiny", **(values | sizes)))
    initialise(model, run)
    for layer in model.model.layers:
        if run.gate == "free":
            layer.mlp.__class__ = FreeGate
        if run.output_norm:
            layer.mlp.out_proj = nn.Sequential(OutputNorm(layer.mlp), layer.mlp.out_proj)
        if run.guided:
            layer.mlp = Guided(layer.mlp, model.config.hidden_size)
        if run.branch_scale != 1.0:
            for branch in (layer.self_attn.o_proj, layer.mlp):
                branch.register_forward_hook(lambda module, inputs, output: output * run.branch_scale)
    return model


class Guided(nn.Module):
    """A feed-forward layer and a SwiGLU of as many parameters, whose part of the output is `share`."""

    def __init__(self, ffn: nn.Module, hidden_size: int) -> None:
        super().__init__()
        self.ffn, self.share = ffn, 1.0
        size = sum(parameter.numel() for parameter in ffn.parameters()) // (3 * hidden_size)
        self.guide = SwiGLU(hidden_size, size, init="scaled")

    def forward(self, x: Tensor) -> Tensor:
        out = self.ffn(x)
        return out if self.share == 0 else self.share * self.guide(x) + (1 - self.share) * out


def fade_guides(model: nn.Module, run: RecipeRun, step: int) -> None:
    """Sets the guides' share of the output in this step: half a cosine from 1 to 0."""
    done = step / (run.guided * run.steps) if run.guided else 1.0
    for module in model.modules():
        if isinstance(module, Guided):
            module.share = 0.5 * (1 + math.cos(math.pi * done)) if done < 1 else 0.0


class FreeGate(FlashMHF):
    """Gates 2 sigmoid(logit), which do not sum to a constant."""

    def _sub_networks(self, x: Tensor, k: Tensor, u: Tensor, v: Tensor, gate_weight: Any, norm_weight: Any) -> Tensor:
        q = self._query(x)
        if norm_weight is not None:
            assert self.q_norm is not None
            q = nnf.rms_norm(q, (self.head_dim,), eps=self.q_norm.eps) * norm_weight
        gate = 2 * torch.einsum("...hd,hde->...he", q, gate_weight).sigmoid()
        k, u, v = (weight.view(self.rows_shape) for weight in (k, u, v))
        return flash_mhf(q, k, u, v, gate, backend=self.backend)


class OutputNorm(nn.Module):
    """RMS norm of each head, with a learned scale."""

    def __init__(self, ffn: FlashMHF) -> None:
        super().__init__()
        self.norm = HeadRMSNorm(ffn.num_heads, ffn.head_dim, 1e-6)
        nn.init.constant_(self.norm.weight, OUTPUT_NORM_SCALE)

    def forward(self, s: Tensor) -> Tensor:
        """s (..., H D), the heads' outputs side by side -> the same shape."""
        return self.norm(s.unflatten(-1, self.norm.weight.shape)).flatten(-2)


@torch.no_grad()
def initialise(model: FlashMHFForCausalLM, run: RecipeRun) -> None:
    """From init="reference", whose normal weights are scaled; embeddings, projections and attention are drawn anew."""
    nn.init.normal_(model.model.embed_tokens.weight, std=run.embedding_std)
    if not run.tied:
        nn.init.normal_(model.lm_head.weight, std=REFERENCE_STD)
    for layer in model.model.layers:
        attention, ffn = layer.self_attn, layer.mlp
        if run.attention == "fan_in":
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
                nn.init.normal_(linear.weight, std=1 / math.sqrt(linear.in_features))
        attention.o_proj.weight.mul_(run.residual_gain)
        if isinstance(ffn, SwiGLU):
            _scale_swiglu(ffn, run)
        else:
            _scale_flashmhf(ffn, run)


def _rms(weight: Tensor) -> float:
    return float(weight.square().mean().sqrt())


def _scale_swiglu(ffn: SwiGLU, run: RecipeRun) -> None:
    for linear in (ffn.gate_proj, ffn.up_proj):
        linear.weight.mul_(run.score_rms / math.sqrt(linear.in_features) / REFERENCE_STD)
    down = ffn.down_proj
    if run.rows == "orthogonal":
        for linear in (ffn.gate_proj, ffn.up_proj, down):
            init_orthogonal(linear.weight, std=_rms(linear.weight))
    down.weight.mul_(run.output_gain / math.sqrt(down.in_features) / REFERENCE_STD * run.residual_gain)


def _scale_flashmhf(ffn: FlashMHF, run: RecipeRun) -> None:
    if run.rows == "orthogonal":
        for rows in (ffn.k, ffn.u, ffn.v):
            init_orthogonal(rows, std=_rms(rows))
    unit = run.score_rms / math.sqrt(ffn.head_dim) / REFERENCE_STD
    unit /= 1.0 if run.q_norm else REFERENCE_GAIN
    for rows in (ffn.k, ffn.u):
        rows.mul_(unit / ffn.score_scale)
    ffn.v.mul_(run.output_gain / math.sqrt(ffn.num_subnetworks * ffn.subnetwork_size) / REFERENCE_STD)
    if ffn.gate_weight is not None:
        ffn.gate_weight.mul_(unit / ffn.gate_scale)
    assert ffn.in_proj is not None
    assert ffn.out_proj is not None
    for linear, kind, gain in ((ffn.in_proj, run.in_proj, run.in_gain), (ffn.out_proj, run.out_proj, run.out_gain)):
        draw = nn.init.orthogonal_ if kind == "orthogonal" else nn.init.xavier_uniform_
        draw(linear.weight, gain=gain)
    ffn.out_proj.weight.mul_(run.residual_gain)
