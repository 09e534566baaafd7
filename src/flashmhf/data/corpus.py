"""Reading the documents of a SOURCE, and holding some out for validation."""

import logging
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset

from flashmhf.data.cache import cached, forget
from flashmhf.data.corrupt_records import REFUSE, SKIP, UNREADABLE, CorruptRecords, naming
from flashmhf.data.files import PART_BYTES, ROW, read_rows
from flashmhf.data.fingerprints import content_key, short_hash, stamps, stream_key, text_hash, texts_key
from flashmhf.data.hub import hub_rows, hub_splits
from flashmhf.data.listing import OTHER_SPLIT, Listing, list_files
from flashmhf.data.workers import count_rows, count_workers, rows_at_once
from flashmhf.errors import InputError

logger = logging.getLogger(__name__)

STDLIB = "stdlib"
VALIDATION_NAMES = ("validation", "valid", "val", "dev")
TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("test", "testing")  # not read
SHARD = re.compile(r"-\d+-of-\d+$")  # at the end of the names of a split's files on the Hub
HOLD_OUT = 20  # one document in this many is held out, by a hash of its text, or the last 20th of each
STREAMED_HOLD_OUT = 100  # at most, from a stream
STDLIB_EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"}
READ_ATTEMPTS = 3
DOCUMENT = ["text", "origin"]


@dataclass(frozen=True)
class Corpus:
    """Documents for training and for validation: datasets with the columns "text" and "origin" (a file, a line).

    Attributes:
        fingerprint: a hash of what is read, wherever it lies: of files their names in the folder and their contents;
            of a stream of files the size and beginning of each; of a dataset on the Hub its version and subset, of a
            stream from the Hub the documents that are held out.
        files: one line on what was read and what was passed over.
    """

    train: Dataset | IterableDataset
    validation: Dataset
    description: str
    bad_data: CorruptRecords
    fingerprint: str
    files: str


@dataclass(frozen=True)
class _Rows:
    """What a source holds, before corrupt records are taken out; no key for a stream from the Hub."""

    train: Dataset | IterableDataset
    validation: Dataset | IterableDataset | None
    key: str | None
    files: str


def load_corpus(source: str, *, text_column: str = "text", streaming: bool = False, bad_data: str = REFUSE) -> Corpus:
    """Reads SOURCE and holds out validation documents.

    If a folder or dataset has a validation split, that is used: files or folders named train and validation (valid,
    val, dev). Otherwise 1/20 of the documents is held out, at least one, chosen by a hash of the text, so that a
    document stays in its split when others are added or removed. With fewer than 20 documents, the last 1/20 of each
    is held out.

    Args:
        source: see `flashmhf.data`.
        text_column: the column of .jsonl, .parquet or a Hub dataset that holds the text.
        streaming: read a Hub dataset or files as they are needed instead of copying them to the cache first.
        bad_data: `refuse` raises at a corrupt record; `skip` leaves it out. Both count empty documents.

    Raises:
        InputError: there is no such source, or it holds no usable text; names the file.
    """
    bad = CorruptRecords(bad_data)
    if source == STDLIB:
        bad.policy = SKIP  # the user cannot fix it
        rows, where = _read_stdlib(streaming), f"standard library in {sysconfig.get_path('stdlib')}"
    elif Path(source).exists():
        rows, where = _read_path(Path(source), text_column, streaming, bad), source
    else:
        rows, where = _read_hub(source, text_column, streaming), f"{source} on the Hub"
    train = keep_documents(rows.train, source, bad)
    validation = None if rows.validation is None else keep_documents(rows.validation, source, bad)
    if validation is None:
        with naming(source):
            train, validation = _hold_out(train)
    assert isinstance(validation, Dataset)
    description = f"{where}: {_describe(train)} for training, {_describe(validation)} for validation"
    key = rows.key or texts_key(_texts(validation))
    logger.info("data: %s", description)
    if bad.counts:
        logger.warning("data: %s", bad.summary())
    return Corpus(train, validation, description, bad, key, rows.files)


