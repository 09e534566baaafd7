"""Files of text as rows: one for each document, and one for each corrupt record."""

import codecs
import io
import json
from collections.abc import Iterable, Iterator
from itertools import count, islice
from pathlib import Path
from typing import IO, Any

import datasets
import pyarrow.parquet
from fsspec.compression import compr
from fsspec.utils import infer_compression

from flashmhf.data.corrupt_records import (
    BINARY,
    BROKEN_LINE,
    BROKEN_ROWS,
    EMPTY,
    ENCODING,
    INVALID_TEXT,
    NO_TEXT,
    UNREADABLE,
    reason,
)
from flashmhf.data.fingerprints import READ_BYTES
from flashmhf.data.listing import file_format
from flashmhf.printable import one_line

SNIFF_BYTES = 8192
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # UTF-32 begins with them, too
PARQUET_ROWS = 256
PART_BYTES = 2**23  # longer text files become several documents, to bound memory
LINE_BYTES = 2**28  # longer lines of JSON are corrupt
LIST_BYTES = 2**32  # the same of a JSON list
NAMED_COLUMNS = 8  # in a message
ROW = datasets.Features({name: datasets.Value("string") for name in ("text", "origin", "corrupt", "message")})
Row = dict[str, str]


def read_rows(files: list[str], text_column: str) -> Iterator[Row]:
    """Rows {"text", "origin", "corrupt", "message"}: `corrupt` is empty or a kind of `data.corrupt_records`.

    Whatever a reader or a decoder raises becomes a corrupt record that names the file, and the line or row.
    """
    readers = {"text": _read_text, "json": _read_json, "parquet": _read_parquet}
    for name in files:
        path, where = Path(name), one_line(name)
        try:
            with path.open("rb") as raw, open_compressed(raw, name) as file:
                yield from readers[file_format(path) or "text"](file, where, text_column)
        except Exception as error:  # decoders raise dozens of unrelated types
            yield corrupt_row(UNREADABLE, f"data: could not read {where}: {reason(error)}")


def open_compressed(file: IO[bytes], name: str) -> io.BufferedReader:
    """The file's content, decompressed according to its suffix."""
    compression = infer_compression(name)
    return io.BufferedReader(file if compression is None else compr[compression](file, mode="rb"))  # type: ignore[arg-type]


