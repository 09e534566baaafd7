"""Token ids as one stream, cut into blocks of a fixed length."""

from collections.abc import Callable, Iterator, Sequence
from itertools import count

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from flashmhf.data.corrupt_records import naming
from flashmhf.data.tokenizer import encode_documents
from flashmhf.errors import InputError

SHUFFLED_DOCUMENTS = 256  # a stream's shuffle buffer


class TokenBlocks(torch.utils.data.Dataset):
    """Documents as one stream of tokens, cut into blocks of `block_length`; an incomplete last block is dropped.

    The tokens stay in the memory-mapped Arrow files of the tokenized dataset; a block is copied when it is read. Items
    are {"input_ids", "labels"}, int64 of shape (block_length,); the models shift the labels themselves.

    Args:
        tokens: documents with "input_ids", each ending with an EOS token.
        block_length: tokens per block.
        mask_eos_id: the id of the EOS token: adds "position_ids" to the items, see `document_positions`.
        origins: where each document comes from, such as a file, in the order of `tokens`. Default: unknown.
    """

    def __init__(
        self,
        tokens: Dataset,
        block_length: int,
        mask_eos_id: int | None = None,
        *,
        origins: Sequence[str] | None = None,
    ) -> None:
        column = tokens.with_format("arrow").data.column("input_ids")
        self._pieces = [chunk.flatten().to_numpy(zero_copy_only=True) for chunk in column.chunks]
        self._ends = np.cumsum([0, *(len(piece) for piece in self._pieces)])
        self._offsets = [chunk.offsets.to_numpy(zero_copy_only=True) for chunk in column.chunks]
        self._first_documents = np.cumsum([0, *map(len, column.chunks)])
        self.block_length = block_length
        self.mask_eos_id = mask_eos_id
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
        if self.mask_eos_id is not None:
            item["position_ids"] = document_positions(input_ids, self.mask_eos_id)
        return item

    def documents(self, index: int) -> range:
        """Numbers of the documents that are in block `index`, completely or in part."""
        self._check(index)
        start = index * self.block_length
        return range(self._document_at(start), self._document_at(start + self.block_length - 1) + 1)

    def _document_at(self, position: int) -> int:
        piece = int(np.searchsorted(self._ends, position, side="right")) - 1
        offsets = self._offsets[piece]  # those of a slice start above 0
        within = position - self._ends[piece] + offsets[0]
        return int(self._first_documents[piece] + np.searchsorted(offsets, within, side="right")) - 1

    def _check(self, index: int) -> None:
        if not 0 <= index < len(self):
            raise IndexError(f"index: expected 0 to {len(self) - 1}, got {index}")

    @property
    def stream_length(self) -> int:
        """Tokens in all documents, including those that are dropped at the end."""
        return int(self._ends[-1])


def document_positions(input_ids: torch.Tensor, eos_id: int) -> torch.Tensor:
    """Positions, shape (L,), that restart at 0 at each EOS token, which thus begins the next document.

    transformers' models take positions that restart for packed sequences, and let no token attend to another sequence.
    The EOS token belongs to the next document, as in `flashmhf eval`: it predicts the first token.
    """
    position = torch.arange(len(input_ids))
    return position - torch.where(input_ids == eos_id, position, 0).cummax(0).values


def iterate_blocks(
    documents: IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    block_length: int,
    *,
    document_mask: bool = False,
    seed: int = 0,
) -> Iterator[dict[str, list[int]]]:
    """The blocks of `TokenBlocks` from a stream, endlessly: a stream that ends starts again in another order.

    The order of the files and, within `SHUFFLED_DOCUMENTS`, of the documents depends only on the seed and the pass.
    """

    def endless() -> Iterator[dict[str, str]]:
        for number in count():
            empty = True
            shuffled = documents.shuffle(np.random.default_rng([seed, number]), buffer_size=SHUFFLED_DOCUMENTS)
            with naming("a stream"):
                for document in shuffled:
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
        complete = len(rest) // block_length * block_length
        for start_of_block in range(0, complete, block_length):
            block = rest[start_of_block : start_of_block + block_length]
            item = {"input_ids": block.tolist(), "labels": block.tolist()}
            if document_mask:
                item["position_ids"] = document_positions(torch.from_numpy(block), tokenizer.eos_token_id).tolist()
            yield item
        rest = rest[complete:]
