"""Reading the documents of a SOURCE, and holding some out for validation."""

import hashlib
import logging
import re
import shutil
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
from datasets import Dataset, IterableDataset

from flashmhf.data.corrupt_records import REFUSE, SKIP, CorruptRecords
from flashmhf.data.files import PART_BYTES, content_key, document_row, list_files, missing_column, read_rows, stream_key
from flashmhf.data.workers import MAX_ROWS, count_rows, count_workers, rows_at_once
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
ROW = datasets.Features({name: datasets.Value("string") for name in ("text", "origin", "corrupt", "message")})
DOCUMENT = ["text", "origin"]


@dataclass(frozen=True)
class Corpus:
    """Documents for training and for validation: datasets with the columns "text" and "origin" (a file, a line).

    Attributes:
        fingerprint: a hash of what is read, wherever it lies: of files their names in the folder and their contents;
            of a stream of files the size and beginning of each; of a dataset on the Hub its version and subset, of a
            stream from the Hub the documents that are held out.
    """

    train: Dataset | IterableDataset
    validation: Dataset
    description: str
    bad_data: CorruptRecords
    fingerprint: str


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
        (train, key), validation = read_files(_stdlib_files(), _stdlib(), STDLIB, "text", streaming), None
        where = f"standard library in {sysconfig.get_path('stdlib')}"
    elif Path(source).exists():
        train, validation, key = _read_path(Path(source), text_column, streaming)
        where = source
    else:
        train, validation, key = _read_hub(source, text_column, streaming)
        where = f"{source} on the Hub"
    train = keep_documents(train, source, bad)
    validation = None if validation is None else keep_documents(validation, source, bad)
    if validation is None:
        train, validation = _hold_out(train)
    description = f"{where}: {_describe(train)} for training, {_describe(validation)} for validation"
    corpus = Corpus(train, validation, description, bad, key or _texts_key(validation))
    logger.info("data: %s", corpus.description)
    if bad.counts:
        logger.warning("data: %s", bad.summary())
    return corpus


def _stdlib() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _stdlib_files() -> list[Path]:
    root = _stdlib()
    files = (p for p in sorted(root.rglob("*.py")) if STDLIB_EXCLUDED.isdisjoint(p.relative_to(root).parts))
    return [p for p in files if p.stat().st_size > 0]


def _read_path(
    path: Path, text_column: str, streaming: bool
) -> tuple[Dataset | IterableDataset, Dataset | IterableDataset | None, str]:
    """Rows for training and for validation, and a hash of what was read."""
    known = list_files(path)
    validation_files = [p for p in known if has_name(p, path, VALIDATION_NAMES)]
    left_out = {*validation_files, *(p for p in known if has_name(p, path, TEST_NAMES))}
    train_files = [p for p in known if p not in left_out]
    if not train_files:
        train_files, validation_files = known, []
    train, key = read_files(train_files, path, str(path), text_column, streaming)
    if not validation_files:
        return train, None, key
    validation, validation_key = read_files(validation_files, path, str(path), text_column, False)
    return train, validation, f"{key}-{validation_key}"


def read_files(
    files: list[Path], root: Path, where: str, text_column: str, streaming: bool
) -> tuple[Dataset | IterableDataset, str]:
    """Rows of `read_rows`, from a cache keyed by the files' contents, and a hash of these."""
    arguments = {"files": [str(p) for p in files], "text_column": text_column}
    if streaming:
        return IterableDataset.from_generator(read_rows, features=ROW, gen_kwargs=arguments), stream_key(files, root)
    num_bytes = sum(stamp[1] for stamp in _stamps(files))
    workers = count_workers(num_bytes, len(files))
    for _ in range(READ_ATTEMPTS):
        before = _stamps(files)
        content = content_key(files, root)
        key = hashlib.blake2b(f"{content} {where} {text_column} {list(ROW)}".encode(), digest_size=16).hexdigest()
        rows = Dataset.from_generator(
            read_rows,
            features=ROW,
            cache_dir=str(datasets.config.HF_DATASETS_CACHE),
            gen_kwargs=arguments,
            num_proc=workers if workers > 1 else None,
            fingerprint=key,
            writer_batch_size=count_rows(min(max(size for _, size in before), PART_BYTES)),
        )
        if _stamps(files) == before:
            return rows, content
        shutil.rmtree(Path(rows.cache_files[0]["filename"]).parent)  # keyed by what was there before
    raise InputError(f"data: expected files that do not change while they are read, got changing ones in {where}")