def document_row(text: object, where: str) -> Row:
    """The row of a value that should be a document's text."""
    if text is None or (isinstance(text, str) and not text.strip()):
        return corrupt_row(EMPTY, where)
    if not isinstance(text, str):
        return corrupt_row(NO_TEXT, f"text-column: expected text in {where}, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        lone = ascii(text[error.start])
        message = f"data: expected valid text in {where}, got the lone surrogate {lone} at character {error.start}"
        return corrupt_row(INVALID_TEXT, message)
    return {"text": text, "origin": where, "corrupt": "", "message": ""}


def scalar_row(scalar: pyarrow.Scalar, where: str) -> Row:
    """The row of a value in Arrow format, which may be no text."""
    try:
        return document_row(scalar.as_py(), where)
    except Exception as error:  # as in `read_rows`
        return corrupt_row(INVALID_TEXT, f"data: could not read {where}: {reason(error)}")


def corrupt_row(kind: str, message: str) -> Row:
    """The row of a corrupt record; `message` names the record and what is wrong."""
    return {"text": "", "origin": "", "corrupt": kind, "message": one_line(message)}


def missing_column(columns: Iterable[str], where: str, text_column: str) -> str:
    """The message for data without the text column."""
    names = [one_line(f"{name}")[:80] for name in islice(columns, NAMED_COLUMNS + 1)]
    if len(names) > NAMED_COLUMNS:
        names[NAMED_COLUMNS:] = ["..."]
    return f"text-column: expected one of {', '.join(names)} in {where}, got {text_column!r}"


def _not_text(head: bytes, where: str) -> Row | None:
    """The corrupt record of a file that begins like this, or None."""
    if head.startswith(UTF_16):
        return corrupt_row(ENCODING, f"data: expected UTF-8, got {where} with the mark of UTF-16 at its beginning")
    if b"\0" in head[:SNIFF_BYTES]:
        return corrupt_row(BINARY, f"data: expected text, got binary in {where}")
    return None


def _read_text(file: IO[bytes], where: str, text_column: str) -> Iterator[Row]:
    """The file as one document, or in parts that end with a line if possible."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    lines = io.IncrementalNewlineDecoder(None, translate=True)
    rest, parts, position, ended = "", 0, 0, False
    while not ended:
        content = file.read(min(READ_BYTES, PART_BYTES))
        ended = not content
        if position == 0 and (problem := _not_text(content, where)):
            yield problem
            return
        if len(rest) >= PART_BYTES and not ended:
            parts += 1
            cut = rest.rfind("\n") + 1 or len(rest)
            yield document_row(rest[:cut], f"{where}, part {parts}")
            rest = rest[cut:]
        start = position - len(decoder.getstate()[0])  # start of a character that the last read cut in two
        try:
            rest += lines.decode(decoder.decode(content, final=ended), final=ended)
        except UnicodeDecodeError as error:
            at = start + error.start
            yield corrupt_row(ENCODING, f"data: expected UTF-8, got {where} with {error.reason} at byte {at}")
            return
        if (zero := content.find(b"\0")) >= 0:
            yield corrupt_row(BINARY, f"data: expected text, got a zero in {where} at byte {position + zero}")
            return
        if start == 0:
            rest = rest.removeprefix("\ufeff")  # a mark of UTF-8 is no text
        position += len(content)
    if rest.strip() or parts == 0:
        yield document_row(rest, f"{where}, part {parts + 1}" if parts else where)


def _read_json(file: IO[bytes], where: str, text_column: str) -> Iterator[Row]:
    """JSON lines, or one JSON list of objects."""
    began = False
    for number, line in _lines(file):
        content = line.removeprefix(codecs.BOM_UTF8)  # also where files were joined
        if not content.strip():
            continue
        if not began:
            began = True
            if problem := _not_text(content, where):
                yield problem
                return
            if content.lstrip().startswith(b"["):
                yield from _read_list(content, file, where, text_column)
                return
        place = f"{where}, line {number}"
        if len(line) > LINE_BYTES:
            yield corrupt_row(BROKEN_LINE, f"data: expected lines of at most {LINE_BYTES:,} bytes, got more in {place}")
        else:
            yield _line_row(content, place, text_column)
    if not began:
        yield corrupt_row(EMPTY, where)


def _lines(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers; one that is too long is cut to `LINE_BYTES` + 1 bytes once the next is read."""
    for number in count(1):
        line = file.readline(LINE_BYTES + 1)
        if not line:
            return
        yield number, line
        while len(line) > LINE_BYTES and not line.endswith(b"\n"):
            line = file.readline(LINE_BYTES + 1)


def _read_list(begin: bytes, file: IO[bytes], where: str, text_column: str) -> Iterator[Row]:
    content = begin + file.read(LIST_BYTES)
    if len(content) > LIST_BYTES:
        yield corrupt_row(BROKEN_LINE, f"data: expected a list of at most {LIST_BYTES:,} bytes, got more in {where}")
        return
    try:
        items = _parse(content, text_column)
    except Exception as error:  # as in `read_rows`
        yield corrupt_row(BROKEN_LINE, f"data: could not read {where}: {reason(error)}")
        return
    if not items:
        yield corrupt_row(EMPTY, where)
    for number, item in enumerate(items, 1):
        yield _item_row(item, f"{where}, item {number}", text_column)


def _parse(content: bytes, text_column: str) -> Any:
    """Any JSON value; a text column that an object has twice is an error, since one of them would be lost."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if sum(name == text_column for name, _ in pairs) > 1:
            raise ValueError(f"{text_column!r} twice in one object")
        return dict(pairs)

    text = content.decode()
    return json.loads(text, object_pairs_hook=unique if text.count(f'"{text_column}"') > 1 else None)


def _line_row(content: bytes, where: str, text_column: str) -> Row:
    """The row of a line that should be a JSON object."""
    try:
        item = _parse(content, text_column)
    except Exception as error:  # as in `read_rows`
        return corrupt_row(BROKEN_LINE, f"data: could not read {where}: {reason(error)}")
    return _item_row(item, where, text_column)


def _item_row(item: object, where: str, text_column: str) -> Row:
    """The row of a value that should be a JSON object."""
    if not isinstance(item, dict):
        return corrupt_row(BROKEN_LINE, f"data: expected a JSON object in {where}, got {type(item).__name__}")
    if text_column not in item:
        return corrupt_row(NO_TEXT, missing_column(item, where, text_column))
    return document_row(item[text_column], where)


def _read_parquet(file: IO[bytes], where: str, text_column: str) -> Iterator[Row]:
    """Row groups are read one by one, so that a damaged one costs only its own rows."""
    table = pyarrow.parquet.ParquetFile(file, page_checksum_verification=True)
    names = table.schema_arrow.names
    if names.count(text_column) != 1:
        yield corrupt_row(NO_TEXT, missing_column(names, where, text_column))
        return
    first = 1
    for group in range(table.num_row_groups):
        place = f"{where}, rows {first} to {first + table.metadata.row_group(group).num_rows - 1}"
        number = first
        try:
            for batch in table.iter_batches(PARQUET_ROWS, row_groups=[group], columns=[text_column]):
                for value in batch.column(0):
                    yield scalar_row(value, f"{where}, row {number}")
                    number += 1
        except Exception as error:  # as in `read_rows`
            yield corrupt_row(BROKEN_ROWS, f"data: could not read {place}: {reason(error)}")
        first += table.metadata.row_group(group).num_rows
    if first == 1:
        yield corrupt_row(EMPTY, where)
