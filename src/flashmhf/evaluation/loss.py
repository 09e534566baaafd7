"""Language-model loss over documents: nats/token, perplexity, bits/byte."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as nnf
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flashmhf.data.corpus import text_hash
from flashmhf.data.tokens import tokenize
from flashmhf.errors import InputError, RunError
from flashmhf.evaluation.bootstrap import ratio_interval
from flashmhf.evaluation.non_finite import non_finite_source
from flashmhf.evaluation.onednn import onednn_linear
from flashmhf.evaluation.windows import Batch, window_batches
from flashmhf.models.checks import check_context_length, check_vocabulary
from flashmhf.models.fused_loss import IGNORED
from flashmhf.serialization import from_plain

# Logits of one batch. On a CPU, 16 MiB of them are memory that is used again and again; larger ones are mapped and
# zeroed by the kernel for each batch.
CPU_LOGIT_ELEMENTS = 2**22
ACCELERATOR_LOGIT_ELEMENTS = 2**25
CPU_TOKENS = 3072  # in one batch; of four times as many, the activations of small models leave a CPU's caches
MAX_EXPONENT = 700.0  # a float holds no larger perplexity


@dataclass(frozen=True)
class PositionLoss:
    """Predictions from `first` to `last` tokens of context, including the EOS token in front."""

    first: int
    last: int
    tokens: int
    nats_per_token: float


@dataclass(frozen=True)
class DocumentLoss:
    """One document: its origin if the data has it, a hash of its text, and its summed loss."""

    origin: str
    digest: str
    nats: float
    tokens: int
    bytes: int


@dataclass(frozen=True)
class Evaluation:
    """Every token of every document is scored once, the first with only the EOS token as its context.

    `intervals` holds the 95 % interval of each of the three measures, by a bootstrap over documents; None for one
    document. `flashmhf.evaluation.differences` compares two evaluations of the same documents.
    """

    nats_per_token: float
    perplexity: float
    bits_per_byte: float
    intervals: dict[str, tuple[float, float]] | None
    tokens: int
    bytes: int
    documents: int
    context_length: int
    stride: int
    by_position: list[PositionLoss]
    per_document: list[DocumentLoss]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Evaluation":
        """What `as_dict` or `flashmhf eval --json` gave; other entries are ignored.

        Raises:
            InputError: an entry is missing or has another type.
        """
        try:
            return from_plain(cls, values)
        except ValueError as error:
            raise InputError(f"evaluation: expected the result of flashmhf eval, got another: {error}") from error


@dataclass(frozen=True, kw_only=True)
class TokenizedDocuments:
    """Documents as token ids, tokenised once for any number of models.

    Attributes:
        tokens: the columns "input_ids" (with the EOS token last) and "bytes", see `data.tokens.tokenize`.
        origins: where each comes from.
        digests: a hash of each text.
    """

    tokens: Dataset
    origins: list[str]
    digests: list[str]

    @classmethod
    def of(cls, documents: Dataset, tokenizer: PreTrainedTokenizerBase) -> "TokenizedDocuments":
        """From documents with the column "text" and, if known, "origin"."""
        known = "origin" in documents.column_names
        return cls(
            tokens=tokenize(documents, tokenizer),
            origins=list(documents["origin"]) if known else [f"document {i + 1}" for i in range(len(documents))],
            digests=[f"{text_hash(text):016x}" for text in documents["text"]],
        )


def evaluate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: Dataset, **options: Any
) -> Evaluation:
    """Scores documents in windows that never cross from one document into the next.

    Args:
        model: a causal language model, on its device.
        tokenizer: the one it was trained with.
        documents: with the column "text" and, if known, "origin".
        options: see `evaluate_tokenized`.

    Raises:
        InputError: the tokenizer has more tokens than the model's vocabulary; or see `evaluate_tokenized`.
        RunError: a loss is not finite.
    """
    check_vocabulary(model, tokenizer)
    return evaluate_tokenized(model, TokenizedDocuments.of(documents, tokenizer), **options)


def evaluate_tokenized(
    model: PreTrainedModel,
    documents: TokenizedDocuments,
    *,
    context_length: int | None = None,
    stride: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Like `evaluate`.

    Args:
        model: a causal language model, on its device.
        documents: tokenised by the model's tokenizer.
        context_length: tokens in a window. Default: the model's max_position_embeddings.
        stride: tokens by which a window moves on. Default: context_length, windows that do not overlap. With a
            smaller one every token but a document's first few has at least context_length - stride tokens of context.
        progress: called with (tokens scored, tokens in all).

    Raises:
        InputError: sizes that do not fit the model, or no token to predict.
        RunError: a loss is not finite.
    """
    context_length, stride = _checked_sizes(model, context_length, stride)
    lengths = np.array([len(ids) - 1 for ids in documents.tokens["input_ids"]])
    total = int(lengths.sum())
    if total == 0:
        raise InputError(f"data: expected a document with a token to predict, got none in {len(lengths)} documents")
    totals = _Totals(len(lengths), context_length)
    batch_size = _batch_size(model, context_length)
    with torch.inference_mode(), onednn_linear(model):
        for batch in window_batches(documents.tokens["input_ids"], context_length, stride, batch_size):
            totals.add(batch, _finite_losses(model, batch, documents.origins))
            if progress is not None:
                progress(int(totals.position_tokens.sum()), total)
    per_document = _per_document(documents, totals.document_nats, lengths)
    return Evaluation(
        **_measures(per_document),
        context_length=context_length,
        stride=stride,
        by_position=_by_position(totals.position_nats, totals.position_tokens),
        per_document=per_document,
    )


