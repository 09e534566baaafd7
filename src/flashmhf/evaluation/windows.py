"""Documents as windows of tokens that never cross from one document into the next, and batches of them."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from flashmhf.models.fused_loss import IGNORED


@dataclass(frozen=True)
class Batch:
    """Windows, padded on the right, where causal attention does not see the padding.

    Attributes:
        documents: index of each window's document.
        input_ids, labels: (windows, positions).
    """

    documents: list[int]
    input_ids: Tensor
    labels: Tensor


def split_windows(ids: list[int], context_length: int, stride: int) -> Iterator[tuple[list[int], list[int]]]:
    """One document (its EOS token last) as (input_ids, labels); label i is the token after input i, or IGNORED.

    The EOS token is moved to the front, as in training, where it precedes each document; every other token is a label
    exactly once.
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


def window_batches(
    documents: Iterable[list[int]], context_length: int, stride: int, batch_size: int
) -> Iterator[Batch]:
    """All windows of all documents, in their order."""
    windows = _all_windows(documents, context_length, stride)
    while batch := list(islice(windows, batch_size)):
        indices, input_ids, labels = zip(*batch, strict=True)
        longest = max(map(len, input_ids))
        yield Batch(list(indices), _padded(input_ids, longest, 0), _padded(labels, longest, IGNORED))


def _padded(rows: Sequence[list[int]], length: int, padding: int) -> Tensor:
    return torch.tensor([row + [padding] * (length - len(row)) for row in rows])


def _all_windows(
    documents: Iterable[list[int]], context_length: int, stride: int
) -> Iterator[tuple[int, list[int], list[int]]]:
    for index, ids in enumerate(documents):
        for input_ids, labels in split_windows(ids, context_length, stride):
            yield index, input_ids, labels
