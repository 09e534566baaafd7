"""Tokens as one stream, cut into blocks of a fixed length."""

from collections.abc import Callable, Iterator, Sequence
from itertools import count

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from flashmhf.data.tokenizer import encode_documents
from flashmhf.errors import InputError

SHUFFLED_DOCUMENTS = 256  # of a stream, held in memory


class TokenBlocks(torch.utils.data.Dataset):
    """Documents as one stream of tokens, cut into blocks of `block_length`; what is left at the end is dropped.

    The tokens stay in the memory-mapped Arrow files of the tokenised dataset; a block is copied when it is asked for.
    Items are {"input_ids", "labels"}, int64 of shape (block_length,); the models shift the labels themselves. With
    `separator`, the id of that token, also "position_ids", see `document_positions`.

    Args:
        origins: where each document comes from, a file for one, in the order of `tokens`. Default: not known.
    """

    def __init__(
        self,
        tokens: Dataset,
        block_length: int,
        separator: int | None = None,
        *,
        origins: Sequence[str] | None = None,
    ) -> None:
        column = tokens.with_format("arrow").data.column("input_ids")
        self._pieces = [chunk.flatten().to_numpy(zero_copy_only=True) for chunk in column.chunks]
        self._ends = np.cumsum([0, *(len(piece) for piece in self._pieces)])
        self._offsets = [chunk.offsets.to_numpy(zero_copy_only=True) for chunk in column.chunks]
        self._first_documents = np.cumsum([0, *map(len, column.chunks)])
        self.block_length = block_length
        self.separator = separator
        self.origins = origins

    def __len__(self) -> int:
        return self.stream_length // self.block_length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        self._check(index)
        block = np.empty(self.block_length, dtype=np.int64)
        position, filled = index * self.block_length, 0
        piece = int(np.searchsorted(self._ends, position, side="right")) - 1
        while filled < self.block_length:
            start = position + filled - self._ends[piece]
            part = self._pieces[piece][start : start + self.block_length - filled]
            block[filled : filled + len(part)] = part
            filled += len(part)
            piece += 1
        input_ids = torch.from_numpy(block)
        item = {"input_ids": input_ids, "labels": input_ids.clone()}
        if self.separator is not None:
            item["position_ids"] = document_positions(input_ids, self.separator)
        return item

    def documents(self, index: int) -> range:
        """Numbers of the documents that block `index` holds all or a part of."""
        self._check(index)
        start = index * self.block_length
        return range(self._document_at(start), self._document_at(start + self.block_length - 1) + 1)

    def _document_at(self, position: int) -> int:
        piece = int(np.searchsorted(self._ends, position, side="right")) - 1
        offsets = self._offsets[piece]  # of a slice they begin above 0
        within = position - self._ends[piece] + offsets[0]
        return int(self._first_documents[piece] + np.searchsorted(offsets, within, side="right")) - 1

    def _check(self, index: int) -> None:
        if not 0 <= index < len(self):
            raise IndexError(f"index: expected 0 to {len(self) - 1}, got {index}")

    @property
    def stream_length(self) -> int:
        """Tokens in all documents, those at the end that fill no block too."""
        return int(self._ends[-1])

    @property
    def num_tokens(self) -> int:
        """Tokens in all blocks."""
        return len(self) * self.block_length


def document_positions(input_ids: torch.Tensor, separator: int) -> torch.Tensor:
    """Positions, shape (L,), that begin anew at each separator, which so opens the document that follows it.

    transformers' models take positions that begin anew for sequences packed into one, and let no token attend to
    another sequence. The separator goes with what follows, as in `flashmhf eval`: it predicts the first token.
    """
    position = torch.arange(len(input_ids))
    return position - torch.where(input_ids == separator, position, 0).cummax(0).values


def iterate_blocks(
    documents: IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    block_length: int,
    *,
    document_mask: bool = False,
    seed: int = 0,
) -> Iterator[dict[str, list[int]]]:
    """The blocks of `TokenBlocks` from a stream, for ever: one that has ended starts again in another order.

    The order of the files and, within `SHUFFLED_DOCUMENTS`, of the documents depends on the seed and the pass alone.
    """

    def endless() -> Iterator[dict[str, str]]:
        for number in count():
            empty = True
            for document in documents.shuffle(np.random.default_rng([seed, number]), buffer_size=SHUFFLED_DOCUMENTS):
                empty = False
                yield document
            if empty:
                raise InputError("data: expected some text, got none in a stream")

    return _cut(endless, tokenizer, block_length, document_mask)


def _cut(
    start: Callable[[], Iterator[dict[str, str]]],
    tokenizer: PreTrainedTokenizerBase,
    block_length: int,
    document_mask: bool,
) -> Iterator[dict[str, list[int]]]:
    rest = np.empty(0, dtype=np.int32)
    for document in start():
        rest = np.concatenate([rest, *encode_documents(tokenizer, [document["text"]])])
        whole = len(rest) // block_length * block_length
        for begin in range(0, whole, block_length):
            block = rest[begin : begin + block_length]
            item = {"input_ids": block.tolist(), "labels": block.tolist()}
            if document_mask:
                item["position_ids"] = document_positions(torch.from_numpy(block), tokenizer.eos_token_id).tolist()
            yield item
        rest = rest[whole:]