def _read_stdlib(streaming: bool) -> _Rows:
    root = Path(sysconfig.get_path("stdlib"))
    files = (p for p in sorted(root.rglob("*.py")) if STDLIB_EXCLUDED.isdisjoint(p.relative_to(root).parts))
    listing = Listing(root, [p for p in files if p.stat().st_size > 0])
    train, key = read_files(listing.files, root, STDLIB, "text", streaming)
    return _Rows(train, None, key, log_files(listing))


def _read_path(path: Path, text_column: str, streaming: bool, bad: CorruptRecords) -> _Rows:
    listing = find_files(path, bad)
    validation_files = [p for p in listing.files if has_name(p, path, VALIDATION_NAMES)]
    test_files = {p for p in listing.files if has_name(p, path, TEST_NAMES)} - {*validation_files}
    train_files = [p for p in listing.files if p not in test_files and p not in validation_files]
    if train_files:
        listing.leave_out(test_files, OTHER_SPLIT)
    else:
        train_files, validation_files = listing.files, []
    files = log_files(listing)
    train, key = read_files(train_files, path, str(path), text_column, streaming)
    if not validation_files:
        return _Rows(train, None, key, files)
    validation, validation_key = read_files(validation_files, path, str(path), text_column, False)
    return _Rows(train, validation, f"{key}-{validation_key}", files)


def find_files(path: Path, bad: CorruptRecords) -> Listing:
    """The files below `path`; a folder that cannot be listed is a corrupt record."""
    listing = list_files(path)
    for message in listing.unreadable:
        bad.add(UNREADABLE, message)
    return listing


def log_files(listing: Listing) -> str:
    """Logs what is read and what is passed over, a line for each; returns both."""
    megabytes = sum(size for _, size in stamps(listing.files)) / 1e6
    read = f"{len(listing.files):,} file{'' if len(listing.files) == 1 else 's'}, {megabytes:,.1f} MB"
    passed_over = listing.passed_over_summary()
    logger.info("data: reading %s in %s", read, listing.root)
    if passed_over:
        logger.warning("data: %s in %s", passed_over, listing.root)
    return f"read {read}" + (f"; {passed_over}" if passed_over else "")


def read_files(
    files: list[Path], root: Path, where: str, text_column: str, streaming: bool
) -> tuple[Dataset | IterableDataset, str]:
    """Rows of `read_rows`, from a cache keyed by the files' contents, and a hash of these."""
    arguments = {"files": [str(p) for p in files], "text_column": text_column}
    if streaming:
        return IterableDataset.from_generator(read_rows, features=ROW, gen_kwargs=arguments), stream_key(files, root)
    for _ in range(READ_ATTEMPTS):
        before = stamps(files)
        content = content_key(files, root)
        rows = cached(short_hash("rows", content, where, text_column, list(ROW)), partial(_build_rows, arguments))
        if stamps(files) == before:
            return rows, content
        forget(rows)  # keyed by what was there before
    raise InputError(f"data: expected files that do not change while they are read, got changing ones in {where}")


def _build_rows(arguments: dict[str, Any], folder: Path) -> Dataset:
    sizes = [size for _, size in stamps(map(Path, arguments["files"]))]
    workers = count_workers(sum(sizes), len(sizes))
    return Dataset.from_generator(
        read_rows,
        features=ROW,
        cache_dir=str(folder),
        gen_kwargs=arguments,
        num_proc=workers if workers > 1 else None,
        fingerprint=folder.name,
        writer_batch_size=count_rows(min(max(sizes), PART_BYTES)),
    )


def _read_hub(source: str, text_column: str, streaming: bool) -> _Rows:
    splits = hub_splits(source, streaming)
    train_split = next((s for s in TRAIN_NAMES if s in splits), None) or next(iter(splits))
    validation_split = next((s for s in VALIDATION_NAMES if s in splits and s != train_split), None)
    train = hub_rows(splits[train_split], source, text_column)
    key = splits[train_split]._fingerprint if isinstance(splits[train_split], Dataset) else None
    left = [name for name in splits if name not in (train_split, validation_split)]
    files = f"read split {train_split}" + (f"; passed over {', '.join(left)}" if left else "")
    logger.info("data: %s of %s", files, source)
    if validation_split is None:
        return _Rows(train, None, key, files)
    validation = splits[validation_split]
    if isinstance(validation, IterableDataset):
        with naming(source):
            validation = Dataset.from_list(list(validation.take(STREAMED_HOLD_OUT)))
    return _Rows(train, hub_rows(validation, source, text_column), key, files)


