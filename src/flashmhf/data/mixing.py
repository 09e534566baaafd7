"""The blocks that a training run reads: of one source, or of several by weight."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import ConcatDataset, Subset
from transformers import PreTrainedTokenizerBase

from flashmhf.data.blocks import TokenBlocks, iterate_blocks
from flashmhf.data.config import DataConfig, parse_sources
from flashmhf.data.corpus import Corpus, load_corpus
from flashmhf.data.corrupt_records import CorruptRecords
from flashmhf.data.shuffling import ShuffledBlocks, count_turns, weighted_turns
from flashmhf.data.tokens import tokenize
from flashmhf.errors import InputError


@dataclass(frozen=True)
class TrainingData:
    """Blocks for training and validation, from one or more sources.

    Attributes:
        bytes_per_token: of the validation blocks.
        fingerprints: of the sources, see `Corpus`.
        files: one line for each source, see `Corpus`.
    """

    train: ShuffledBlocks | IterableDataset
    validation: torch.utils.data.Dataset
    bytes_per_token: float
    sources: tuple[str, ...]
    weights: tuple[float, ...]
    block_length: int
    bad_data: tuple[CorruptRecords, ...]
    fingerprints: tuple[str, ...]
    files: tuple[str, ...]

    def tokens_used(self, tokens: int) -> dict[str, int]:
        """How many of the first `tokens` tokens of training come from each source."""
        num_blocks = tokens // self.block_length
        if isinstance(self.train, ShuffledBlocks):
            counts = self.train.count_used(num_blocks)
        else:
            counts = count_turns(self.weights, num_blocks)
        used = dict.fromkeys(self.sources, 0)
        for source, count in zip(self.sources, counts, strict=True):
            used[source] += count * self.block_length
        return used

    def read_summary(self) -> str:
        """One line on what was read and what was passed over."""
        return "; ".join(f"{source}: {files}" for source, files in zip(self.sources, self.files, strict=True))

    def bad_summary(self) -> str:
        """One line on corrupt records that were skipped; empty if none were."""
        return "; ".join(bad.summary() for bad in self.bad_data if bad.counts)


def load_blocks(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int = 0, corpora: Sequence[Corpus] | None = None
) -> TrainingData:
    """Reads and tokenizes every source; `seed` gives the order of the blocks.

    Args:
        config: what is read.
        tokenizer: the model's.
        seed: of the order.
        corpora: the sources, if they are loaded already.

    Raises:
        InputError: a source, a weight or the amount of text does not fit.
    """
    weights, sources = zip(*parse_sources(config.source), strict=True)
    if corpora is None:
        corpora = [
            load_corpus(source, text_column=config.text_column, streaming=config.streaming, bad_data=config.bad_data)
            for source in sources
        ]
    validation, bytes_per_token = _validation(corpora, weights, tokenizer, config)
    train: ShuffledBlocks | IterableDataset
    if config.streaming:
        streams = [partial(_stream, corpus.train, tokenizer, config, seed) for corpus in corpora]
        train = IterableDataset.from_generator(partial(_interleave, streams, weights))
    else:
        blocks = [_blocks(corpus.train, tokenize(corpus.train, tokenizer), tokenizer, config) for corpus in corpora]
        train = ShuffledBlocks(blocks, weights, seed, names=sources)
    return TrainingData(
        train,
        validation,
        bytes_per_token,
        sources,
        weights,
        config.context_length,
        tuple(corpus.bad_data for corpus in corpora),
        tuple(corpus.fingerprint for corpus in corpora),
        tuple(corpus.files for corpus in corpora),
    )


def _blocks(
    documents: Dataset, tokens: Dataset, tokenizer: PreTrainedTokenizerBase, config: DataConfig, role: str = "training"
) -> TokenBlocks:
    mask_eos_id = tokenizer.eos_token_id if config.document_mask else None
    blocks = TokenBlocks(tokens, config.context_length, mask_eos_id, origins=documents["origin"])
    if len(blocks) == 0:
        raise InputError(f"data: expected at least {config.context_length} tokens for {role}, got fewer")
    return blocks


def _validation(
    corpora: Sequence[Corpus], weights: Sequence[float], tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> tuple[torch.utils.data.Dataset, float]:
    """The first held-out blocks of each source, by weight, and their bytes/token."""
    parts: list[torch.utils.data.Dataset] = []
    num_blocks, num_bytes = 0, 0.0
    for corpus, weight in zip(corpora, weights, strict=True):
        tokens = tokenize(corpus.validation, tokenizer)
        blocks = _blocks(corpus.validation, tokens, tokenizer, config, "validation")
        most = max(int(config.validation_tokens * weight / sum(weights)) // config.context_length, 1)
        taken = min(most, len(blocks))
        parts.append(Subset(blocks, range(taken)))
        num_blocks += taken
        num_bytes += taken * sum(tokens["bytes"]) / blocks.stream_length
    return (parts[0] if len(parts) == 1 else ConcatDataset(parts)), num_bytes / num_blocks


def _stream(
    documents: IterableDataset, tokenizer: PreTrainedTokenizerBase, config: DataConfig, seed: int
) -> Iterator[dict]:
    return iterate_blocks(documents, tokenizer, config.context_length, document_mask=config.document_mask, seed=seed)


def _interleave(streams: list, weights: Sequence[float]) -> Iterator[dict]:
    running = [stream() for stream in streams]
    for turn in weighted_turns(weights):
        yield next(running[turn])
