"""Language-model loss over whole documents: nats/token, perplexity, bits/byte."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import count, islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as nnf
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flashmhf.data.corpus import text_hash
from flashmhf.data.tokens import tokenize
from flashmhf.errors import InputError, RunError
from flashmhf.evaluation.bootstrap import ratio_interval
from flashmhf.models.checks import check_context_length, check_vocabulary
from flashmhf.models.fused_loss import IGNORED

LOGIT_ELEMENTS = 2**25  # of one batch
LARGEST_EXPONENT = 700.0  # a float holds no larger perplexity


@dataclass(frozen=True)
class PositionLoss:
    """Predictions that saw `first` to `last` tokens of context, the separator at the beginning counted."""

    first: int
    last: int
    tokens: int
    nats_per_token: float


@dataclass(frozen=True)
class DocumentLoss:
    """One document: where it comes from as far as the data tells, a hash of its text, and its summed loss."""

    origin: str
    digest: str
    nats: float
    tokens: int
    bytes: int


@dataclass(frozen=True)
class Evaluation:
    """Every token of every document is scored once, the first from the separator alone.

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
        """What `as_dict` or `flashmhf eval --json` gave; other entries are left out.

        Raises:
            InputError: an entry is missing.
        """
        try:
            own = {field.name: values[field.name] for field in fields(cls)}
            own["by_position"] = [PositionLoss(**one) for one in own["by_position"]]
            own["per_document"] = [DocumentLoss(**one) for one in own["per_document"]]
            own["intervals"] = own["intervals"] and {name: tuple(ends) for name, ends in own["intervals"].items()}
        except (KeyError, TypeError) as error:
            raise InputError(f"evaluation: expected the result of flashmhf eval, got one without {error}") from error
        return cls(**own)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Dataset,
    *,
    context_length: int | None = None,
    stride: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Scores documents in windows that never cross from one document into the next.

    Args:
        model: a causal language model, on its device.
        tokenizer: the one it was trained with.
        documents: with the column "text" and, where known, "origin".
        context_length: tokens in a window. Default: the model's max_position_embeddings.
        stride: tokens by which a window moves on. Default: context_length, windows that do not overlap. With a
            smaller one every token but a document's first few sees at least context_length - stride tokens before it.
        progress: called with (tokens scored, tokens in all).

    Raises:
        InputError: sizes that do not fit the model, a tokenizer with more tokens than the model's vocabulary, or no
            token to predict.
        RunError: a loss is not finite.
    """
    context_length = check_context_length(model.config, context_length)
    stride = context_length if stride is None else stride
    if not 1 <= stride <= context_length:
        raise InputError(f"stride: expected 1 to the context length {context_length}, got {stride}")
    check_vocabulary(model, tokenizer)
    tokens = tokenize(documents, tokenizer)
    lengths = np.array([len(ids) - 1 for ids in tokens["input_ids"]])
    if lengths.sum() == 0:
        raise InputError(f"data: expected a document with a token to predict, got none in {len(tokens)} documents")
    seen = progress or (lambda scored, total: None)
    document_nats, position_nats, position_tokens = _score(
        model, tokens["input_ids"], context_length, stride, lambda scored: seen(scored, int(lengths.sum()))
    )
    per_document = _per_document(documents, document_nats, lengths, tokens["bytes"])
    return Evaluation(
        **_measures(per_document),
        context_length=context_length,
        stride=stride,
        by_position=_by_position(position_nats, position_tokens),
        per_document=per_document,
    )


def _score(
    model: PreTrainedModel,
    documents: Sequence[list[int]],
    context_length: int,
    stride: int,
    progress: Callable[[int], None],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Summed nats of each document, and nats and tokens by position: entry i saw i + 1 tokens of context."""
    batch_size = max(1, LOGIT_ELEMENTS // (context_length * model.config.vocab_size))
    windows = (
        (index, *window) for index, ids in enumerate(documents) for window in split_windows(ids, context_length, stride)
    )
    document_nats = np.zeros(len(documents))
    position_nats, position_tokens = np.zeros(context_length), np.zeros(context_length, dtype=np.int64)
    for indices, input_ids, labels in _batches(windows, batch_size):
        losses = _losses(model, input_ids, labels)
        np.add.at(document_nats, indices, losses.sum(1))
        position_nats[: losses.shape[1]] += losses.sum(0)
        position_tokens[: losses.shape[1]] += (labels != IGNORED).sum(0).numpy()
        progress(int(position_tokens.sum()))
    return document_nats, position_nats, position_tokens


def split_windows(ids: list[int], context_length: int, stride: int) -> Iterator[tuple[list[int], list[int]]]:
    """One document (its separator last) as (input_ids, labels); label i is the token after input i, or IGNORED.

    The separator is moved to the front, where it stands for the beginning; every other token is a label once.
    """
    sequence = [ids[-1], *ids[:-1]]
    targets = len(sequence) - 1
    scored = 0
    for start in range(0, targets, stride):
        stop = min(start + context_length, targets)
        if stop > scored:
            labels = [IGNORED] * (scored - start) + sequence[scored + 1 : stop + 1]
            yield sequence[start:stop], labels
            scored = stop


def _per_document(
    documents: Dataset, nats: np.ndarray, lengths: np.ndarray, sizes: Iterable[int]
) -> list[DocumentLoss]:
    """Raises RunError for a loss that is not finite."""
    known = "origin" in documents.column_names
    origins = documents["origin"] if known else (f"document {number}" for number in count(1))
    per_document = []
    # origins may be endless
    for origin, text, loss, length, size in zip(origins, documents["text"], nats, lengths, sizes, strict=False):
        if not math.isfinite(loss):
            raise RunError(f"loss: expected a finite one, got {loss} in {origin}")
        per_document.append(DocumentLoss(origin, f"{text_hash(text):016x}", float(loss), int(length), size))
    return per_document


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
    return math.exp(min(nats_per_token, LARGEST_EXPONENT))


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


def _batches(
    windows: Iterator[tuple[int, list[int], list[int]]], batch_size: int
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    while batch := list(islice(windows, batch_size)):
        indices, input_ids, labels = zip(*batch, strict=True)
        longest = max(map(len, input_ids))
        yield list(indices), _padded(input_ids, longest, 0), _padded(labels, longest, IGNORED)


def _padded(rows: Sequence[list[int]], length: int, padding: int) -> Tensor:
    """Padding is on the right, so that causal attention never sees it."""
    return torch.tensor([row + [padding] * (length - len(row)) for row in rows])


@torch.inference_mode()
def _losses(model: PreTrainedModel, input_ids: Tensor, labels: Tensor) -> np.ndarray:
    """Nats of every label, (windows, positions), 0 where there is none."""
    logits = model(input_ids.to(model.device), use_cache=False).logits
    flat = labels.to(model.device).flatten()
    losses = nnf.cross_entropy(logits.float().flatten(0, 1), flat, ignore_index=IGNORED, reduction="none")
    return losses.cpu().double().view_as(labels).numpy()