def keep_documents(rows: Dataset | IterableDataset, where: str, bad: CorruptRecords) -> Dataset | IterableDataset:
    """The rows that are documents; corrupt records are counted or refused."""
    if isinstance(rows, IterableDataset):

        def is_document(one: dict[str, str]) -> bool:
            if one["corrupt"]:
                bad.add(one["corrupt"], one["message"])
            return not one["corrupt"]

        return rows.filter(is_document).select_columns(DOCUMENT)
    corrupt = np.asarray(rows.with_format("numpy")["corrupt"])
    for index in np.flatnonzero(corrupt != ""):
        bad.add(corrupt[index], rows[int(index)]["message"])
    kept = np.flatnonzero(corrupt == "")
    if len(kept) == 0:
        raise InputError(f"data: expected some text, got none in {where} ({bad.summary() or 'no documents'})")
    documents = rows if len(kept) == len(rows) else rows.select(kept)
    return documents.select_columns(DOCUMENT)


def is_held_out(text: str) -> bool:
    """Whether a document is for validation: 1 in 20 is, whatever the others are."""
    return text_hash(text) % HOLD_OUT == 0


def _hold_out(documents: Dataset | IterableDataset) -> tuple[Dataset | IterableDataset, Dataset]:
    if isinstance(documents, IterableDataset):
        held_out = list(islice((one for one in documents if is_held_out(one["text"])), STREAMED_HOLD_OUT))
        if not held_out:
            raise InputError(
                "data: expected a stream with enough documents to hold some out, got too few; leave out --streaming"
            )
        return documents.filter(lambda one: not is_held_out(one["text"])), Dataset.from_list(held_out)
    if len(documents) < HOLD_OUT:
        return _split_each(documents)
    hashes = np.array([text_hash(text) for text in _texts(documents)], dtype=np.uint64)
    chosen = hashes % HOLD_OUT == 0
    if not chosen.any():
        chosen[hashes.argmin()] = True
    if chosen.all():
        raise InputError("data: expected documents that differ, got the same one throughout")
    return documents.select(np.flatnonzero(~chosen)), documents.select(np.flatnonzero(chosen))


def _split_each(documents: Dataset) -> tuple[Dataset, Dataset]:
    """The first 19/20 of each document, and the rest."""

    def cut(batch: dict[str, list[str]], front: bool) -> dict[str, list[str]]:
        (text,), (origin,) = batch["text"], batch["origin"]
        at = len(text) - len(text) // HOLD_OUT
        part = text[:at] if front else text[at:]
        return {"text": [part] if part else [], "origin": [origin] if part else []}

    def build(front: bool, folder: Path) -> Dataset:
        file = str(folder / "part.arrow")
        options = {"batched": True, "batch_size": 1, "cache_file_name": file, "load_from_cache_file": False}
        return documents.map(cut, fn_kwargs={"front": front}, **options)

    front, back = (
        cached(short_hash("part", documents._fingerprint, which), partial(build, which)) for which in (True, False)
    )
    if len(back) == 0:
        count = sum(map(len, documents["text"]))
        raise InputError(f"data: expected enough text to hold some out for validation, got {count} characters")
    return front, back


def _describe(documents: Dataset | IterableDataset) -> str:
    if isinstance(documents, IterableDataset):
        return "a stream of documents"
    megabytes = sum(len(text.encode()) for text in _texts(documents)) / 1e6
    return f"{len(documents):,} documents, {megabytes:,.1f} MB"


def _texts(documents: Dataset) -> Iterator[str]:
    for batch in documents.iter(rows_at_once(documents)):
        yield from batch["text"]


def has_name(path: Path, root: Path, names: tuple[str, ...]) -> bool:
    """Whether a file below `root`, or a folder it is in, has one of the names, as train.txt and test/a.txt have."""
    if path == root:
        return False
    *folders, file_name = map(str.lower, path.relative_to(root).parts)
    return any(folder in names for folder in folders) or SHARD.sub("", file_name.split(".")[0]) in names
