"""Files of text as rows: one for each document, and one for each corrupt record."""

import codecs
import hashlib
import io
import json
import lzma
import os
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow
import pyarrow.parquet
from fsspec.compression import compr
from fsspec.utils import infer_compression

from flashmhf.data.corrupt_records import BINARY, BROKEN_LINE, EMPTY, ENCODING, NO_TEXT, UNREADABLE
from flashmhf.errors import InputError

FORMATS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
SNIFF_BYTES = 8192
PARQUET_ROWS = 256
READ_BYTES = 2**20
HEAD_BYTES = 2**16
PART_BYTES = 2**23  # longer text files become several documents, to bound memory
UNREADABLE_ERRORS = (OSError, EOFError, lzma.LZMAError, zlib.error, pyarrow.ArrowException)


def list_files(path: Path) -> list[Path]:
    """The files under `path` of a known format, or `path` itself, sorted by name.

    Raises:
        InputError: there are none.
    """
    files = [path]
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if not p.is_dir() and not p.name.startswith("."))
    known = [p for p in files if file_format(p) is not None]
    if not known:
        raise InputError(
            f"data: expected {', '.join(FORMATS)} files (also {', '.join(COMPRESSIONS)}), got {path} with none of them"
        )
    return known


def file_format(path: Path) -> str | None:
    """`text`, `json`, `parquet` or None."""
    suffixes = [suffix for suffix in path.suffixes if suffix not in COMPRESSIONS]
    return FORMATS.get(suffixes[-1]) if suffixes else None


def content_key(files: Iterable[Path], root: Path) -> str:
    """A hash of the files' names below `root` and of their contents, in order, wherever the folder lies.

    Of a file that cannot be read, only the name counts; of `root` itself, if it is a file, only the content.
    """
    return _key_of(files, root, sys.maxsize)


def stream_key(files: Iterable[Path], root: Path) -> str:
    """Like `content_key`, but only of each file's size and its first `HEAD_BYTES`."""
    return _key_of(files, root, HEAD_BYTES)


def _key_of(files: Iterable[Path], root: Path, most_bytes: int) -> str:
    total = hashlib.blake2b(digest_size=16)
    for path in files:
        content = hashlib.blake2b(digest_size=16)
        try:
            with path.open("rb") as file:
                content.update(f"{os.fstat(file.fileno()).st_size} ".encode())
                left = most_bytes
                while part := file.read(min(READ_BYTES, left)):
                    content.update(part)
                    left -= len(part)
        except OSError:
            content.update(b"unreadable")
        name = path.relative_to(root).as_posix() if path != root else ""
        total.update(os.fsencode(name) + b"\0" + content.digest())
    return total.hexdigest()


def read_rows(files: list[str], text_column: str) -> Iterator[dict[str, str]]:
    """Rows {"text", "origin", "corrupt", "message"}: `corrupt` is empty or a kind of `data.corrupt_records`."""
    readers = {"text": _read_text, "json": _read_json, "parquet": _read_parquet}
    for name in files:
        path = Path(name)
        try:
            with path.open("rb") as raw, open_compressed(raw, name) as file:
                yield from readers[file_format(path) or "text"](file, name, text_column)
        except UNREADABLE_ERRORS as error:
            reason = getattr(error, "strerror", None) or str(error).partition("\n")[0] or type(error).__name__
            yield corrupt_row(UNREADABLE, f"data: could not read {name}: {reason}")


def open_compressed(file: IO[bytes], name: str) -> Any:
    """The file's content, decompressed according to its suffix."""
    compression = infer_compression(name)
    if compression is None and name.endswith(".zst"):
        raise InputError(f"data: expected the package zstandard to be installed for .zst, got {name}")
    return io.BufferedReader(file) if compression is None else compr[compression](file, mode="rb")  # type: ignore[arg-type]


def document_row(text: object, where: str) -> dict[str, str]:
    """The row of a value that should be a document's text."""
    if text is None or (isinstance(text, str) and not text.strip()):
        return corrupt_row(EMPTY, where)
    if not isinstance(text, str):
        return corrupt_row(NO_TEXT, f"text-column: expected text in {where}, got {type(text).__name__}")
    return {"text": text, "origin": where, "corrupt": "", "message": ""}


