"""The order of the blocks: a function only of the seed, the epoch and the weights of the sources."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from flashmhf.data.blocks import TokenBlocks

NAMED = 3  # documents per block in a message


class ShuffledBlocks(torch.utils.data.Dataset):
    """Blocks of one or more sources, in another order every epoch.

    An epoch lasts until every source has been read completely; shorter ones repeat until then. Item i is the same on
    every rank and in a resumed run, whatever a sequential sampler skips or leaves to other ranks, so that the blocks
    used of each source can be counted afterwards.

    Items are those of `TokenBlocks` and "block", the block's number, which is the same in every epoch.

    Args:
        sources: none of them empty.
        weights: positive shares of the blocks.
        seed: for the orders of all epochs.
        names: of the sources.
    """

    def __init__(
        self, sources: Sequence[TokenBlocks], weights: Sequence[float], seed: int, *, names: Sequence[str]
    ) -> None:
        shares = np.asarray(weights, dtype=np.float64) / sum(weights)
        total = max(len(blocks) / share for blocks, share in zip(sources, shares, strict=True))
        self._sources = list(sources)
        self._names = list(names)
        self._counts = np.array([max(len(b), round(total * s)) for b, s in zip(sources, shares, strict=True)])
        self._starts = np.cumsum([0, *self._counts])
        self._seed = seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # shared with workers that outlive an epoch
        self._order: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        place = int(self._order_of(int(self._epoch))[index])
        source, number = self._find(place)
        return {**self._sources[source][number], "block": torch.tensor(place)}

    def describe(self, block: int) -> str:
        """The documents in a block, such as `1-2 of SOURCE (a.txt, b.txt)`, the first few by name.

        Documents are numbered from 0, as in `load_corpus(SOURCE).train`.
        """
        source, number = self._find(block)
        blocks = self._sources[source]
        documents = blocks.documents(number)
        first, last = documents[0], documents[-1]
        text = f"{first} of {self._names[source]}" if first == last else f"{first}-{last} of {self._names[source]}"
        if blocks.origins is None:
            return text
        more = f" and {len(documents) - NAMED} more" if len(documents) > NAMED else ""
        return f"{text} ({', '.join(blocks.origins[one] for one in documents[:NAMED])}{more})"

    def set_epoch(self, epoch: int) -> None:
        """accelerate calls this at the start of an epoch."""
        self._epoch.fill_(epoch)

    def count_used(self, num_blocks: int) -> list[int]:
        """How many of the first `num_blocks` blocks of training come from each source."""
        epochs, rest = divmod(num_blocks, len(self))
        places = self._order_of(epochs)[:rest]
        partial = np.bincount(np.searchsorted(self._starts, places, side="right") - 1, minlength=len(self._sources))
        return (self._counts * epochs + partial).tolist()

    def _find(self, block: int) -> tuple[int, int]:
        """The source of a block, and the block's number in it; a source shorter than its share repeats."""
        source = int(np.searchsorted(self._starts, block, side="right")) - 1
        return source, (block - int(self._starts[source])) % len(self._sources[source])

    def _order_of(self, epoch: int) -> np.ndarray:
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self._seed, epoch]).permutation(len(self))
        return self._order[1]


def weighted_turns(weights: Sequence[float]) -> Iterator[int]:
    """Indices of sources, endlessly: always the one that is furthest behind its share."""
    shares = np.asarray(weights, dtype=np.float64) / sum(weights)
    behind = np.zeros(len(shares))
    while True:
        behind += shares
        turn = int(behind.argmax())
        behind[turn] -= 1
        yield turn


def count_turns(weights: Sequence[float], num_blocks: int) -> list[int]:
    """How many of the first `num_blocks` turns each source has."""
    counts = [0] * len(weights)
    for _, turn in zip(range(num_blocks), weighted_turns(weights), strict=False):
        counts[turn] += 1
    return counts