def _stamps(files: list[Path]) -> list[tuple[int, int]]:
    """Modification time and size of each file; zeros for a missing one."""
    stamps = []
    for path in files:
        try:
            stat = path.stat()
            stamps.append((stat.st_mtime_ns, stat.st_size))
        except OSError:
            stamps.append((0, 0))
    return stamps


def _read_hub(
    source: str, text_column: str, streaming: bool
) -> tuple[Dataset | IterableDataset, Dataset | IterableDataset | None, str | None]:
    """Like `_read_path`; no hash for a stream."""
    splits = hub_splits(source, streaming)
    train_split = next((s for s in TRAIN_NAMES if s in splits), None) or next(iter(splits))
    validation_split = next((s for s in VALIDATION_NAMES if s in splits and s != train_split), None)
    train = hub_rows(splits[train_split], source, text_column)
    key = splits[train_split]._fingerprint if isinstance(splits[train_split], Dataset) else None
    if validation_split is None:
        return train, None, key
    validation = splits[validation_split]
    if isinstance(validation, IterableDataset):
        validation = Dataset.from_list(list(validation.take(STREAMED_HOLD_OUT)))
    return train, hub_rows(validation, source, text_column), key


def hub_splits(source: str, streaming: bool) -> datasets.DatasetDict | datasets.IterableDatasetDict:
    """Every split of a dataset on the Hub, `owner/name` or `owner/name:subset`; of a stream, nothing is read yet."""
    name, _, subset = source.partition(":")
    try:
        return datasets.load_dataset(name, subset or None, streaming=streaming)
    except Exception as error:  # the Hub client raises a dozen unrelated types
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if "scripts are no longer supported" in reason:
            reason += "; use a copy in parquet"
        raise InputError(
            f"data: expected stdlib, a file, a folder or a dataset on the Hub, got {source!r} ({reason})"
        ) from error


def hub_rows(documents: Dataset | IterableDataset, where: str, text_column: str) -> Dataset | IterableDataset:
    """A dataset's text column as rows of `read_rows`."""
    columns = documents.column_names
    if columns is None:  # a stream that does not know its columns until it is read
        columns = list(next(iter(documents), {}))
    if text_column not in columns:
        raise InputError(missing_column(columns, where, text_column))

    def rows(batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        made = [
            document_row(text, f"{where}, row {index + 1}")
            for index, text in zip(indices, batch[text_column], strict=True)
        ]
        return {name: [one[name] for one in made] for name in ROW}

    options = {"batched": True, "batch_size": MAX_ROWS, "with_indices": True, "remove_columns": columns}
    return documents.map(rows, features=ROW, **options)


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


def text_hash(text: str) -> int:
    """64 bits of a hash that is the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest())


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

    options = {"batched": True, "batch_size": 1}
    front, back = (documents.map(cut, fn_kwargs={"front": which}, **options) for which in (True, False))
    if len(back) == 0:
        count = sum(map(len, documents["text"]))
        raise InputError(f"data: expected enough text to hold some out for validation, got {count} characters")
    return front, back


def _texts_key(documents: Dataset) -> str:
    total = hashlib.blake2b(digest_size=16)
    for text in _texts(documents):
        total.update(text_hash(text).to_bytes(8))
    return total.hexdigest()


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
    *folders, file_name = path.relative_to(root).parts
    return any(folder in names for folder in folders) or SHARD.sub("", file_name.split(".")[0]) in names