def corrupt_row(kind: str, message: str) -> dict[str, str]:
    """The row of a corrupt record; `message` names the record and what is wrong."""
    return {"text": "", "origin": "", "corrupt": kind, "message": message}


def _read_text(file: IO[bytes], name: str, text_column: str) -> Iterator[dict[str, str]]:
    """The file as one document, or in parts that end with a line if possible."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    lines = io.IncrementalNewlineDecoder(None, translate=True)
    rest, parts, position, ended = "", 0, 0, False
    while not ended:
        content = file.read(min(READ_BYTES, PART_BYTES))
        ended = not content
        if position == 0 and b"\0" in content[:SNIFF_BYTES]:
            yield corrupt_row(BINARY, f"data: expected text, got binary in {name}")
            return
        if len(rest) >= PART_BYTES and not ended:
            parts += 1
            cut = rest.rfind("\n") + 1 or len(rest)
            yield document_row(rest[:cut], f"{name}, part {parts}")
            rest = rest[cut:]
        start = position - len(decoder.getstate()[0])  # start of a character that the last read cut in two
        try:
            rest += lines.decode(decoder.decode(content, final=ended), final=ended)
        except UnicodeDecodeError as error:
            at = start + error.start
            yield corrupt_row(ENCODING, f"data: expected UTF-8, got {name} with {error.reason} at byte {at}")
            return
        position += len(content)
    if rest.strip() or parts == 0:
        yield document_row(rest, f"{name}, part {parts + 1}" if parts else name)


def _read_json(file: IO[bytes], name: str, text_column: str) -> Iterator[dict[str, str]]:
    """JSON lines, or one JSON list of objects."""
    number = 0
    for number, line in enumerate(file, 1):
        if number == 1:
            if b"\0" in line[:SNIFF_BYTES]:
                yield corrupt_row(BINARY, f"data: expected text, got binary in {name}")
                return
            if line.lstrip().startswith(b"["):
                yield from _read_list(line + file.read(), name, text_column)
                return
        if line.strip():
            yield from _read_object(line, f"{name}, line {number}", text_column)
    if number == 0:
        yield corrupt_row(EMPTY, name)


def _read_list(content: bytes, name: str, text_column: str) -> Iterator[dict[str, str]]:
    try:
        objects = json.loads(content)
    except ValueError as error:
        yield corrupt_row(BROKEN_LINE, f"data: could not read {name}: {error}")
        return
    for number, item in enumerate(objects, 1):
        yield _text_of(item, f"{name}, item {number}", text_column)


def _read_object(line: bytes, where: str, text_column: str) -> Iterator[dict[str, str]]:
    try:
        item = json.loads(line)
    except ValueError as error:
        yield corrupt_row(BROKEN_LINE, f"data: could not read {where}: {error}")
        return
    yield _text_of(item, where, text_column)


def _text_of(item: object, where: str, text_column: str) -> dict[str, str]:
    if not isinstance(item, dict):
        return corrupt_row(BROKEN_LINE, f"data: expected a JSON object in {where}, got {type(item).__name__}")
    if text_column not in item:
        return corrupt_row(NO_TEXT, missing_column(item, where, text_column))
    return document_row(item[text_column], where)


def _read_parquet(file: IO[bytes], name: str, text_column: str) -> Iterator[dict[str, str]]:
    table = pyarrow.parquet.ParquetFile(file)
    if text_column not in table.schema_arrow.names:
        yield corrupt_row(NO_TEXT, missing_column(table.schema_arrow.names, name, text_column))
        return
    number = 0
    for batch in table.iter_batches(PARQUET_ROWS, columns=[text_column]):
        for text in batch.column(0).to_pylist():
            number += 1
            yield document_row(text, f"{name}, row {number}")


def missing_column(columns: Iterable[str], where: str, text_column: str) -> str:
    """The message for data without the text column."""
    return f"text-column: expected one of {', '.join(columns)} in {where}, got {text_column!r}"
