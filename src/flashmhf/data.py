"""From a SOURCE of text to blocks of tokens: documents, tokens, fixed blocks with separators between documents.

A SOURCE is `stdlib` (the Python standard library of this machine), a file or folder of .txt, .jsonl or .parquet
(compressed too), or the id of a dataset on the Hub, `owner/name` or `owner/name:subset`.
"""

import logging
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from flashmhf.errors import InputError
from flashmhf.tokenization import encode_documents

logger = logging.getLogger(__name__)

STDLIB = "stdlib"
FORMATS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
VALIDATION_NAMES = ("validation", "valid", "val", "dev")
TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("test", "testing")  # left alone
HOLD_OUT = 20  # every 20th document, or the last 20th of each, is held out for validation
STREAMED_HOLD_OUT = 100  # documents from the front of a stream
STDLIB_EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"}
SNIFF_BYTES = 8192


@dataclass(frozen=True)
class Corpus:
    """Documents for training and for validation, each a dataset with the column "text", and what was read."""

    train: Dataset | IterableDataset
    validation: Dataset
    description: str


def load_corpus(source: str, *, text_column: str = "text", streaming: bool = False) -> Corpus:
    """Reads SOURCE and holds out validation documents.

    A folder's or dataset's own validation split is used where there is one: files in a folder, or with a name, called
    train and validation (valid, val, dev). Otherwise every 20th document is held out; of fewer than 20 documents, the
    last 20th of each.

    Args:
        source: see this module.
        text_column: the column of .jsonl, .parquet or a Hub dataset that holds the text.
        streaming: read a Hub dataset or files as they are needed instead of first copying them to the cache.

    Raises:
        InputError: there is no such source, or it holds no usable text; names the file.
    """
    if source == STDLIB:
        train, validation = _read_stdlib(), None
        where = f"standard library in {sysconfig.get_path('stdlib')}"
    elif Path(source).exists():
        train, validation = _read_path(Path(source), text_column, streaming)
        where = source
    else:
        train, validation = _read_hub(source, text_column, streaming)
        where = f"{source} on the Hub"
    if validation is None:
        train, validation = _hold_out(train)
    corpus = Corpus(
        train, validation, f"{where}: {_describe(train)} for training, {_describe(validation)} for validation"
    )
    logger.info("data: %s", corpus.description)
    return corpus


class TokenBlocks(torch.utils.data.Dataset):
    """Documents as one stream of tokens, cut into blocks of `block_length`; what is left at the end is dropped.

    The tokens stay in the memory-mapped Arrow files of the tokenised dataset; a block is copied when it is asked for.
    Items are {"input_ids", "labels"}, int64 of shape (block_length,); the models shift the labels themselves.
    """

    def __init__(self, tokens: Dataset, block_length: int) -> None:
        column = tokens.with_format("arrow").data.column("input_ids")
        self._pieces = [chunk.flatten().to_numpy(zero_copy_only=True) for chunk in column.chunks]
        self._ends = np.cumsum([0, *(len(piece) for piece in self._pieces)])
        self.block_length = block_length

    def __len__(self) -> int:
        return int(self._ends[-1]) // self.block_length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"index: expected 0 to {len(self) - 1}, got {index}")
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
        return {"input_ids": input_ids, "labels": input_ids.clone()}

    @property
    def num_tokens(self) -> int:
        """Tokens in all blocks."""
        return len(self) * self.block_length


