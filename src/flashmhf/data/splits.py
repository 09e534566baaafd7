"""One named split of a SOURCE, for evaluation; of a dataset on the Hub, only that split is downloaded."""

import logging
from pathlib import Path

import datasets
from datasets import Dataset, IterableDataset

from flashmhf.data.corpus import (
    STDLIB,
    TEST_NAMES,
    TRAIN_NAMES,
    VALIDATION_NAMES,
    find_files,
    has_name,
    keep_documents,
    load_corpus,
    log_files,
    read_files,
)
from flashmhf.data.corrupt_records import REFUSE, CorruptRecords, naming
from flashmhf.data.hub import hub_rows, hub_splits
from flashmhf.data.listing import OTHER_SPLIT
from flashmhf.errors import InputError

logger = logging.getLogger(__name__)

VALIDATION, TRAIN, ALL = "validation", "train", "all"


def load_documents(
    source: str, *, split: str = VALIDATION, text_column: str = "text", bad_data: str = REFUSE
) -> Dataset:
    """The documents of one split, with the columns "text" and "origin".

    Args:
        source: see `flashmhf.data`.
        split: `validation` or `train` as `load_corpus` splits the source, `all` for both, or another split of the
            source, such as `test`: on the Hub by that name, in a folder the files or folders of that name.
        text_column: see `load_corpus`.
        bad_data: see `load_corpus`.

    Raises:
        InputError: there is no such source or split, or it holds no usable text.
    """
    if split not in (TRAIN, ALL):
        rows, bad = None, CorruptRecords(bad_data)
        if source != STDLIB and Path(source).exists():
            rows = _folder_split(source, split, text_column, bad)
        elif source != STDLIB:
            rows = _hub_split(source, split, text_column)
        if rows is not None:
            return _documents(rows, source, bad)
        if split != VALIDATION:
            raise InputError(f"split: expected {VALIDATION}, {TRAIN} or {ALL}, got {split!r}, which {source} lacks")
    corpus = load_corpus(source, text_column=text_column, bad_data=bad_data)
    assert isinstance(corpus.train, Dataset)
    if split == VALIDATION:
        return corpus.validation
    return corpus.train if split == TRAIN else datasets.concatenate_datasets([corpus.train, corpus.validation])


def truncate_documents(documents: Dataset, most_bytes: int) -> Dataset:
    """The first bytes of each document as UTF-8, at most `most_bytes`, without cutting a character in two.

    Raises:
        InputError: fewer than one byte.
    """
    if most_bytes < 1:
        raise InputError(f"document-bytes: expected 1 or more, got {most_bytes}")
    texts = [text.encode()[:most_bytes].decode(errors="ignore") for text in documents["text"]]
    return documents.remove_columns("text").add_column("text", texts)


def _documents(rows: Dataset | IterableDataset, source: str, bad: CorruptRecords) -> Dataset:
    documents = keep_documents(rows, source, bad)
    assert isinstance(documents, Dataset)
    if bad.counts:
        logger.warning("data: %s", bad.summary())
    return documents


def _folder_split(source: str, split: str, text_column: str, bad: CorruptRecords) -> Dataset | IterableDataset | None:
    """None if `load_corpus` decides, or if no file has that name."""
    if split == VALIDATION:
        return None
    root = Path(source)
    listing = find_files(root, bad)
    listing.leave_out({file for file in listing.files if not has_name(file, root, _synonyms(split))}, OTHER_SPLIT)
    if not listing.files:
        return None
    log_files(listing)
    return read_files(listing.files, root, source, text_column, False)[0]


def _hub_split(source: str, split: str, text_column: str) -> Dataset | IterableDataset | None:
    """None if there is no validation split."""
    splits = hub_splits(source, streaming=not datasets.config.HF_HUB_OFFLINE)  # a stream reads only that split
    name = next((name for name in _synonyms(split) if name in splits), None)
    if name is None and split == VALIDATION:
        return None
    if name is None:
        raise InputError(
            f"split: expected {VALIDATION}, {TRAIN}, {ALL} or one of {', '.join(splits)} in {source}, got {split!r}"
        )
    rows = hub_rows(splits[name], source, text_column)
    if not isinstance(rows, IterableDataset):
        return rows
    with naming(source):
        return Dataset.from_list(list(rows))


def _synonyms(split: str) -> tuple[str, ...]:
    return next((names for names in (VALIDATION_NAMES, TRAIN_NAMES, TEST_NAMES) if split in names), (split,))