class _Totals:
    """Nats of each document, and nats and tokens by position: entry i had i + 1 tokens of context."""

    def __init__(self, documents: int, context_length: int) -> None:
        self.document_nats = np.zeros(documents)
        self.position_nats, self.position_tokens = np.zeros(context_length), np.zeros(context_length, dtype=np.int64)

    def add(self, batch: Batch, losses: np.ndarray) -> None:
        np.add.at(self.document_nats, batch.documents, losses.sum(1))
        self.position_nats[: losses.shape[1]] += losses.sum(0)
        self.position_tokens[: losses.shape[1]] += (batch.labels != IGNORED).sum(0).numpy()


def _checked_sizes(model: PreTrainedModel, context_length: int | None, stride: int | None) -> tuple[int, int]:
    context_length = check_context_length(model.config, context_length)
    stride = context_length if stride is None else stride
    if not 1 <= stride <= context_length:
        raise InputError(f"stride: expected 1 to the context length {context_length}, got {stride}")
    return context_length, stride


def _batch_size(model: PreTrainedModel, context_length: int) -> int:
    if model.device.type != "cpu":
        return max(1, ACCELERATOR_LOGIT_ELEMENTS // (context_length * model.config.vocab_size))
    return max(1, min(CPU_LOGIT_ELEMENTS // model.config.vocab_size, CPU_TOKENS) // context_length)


def _finite_losses(model: PreTrainedModel, batch: Batch, origins: list[str]) -> np.ndarray:
    """`_losses`; raises RunError for one that is not finite, with the document and where in the model it comes from."""
    losses = _losses(model, batch)
    finite = np.isfinite(losses).all(1)
    if not finite.all():
        window = int(np.argmin(finite))
        source = non_finite_source(model, lambda: _losses(model, batch))
        raise RunError(
            f"loss: expected a finite one, got {losses[window].sum()} in {origins[batch.documents[window]]}; {source}"
        )
    return losses


def _per_document(documents: TokenizedDocuments, nats: np.ndarray, lengths: np.ndarray) -> list[DocumentLoss]:
    rows = zip(documents.origins, documents.digests, nats, lengths, documents.tokens["bytes"], strict=True)
    return [DocumentLoss(origin, digest, float(loss), int(length), size) for origin, digest, loss, length, size in rows]


def _measures(per_document: list[DocumentLoss]) -> dict[str, Any]:
    """The measures of all documents, and their intervals."""
    nats, tokens, sizes = np.array([(one.nats, one.tokens, one.bytes) for one in per_document]).T
    nats_per_token = nats.sum() / tokens.sum()
    used = tokens > 0
    of_tokens = ratio_interval(nats[used], tokens[used])
    of_bytes = ratio_interval(nats[used] / math.log(2), sizes[used])
    intervals = None
    if of_tokens is not None and of_bytes is not None:
        perplexities = (_perplexity(of_tokens[0]), _perplexity(of_tokens[1]))
        intervals = {"nats_per_token": of_tokens, "perplexity": perplexities, "bits_per_byte": of_bytes}
    return {
        "nats_per_token": float(nats_per_token),
        "perplexity": _perplexity(nats_per_token),
        "bits_per_byte": float(nats.sum() / math.log(2) / sizes.sum()),
        "intervals": intervals,
        "tokens": int(tokens.sum()),
        "bytes": int(sizes.sum()),
        "documents": len(per_document),
    }


def _perplexity(nats_per_token: float) -> float:
    return math.exp(min(nats_per_token, MAX_EXPONENT))


def _by_position(nats: np.ndarray, tokens: np.ndarray) -> list[PositionLoss]:
    """Entry i saw i + 1 tokens. Bins end at powers of two: 1, 2, 3 to 4, 5 to 8, ..."""
    bins, first = [], 1
    while first <= len(tokens):
        last = min(1 << (first - 1).bit_length(), len(tokens))
        number = int(tokens[first - 1 : last].sum())
        if number > 0:
            bins.append(PositionLoss(first, last, number, float(nats[first - 1 : last].sum() / number)))
        first = last + 1
    return bins


def _losses(model: PreTrainedModel, batch: Batch) -> np.ndarray:
    """Nats of every label, (windows, positions), 0 where there is none."""
    logits = model(batch.input_ids.to(model.device), use_cache=False).logits
    labels = batch.labels.to(model.device).flatten()
    losses = nnf.cross_entropy(logits.float().flatten(0, 1), labels, ignore_index=IGNORED, reduction="none")
    return losses.cpu().double().view_as(batch.labels).numpy()