def tokenize(documents: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Replaces the text by the columns "input_ids" (the separator at the end included) and "bytes" (of the text)."""

    def encode(batch: dict[str, list[str]]) -> dict[str, list]:
        texts = batch["text"]
        return {"input_ids": encode_documents(tokenizer, texts), "bytes": [len(text.encode()) for text in texts]}

    features = datasets.Features(
        {"input_ids": datasets.List(datasets.Value("int32")), "bytes": datasets.Value("int64")}
    )
    return documents.map(
        encode, batched=True, batch_size=64, remove_columns=documents.column_names, features=features, desc="tokenizing"
    )


def stream_blocks(documents: IterableDataset, tokenizer: PreTrainedTokenizerBase, block_length: int) -> IterableDataset:
    """The same blocks as `TokenBlocks`, from a stream of documents."""

    def blocks() -> Iterator[dict[str, list[int]]]:
        rest = np.empty(0, dtype=np.int32)
        for document in documents:
            rest = np.concatenate([rest, *encode_documents(tokenizer, [document["text"]])])
            whole = len(rest) // block_length * block_length
            for start in range(0, whole, block_length):
                block = rest[start : start + block_length].tolist()
                yield {"input_ids": block, "labels": block}
            rest = rest[whole:]

    return IterableDataset.from_generator(blocks)


def _read_stdlib() -> Dataset:
    root = Path(sysconfig.get_path("stdlib"))
    texts = []
    for path in sorted(root.rglob("*.py")):
        if STDLIB_EXCLUDED.isdisjoint(path.relative_to(root).parts):
            try:
                texts.append(path.read_text(encoding="utf-8"))
            except (UnicodeDecodeError, OSError) as error:
                logger.info("stdlib: %s passed over: %s", path, error)
    return _non_empty(Dataset.from_dict({"text": texts}), STDLIB)


def _read_path(path: Path, text_column: str, streaming: bool) -> tuple[Dataset | IterableDataset, Dataset | None]:
    files = (
        sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith(".")) if path.is_dir() else [path]
    )
    known = [p for p in files if _format(p) is not None]
    if not known:
        formats = ", ".join(FORMATS)
        raise InputError(
            f"data: expected {formats} files (also {', '.join(COMPRESSIONS)}), got {path} with none of them"
        )
    for p in known:
        _check_readable(p)
    validation_files = [p for p in known if _is_called(p, path, VALIDATION_NAMES)]
    left_out = {*validation_files, *(p for p in known if _is_called(p, path, TEST_NAMES))}
    train_files = [p for p in known if p not in left_out]
    if not train_files:
        train_files, validation_files = known, []
    train = _read_files(train_files, text_column, streaming)
    validation = _read_files(validation_files, text_column, False) if validation_files else None
    return train, validation


def _read_files(files: list[Path], text_column: str, streaming: bool) -> Dataset | IterableDataset:
    parts = []
    for kind in sorted({_format(p) or "" for p in files}):
        options = {"sample_by": "document"} if kind == "text" else {}
        paths = [str(p) for p in files if _format(p) == kind]
        try:
            part = datasets.load_dataset(kind, data_files=paths, split="train", streaming=streaming, **options)
            parts.append(_text_only(part, text_column, paths[0]))
        except (datasets.exceptions.DatasetGenerationError, UnicodeDecodeError) as error:
            raise InputError(_diagnose(paths, error)) from error
    if len(parts) > 1:
        whole = datasets.concatenate_datasets(parts)
    else:
        (whole,) = parts
    return _non_empty(whole, str(files[0].parent if len(files) > 1 else files[0]))


def _read_hub(source: str, text_column: str, streaming: bool) -> tuple[Dataset | IterableDataset, Dataset | None]:
    name, _, subset = source.partition(":")
    try:
        splits = datasets.load_dataset(name, subset or None, streaming=streaming)
    except Exception as error:  # the Hub client raises a dozen unrelated types
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(
            f"data: expected stdlib, a file, a folder or a dataset on the Hub, got {source!r} ({reason})"
        ) from error
    by_role = {role: next((s for s in names if s in splits), None) for role, names in _split_names().items()}
    train_split = by_role["train"] or next(iter(splits))
    train = _text_only(splits[train_split], text_column, source)
    validation = None
    if by_role["validation"] not in (None, train_split):
        validation = _text_only(splits[by_role["validation"]], text_column, source)
        if isinstance(validation, IterableDataset):
            validation = _materialise(validation.take(STREAMED_HOLD_OUT))
    return _non_empty(train, source), validation


def _split_names() -> dict[str, tuple[str, ...]]:
    return {"train": TRAIN_NAMES, "validation": VALIDATION_NAMES}


def _hold_out(documents: Dataset | IterableDataset) -> tuple[Dataset | IterableDataset, Dataset]:
    if isinstance(documents, IterableDataset):
        return documents.skip(STREAMED_HOLD_OUT), _materialise(documents.take(STREAMED_HOLD_OUT))
    count = len(documents)
    if count >= HOLD_OUT:
        held_out = range(HOLD_OUT - 1, count, HOLD_OUT)
        kept = sorted(set(range(count)) - set(held_out))
        return documents.select(kept), documents.select(held_out)
    texts = documents["text"]
    cuts = [len(text) - len(text) // HOLD_OUT for text in texts]
    front = [text[:cut] for text, cut in zip(texts, cuts, strict=True)]
    back = [text[cut:] for text, cut in zip(texts, cuts, strict=True) if text[cut:]]
    if not back:
        raise InputError(
            f"data: expected enough text to hold some out for validation, got {sum(map(len, texts))} characters"
        )
    return Dataset.from_dict({"text": front}), Dataset.from_dict({"text": back})


def _text_only(documents: Dataset | IterableDataset, text_column: str, where: str) -> Dataset | IterableDataset:
    columns = documents.column_names
    if columns is None:  # a stream that does not know its columns until it is read
        columns = list(next(iter(documents), {}))
    if text_column not in columns:
        raise InputError(f"text-column: expected one of {', '.join(columns)} in {where}, got {text_column!r}")
    if text_column != "text":
        documents = documents.remove_columns([c for c in columns if c == "text"]).rename_column(text_column, "text")
        columns = ["text"]
    return documents.select_columns(["text"])


def _non_empty(documents: Dataset | IterableDataset, where: str) -> Dataset | IterableDataset:
    if isinstance(documents, IterableDataset):
        return documents.filter(lambda row: bool(row["text"] and row["text"].strip()))
    kept = documents.filter(
        lambda batch: [bool(text and text.strip()) for text in batch["text"]], batched=True, batch_size=64
    )
    if len(kept) == 0:
        raise InputError(f"data: expected some text, got none in {where} ({len(documents)} empty documents)")
    if len(kept) < len(documents):
        logger.info("data: %d empty documents passed over in %s", len(documents) - len(kept), where)
    return kept


def _materialise(documents: Iterable[dict]) -> Dataset:
    return Dataset.from_dict({"text": [document["text"] for document in documents]})


def _describe(documents: Dataset | IterableDataset) -> str:
    if isinstance(documents, IterableDataset):
        return "a stream of documents"
    megabytes = sum(len(text.encode()) for batch in documents.iter(64) for text in batch["text"]) / 1e6
    return f"{len(documents):,} documents, {megabytes:,.1f} MB"


def _format(path: Path) -> str | None:
    suffixes = [suffix for suffix in path.suffixes if suffix not in COMPRESSIONS]
    return FORMATS.get(suffixes[-1]) if suffixes else None


def _is_called(path: Path, root: Path, names: tuple[str, ...]) -> bool:
    if path == root:
        return False
    *folders, file_name = path.relative_to(root).parts
    return any(folder in names for folder in folders) or file_name.split(".")[0] in names


def _check_readable(path: Path) -> None:
    """Refuses what is clearly no text, before anything is written to a cache."""
    try:
        with path.open("rb") as file:
            head = file.read(SNIFF_BYTES)
    except OSError as error:
        raise InputError(f"data: expected a readable file, got {path} ({error.strerror})") from error
    if b"\0" in head and _format(path) != "parquet" and path.suffix not in COMPRESSIONS:
        raise InputError(f"data: expected text, got binary in {path}")


def _diagnose(paths: list[str], error: Exception) -> str:
    """One line on why files could not be read, with the file where that can be found out."""
    for path in paths:
        if Path(path).suffix not in COMPRESSIONS and _format(Path(path)) != "parquet":
            try:
                with open(path, encoding="utf-8") as file:
                    for _ in iter(lambda: file.read(2**20), ""):
                        pass
            except UnicodeDecodeError as decode_error:
                return f"data: expected UTF-8, got {path} with {decode_error.reason} at byte {decode_error.start}"
    cause = error.__cause__ or error
    return f"data: could not read {', '.join(paths[:3])}: {str(cause).splitlines()[0]}"
