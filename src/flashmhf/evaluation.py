"""Language-model loss over whole documents: nats a token, perplexity, bits a byte."""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as nnf
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flashmhf.data import tokenize
from flashmhf.errors import InputError

LOGIT_ELEMENTS = 2**25  # of one batch
IGNORED = -100


@dataclass(frozen=True)
class Evaluation:
    """Every token of every document is scored once, the first from the separator alone."""

    nats_per_token: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int
    documents: int
    context_length: int
    stride: int

    def as_dict(self) -> dict[str, float | int]:
        return asdict(self)


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
        documents: with the column "text".
        context_length: tokens in a window. Default: the model's max_position_embeddings.
        stride: tokens by which a window moves on. Default: context_length, windows that do not overlap. With a
            smaller one every token but a document's first few sees at least context_length - stride tokens before it.
        progress: called with (tokens scored, tokens in all).

    Raises:
        InputError: sizes that do not fit the model, or a tokenizer with more tokens than the model's vocabulary.
    """
    longest = model.config.max_position_embeddings
    context_length = longest if context_length is None else context_length
    stride = context_length if stride is None else stride
    if not 2 <= context_length <= longest:
        raise InputError(f"context-length: expected 2 to the model's {longest}, got {context_length}")
    if not 1 <= stride <= context_length:
        raise InputError(f"stride: expected 1 to the context length {context_length}, got {stride}")
    check_vocabulary(model, tokenizer)
    tokens = tokenize(documents, tokenizer)
    lengths = [len(ids) - 1 for ids in tokens["input_ids"]]
    batch_size = max(1, LOGIT_ELEMENTS // (context_length * model.config.vocab_size))
    windows = (window for ids in tokens["input_ids"] for window in split_windows(ids, context_length, stride))
    total_nats, scored = 0.0, 0
    for input_ids, labels in _batches(windows, batch_size):
        total_nats += _summed_loss(model, input_ids, labels)
        scored += int((labels != IGNORED).sum())
        if progress is not None:
            progress(scored, sum(lengths))
    nats_per_token = total_nats / scored
    return Evaluation(
        nats_per_token=nats_per_token,
        perplexity=math.exp(min(nats_per_token, 700.0)),
        bits_per_byte=total_nats / math.log(2) / sum(tokens["bytes"]),
        tokens=scored,
        bytes=sum(tokens["bytes"]),
        documents=len(tokens),
        context_length=context_length,
        stride=stride,
    )


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


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises InputError where the tokenizer has tokens that the model does not know."""
    if len(tokenizer) > model.config.vocab_size:
        raise InputError(
            f"tokenizer: expected at most the model's {model.config.vocab_size} tokens, got {len(tokenizer)}"
        )


def _batches(windows: Iterator[tuple[list[int], list[int]]], batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    batch: list[tuple[list[int], list[int]]] = []
    for window in windows:
        batch.append(window)
        if len(batch) == batch_size:
            yield _padded(batch)
            batch = []
    if batch:
        yield _padded(batch)


def _padded(batch: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    """Padding is on the right, so that causal attention never sees it."""
    longest = max(len(input_ids) for input_ids, _ in batch)
    input_ids = torch.zeros(len(batch), longest, dtype=torch.int64)
    labels = torch.full((len(batch), longest), IGNORED, dtype=torch.int64)
    for row, (ids, targets) in enumerate(batch):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        labels[row, : len(targets)] = torch.tensor(targets)
    return input_ids, labels


@torch.inference_mode()
def _summed_loss(model: PreTrainedModel, input_ids: Tensor, labels: Tensor) -> float:
    logits = model(input_ids.to(model.device), use_cache=False).logits
    labels = labels.to(model.device).flatten()
    losses = nnf.cross_entropy(logits.float().flatten(0, 1), labels, ignore_index=IGNORED, reduction="sum")
    return losses.item()
