"""Statistics of a trained FlashMHF model's heads: gates, activations, dead rows, rank of the weights.

Tokens pass through the model once; only sums are kept.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as nnf
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flashmhf.data.tokens import tokenize
from flashmhf.errors import InputError
from flashmhf.layers import FlashMHF
from flashmhf.layers.former_shapes import ROWS
from flashmhf.models.checks import check_vocabulary
from flashmhf.ops import prologue
from flashmhf.ops.prologue import Prologue

DEAD = 0.01  # of the median row's root mean square
TOKENS = 4096


@dataclass(frozen=True)
class HeadReport:
    """One head.

    Attributes:
        gate_entropy: of the gate, mean over tokens: 1 is uniform over the sub-networks, 0 a single one. None without
            a gate.
        load_entropy: of the gate's mean over tokens; 1 is an even load.
        q_rms, score_rms, output_rms: root mean squares of the operator's Q, of M = Q K^T, of the head's output.
        activation_max: largest |SiLU(M) * N| over tokens and rows.
        dead_rows: share of rows whose activations have a root mean square below a hundredth of the median row's.
        k_rank, u_rank, v_rank: effective rank (exp of the singular values' entropy), as a share of full rank.
    """

    layer: int
    head: int
    gate_entropy: float | None
    load_entropy: float | None
    q_rms: float
    score_rms: float
    output_rms: float
    activation_max: float
    dead_rows: float
    k_rank: float
    u_rank: float
    v_rank: float


FIGURES = tuple(name for name in HeadReport.__dataclass_fields__ if name not in ("layer", "head"))


class _Sums:
    """Running sums of one layer's heads."""

    def __init__(self, layer: FlashMHF) -> None:
        H, E, R = layer.num_heads, layer.num_subnetworks, layer.num_subnetworks * layer.subnetwork_size
        self.tokens = 0
        self.gate_nats, self.gate_share = torch.zeros(H), torch.zeros(H, E)
        self.q_squares, self.score_squares, self.output_squares = (torch.zeros(H) for _ in range(3))
        self.row_squares, self.activation_max = torch.zeros(H, R), torch.zeros(H)

    def add(self, layer: FlashMHF, x: Tensor) -> None:
        """x (..., hidden_size), the layer's input."""
        q_THD, gate_THE = _query_and_gate(layer, x.flatten(0, -2))
        k_HRD, u_HRD, v_HRD = (_rows(layer, name) for name in ROWS)
        q_HTD = q_THD.float().transpose(0, 1)
        m_HTR = q_HTD @ k_HRD.mT
        a_HTR = nnf.silu(m_HTR) * (q_HTD @ u_HRD.mT)
        p_HTR = a_HTR
        if gate_THE is not None:
            share_HTE = (gate_THE / gate_THE.sum(-1, keepdim=True)).transpose(0, 1)
            self.gate_nats += _entropy(share_HTE).sum(1).cpu()
            self.gate_share += share_HTE.sum(1).cpu()
            gate_HTE1 = gate_THE.transpose(0, 1).unsqueeze(-1)
            p_HTR = (a_HTR.unflatten(-1, (gate_THE.shape[-1], -1)) * gate_HTE1).flatten(-2)
        self.tokens += q_HTD.shape[1]
        self.q_squares += q_HTD.square().mean(-1).sum(1).cpu()
        self.score_squares += m_HTR.square().mean(-1).sum(1).cpu()
        self.output_squares += (p_HTR @ v_HRD).square().mean(-1).sum(1).cpu()
        self.row_squares += a_HTR.square().sum(1).cpu()
        self.activation_max = torch.maximum(self.activation_max, a_HTR.abs().amax((1, 2)).cpu())

    def reports(self, index: int, layer: FlashMHF) -> Iterator[HeadReport]:
        gated, E = layer.gate_weight is not None and layer.num_subnetworks > 1, layer.num_subnetworks
        ranks = [_effective_ranks(_rows(layer, name)) for name in ROWS]
        row_rms = (self.row_squares / self.tokens).sqrt()
        for head in range(layer.num_heads):
            load = self.gate_share[head] / self.tokens
            yield HeadReport(
                layer=index,
                head=head,
                gate_entropy=float(self.gate_nats[head] / self.tokens / math.log(E)) if gated else None,
                load_entropy=float(_entropy(load) / math.log(E)) if gated else None,
                q_rms=_root(self.q_squares[head], self.tokens),
                score_rms=_root(self.score_squares[head], self.tokens),
                output_rms=_root(self.output_squares[head], self.tokens) * _plain_sum_scale(layer),
                activation_max=float(self.activation_max[head]),
                dead_rows=float((row_rms[head] < DEAD * row_rms[head].median()).float().mean()),
                k_rank=ranks[0][head],
                u_rank=ranks[1][head],
                v_rank=ranks[2][head],
            )


def inspect(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Dataset,
    *,
    tokens: int = TOKENS,
    progress: Callable[[int, int], None] | None = None,
) -> list[HeadReport]:
    """Every head of every FlashMHF layer (MH-FFN and Dense-MoE are such layers too), layer by layer.

    Args:
        model: a causal language model, on its device.
        tokenizer: the one it was trained with.
        documents: with the column "text"; read from the front.
        tokens: about how many tokens to pass through the model.
        progress: called with (tokens passed, tokens in all).

    Raises:
        InputError: the model has no such layer, `tokens` is below 1, or the tokenizer does not fit the model.
    """
    check_vocabulary(model, tokenizer)
    one_by_one = (tokenize(documents.select([i]), tokenizer)["input_ids"][0] for i in range(len(documents)))
    return inspect_tokenized(model, one_by_one, tokens=tokens, progress=progress)


@torch.no_grad()
def inspect_tokenized(
    model: PreTrainedModel,
    documents: Iterable[list[int]],
    *,
    tokens: int = TOKENS,
    progress: Callable[[int, int], None] | None = None,
) -> list[HeadReport]:
    """Like `inspect`, of documents that are token ids."""
    layers = multi_head_layers(model)
    if not layers:
        raise InputError("model: expected FlashMHF, MH-FFN or Dense-MoE layers, got a model without any")
    if tokens < 1:
        raise InputError(f"tokens: expected 1 or more, got {tokens}")
    sums = [_Sums(layer) for layer in layers]
    passed = 0
    with _observed(layers, sums):
        for ids in _windows(documents, model.config.max_position_embeddings, tokens):
            model(torch.tensor([ids], device=model.device), use_cache=False)
            passed += len(ids)
            if progress is not None:
                progress(passed, tokens)
    return [
        report
        for index, (layer, layer_sums) in enumerate(zip(layers, sums, strict=True))
        for report in layer_sums.reports(index, layer)
    ]


def multi_head_layers(model: PreTrainedModel) -> list[FlashMHF]:
    """The layers that `inspect` reports on."""
    return [module for module in model.modules() if isinstance(module, FlashMHF)]


@contextmanager
def _observed(layers: list[FlashMHF], sums: list[_Sums]) -> Iterator[None]:
    """Within the context, every input of a layer is added to its sums."""
    hooks = [
        layer.register_forward_pre_hook(lambda module, inputs, layer_sums=layer_sums: layer_sums.add(module, inputs[0]))
        for layer, layer_sums in zip(layers, sums, strict=True)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def as_dicts(reports: list[HeadReport]) -> list[dict[str, Any]]:
    return [asdict(report) for report in reports]


def _windows(documents: Iterable[list[int]], length: int, tokens: int) -> Iterator[list[int]]:
    for ids in documents:
        for start in range(0, len(ids), length):
            window = ids[start : start + min(length, tokens)]
            yield window
            tokens -= len(window)
            if tokens <= 0:
                return


def _query_and_gate(layer: FlashMHF, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Q (T, H, D) and the gate (T, H, E), as the operator receives them."""
    norm_weight = layer._norm_weight()
    eps = 0.0 if norm_weight is None or layer.q_norm is None else layer.q_norm.eps
    options = Prologue(layer.gate_type or "sigmoid", layer.output_scale, eps)
    return prologue.forward(layer._query(x), layer._gate_weight(), norm_weight, options)


def _rows(layer: FlashMHF, name: str) -> Tensor:
    """K, U or V of each head, (H, E x F, D) in float32."""
    return layer._rows(name).float().flatten(1, 2).repeat_interleave(layer.num_heads // layer.num_kv_heads, 0)


def _plain_sum_scale(layer: FlashMHF) -> float:
    return layer.output_scale if layer.gate_weight is None else 1.0


def _entropy(shares: Tensor) -> Tensor:
    """Of the last dimension, in nats."""
    return torch.special.entr(shares).sum(-1)


def _effective_ranks(rows_HRD: Tensor) -> list[float]:
    singular = torch.linalg.svdvals(rows_HRD)
    nats = _entropy(singular / singular.sum(-1, keepdim=True))
    return [float(value) / singular.shape[-1] for value in nats.exp()]


def _root(squares: Tensor, tokens: int) -> float:
    return math.sqrt(float(squares) / tokens)
