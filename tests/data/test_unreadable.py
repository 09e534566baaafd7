"""Whatever is in a file, reading it ends: in documents, and in corrupt records that name it. Nothing else is raised."""

import bz2
import gzip
import json
import lzma
import os
from itertools import islice

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flashmhf.data import DataConfig, load_blocks, load_corpus
from flashmhf.data import files as files_module
from flashmhf.data.files import read_rows
from flashmhf.data.tokenizer import byte_tokenizer
from flashmhf.errors import InputError

GOOD = [f"Good text number {i}, long enough to be cut." for i in range(30)]


def jsonl(*lines):
    return b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines)


def parquet(column, name="text", **options):
    table = pyarrow.table({name: column})
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink, **options)
    return sink.getvalue().to_pybytes()


def no_utf8_strings():
    """Bytes that claim to be strings."""
    return pyarrow.Array.from_buffers(
        pyarrow.string(), 2, [None, pyarrow.py_buffer(b"\0\0\0\0\3\0\0\0\5\0\0\0"), pyarrow.py_buffer(b"ok!\xff\xfe")]
    )


def damaged_group():
    """Three groups of rows, the second overwritten."""
    content = bytearray(parquet([f"row {i} " * 9 for i in range(9)], row_group_size=3, compression="gzip"))
    metadata = pyarrow.parquet.ParquetFile(pyarrow.py_buffer(bytes(content))).metadata
    begin = metadata.row_group(1).column(0).dictionary_page_offset
    content[begin : begin + 40] = b"\xff" * 40
    return bytes(content)


def two_columns_of_one_name():
    sink = pyarrow.BufferOutputStream()
    table = pyarrow.table([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(table, sink)
    return sink.getvalue().to_pybytes()


OK = '{"text": "fine"}'
SURROGATE = '{"text": "half of \\ud83d an emoji"}'
# name: content, texts that are read, parts of the messages
CASES = {
    "surrogate.jsonl": (jsonl(OK, SURROGATE, OK), ["fine", "fine"], ["line 2", "lone surrogate '\\ud83d'"]),
    "surrogate.json": (b'[%s, {"text": "\\udc00"}]' % OK.encode(), ["fine"], ["item 2"]),
    "surrogate_key.jsonl": (jsonl('{"\\ud83d": 1}'), [], ["line 1", "expected one of \\ud83d"]),
    "surrogate_pair.jsonl": (jsonl('{"text": "\\ud83d\\ude00"}'), ["\U0001f600"], []),
    "encoded_surrogate.jsonl": (jsonl(OK, b'{"text": "\xed\xa0\xbd"}'), ["fine"], ["line 2", "invalid continuation"]),
    "latin1.jsonl": (jsonl(OK, b'{"text": "caf\xe9"}'), ["fine"], ["line 2"]),
    "latin1.json": (b'[{"text": "caf\xe9"}]', [], ["latin1.json: "]),
    "deep.jsonl": (jsonl(OK, '{"text": ' + "[" * 200_000 + "]" * 200_000 + "}"), ["fine"], ["line 2", "too deeply"]),
    "deep.json": (b"[" * 200_000 + b"]" * 200_000, [], ["nested too deeply"]),
    "deep_and_open.json": (b'[{"a":' * 100_000, [], ["nested too deeply"]),
    "digits.jsonl": (jsonl('{"text": "a", "n": ' + "9" * 10_000 + "}", OK), ["fine"], ["line 1", "4300 digits"]),
    "numbers.jsonl": (jsonl('{"text": NaN}', '{"text": Infinity}', '{"text": 1e999}'), [], ["line 3", "got float"]),
    "nan.jsonl": (jsonl('{"text": "a", "n": NaN}'), ["a"], []),
    "twice.jsonl": (jsonl('{"text": "a", "text": "b"}', OK), ["fine"], ["line 1", "'text' twice"]),
    "twice_elsewhere.jsonl": (jsonl('{"text": "a", "x": {"text": "b"}}'), ["a"], []),
    "zero.jsonl": (jsonl('{"text": "a\\u0000b"}'), ["a\0b"], []),
    "raw_zero.jsonl": (jsonl(OK, b'{"text": "a\0b"}'), ["fine"], ["line 2", "Invalid control character"]),
    "zeroed.jsonl": (bytes(5000), [], ["got binary in"]),
    "zeroed.txt": (bytes(5000), [], ["got binary in"]),
    "zeroed_end.txt": (b"text " * 5000 + bytes(5000), [], ["got a zero", "at byte 25000"]),
    "zeroed_end.jsonl": (jsonl(OK, bytes(5000)), ["fine"], ["line 2"]),
    "zeroed.json": (b'[{"text": "a"},' + bytes(9000), [], ["zeroed.json"]),
    "zeroed.parquet": (bytes(5000), [], ["zeroed.parquet: "]),
    "mark.txt": (b"\xef\xbb\xbfmarked", ["marked"], []),
    "mark.jsonl": (jsonl(b"\xef\xbb\xbf" + OK.encode(), b"\xef\xbb\xbf" + OK.encode()), ["fine", "fine"], []),
    "mark.json": (b"\xef\xbb\xbf\n [" + OK.encode() + b"]", ["fine"], []),
    "mark_alone.txt": (b"\xef\xbb\xbf", [], ["mark_alone.txt"]),
    "utf16.txt": ("text".encode("utf-16"), [], ["expected UTF-8", "mark of UTF-16"]),
    "utf16.jsonl": (OK.encode("utf-16"), [], ["expected UTF-8", "mark of UTF-16"]),
    "utf16be_without_mark.txt": ("text".encode("utf-16-be"), [], ["got binary"]),
    "utf32.txt": ("text".encode("utf-32"), [], ["expected UTF-8"]),
    "crlf.jsonl": (b'{"text": "a"}\r\n{"text": "b"}\r\n', ["a", "b"], []),
    "crlf.txt": (b"a\r\nb\r\n", ["a\nb\n"], []),
    "blank_lines.json": (b"\n \n[" + OK.encode() + b"]\n", ["fine"], []),
    "no_list.json": (b'"text"', [], ["got str"]),
    "list_of_text.json": (b'["text", 1, null]', [], ["item 1", "got str", "item 3"]),
    "empty_list.json": (b"[]", [], ["empty_list.json"]),
    "list_with_more.json": (b'[{"text": "a"}] more', [], ["Extra data"]),
    "empty.jsonl": (b"", [], ["empty.jsonl"]),
    "empty.parquet": (parquet(pyarrow.array([], pyarrow.string())), [], ["empty.parquet"]),
    "encrypted.parquet": (b"PARE" + parquet(["a"])[4:-4] + b"PARE", [], ["encrypted.parquet: "]),
    "text.parquet": (b"just text", [], ["text.parquet: "]),
    "parquet.jsonl": (parquet(["a"]), [], ["parquet.jsonl, line 1"]),
    "parquet.txt": (parquet(["a"]), [], ["got binary"]),
    "gzip.txt": (gzip.compress(b"text" * 99), [], ["got "]),
    "text.txt.gz": (b"no gzip", [], ["Not a gzipped file"]),
    "text.txt.bz2": (b"no bz2", [], ["Invalid data stream"]),
    "text.txt.xz": (b"no xz", [], ["text.txt.xz: "]),
    "twice.txt.gz": (gzip.compress(gzip.compress(b"text" * 99)), [], ["got "]),
    "joined.txt.gz": (gzip.compress(b"one ") + gzip.compress(b"two"), ["one two"], []),
    "checksum.jsonl.gz": (gzip.compress(OK.encode())[:-8] + bytes(8), [], ["CRC check failed"]),
    "binary.parquet": (parquet([b"a", b"\xff"]), [], ["row 1", "got bytes"]),
    "lists.parquet": (parquet([["a"], ["b"]]), [], ["row 2", "got list"]),
    "structs.parquet": (parquet([{"a": "b"}]), [], ["got dict"]),
    "numbers.parquet": (parquet([1, 2]), [], ["got int"]),
    "times.parquet": (parquet(pyarrow.array([0], pyarrow.timestamp("ns"))), [], ["row 1"]),
    "nulls.parquet": (parquet(pyarrow.nulls(2)), [], ["row 2"]),
    "some_nulls.parquet": (parquet(["a", None, "b"]), ["a", "b"], ["row 2"]),
    "dictionary.parquet": (parquet(pyarrow.array(["a", "b", "a"]).dictionary_encode()), ["a", "b", "a"], []),
    "large_string.parquet": (parquet(pyarrow.array(["a"], pyarrow.large_string())), ["a"], []),
    "no_utf8.parquet": (parquet(no_utf8_strings()), ["ok!"], ["row 2", "'utf-8' codec can't decode"]),
    "twice.parquet": (two_columns_of_one_name(), [], ["text-column"]),
    "group.parquet": (damaged_group(), [f"row {i} " * 9 for i in (0, 1, 2, 6, 7, 8)], ["rows 4 to 6"]),
    "many_columns.jsonl": (json.dumps({f"column {i}": "a" for i in range(100)}).encode(), [], ["column 7, ... in"]),
}


def read(file):
    rows = list(read_rows([str(file)], "text"))
    for row in rows:
        for value in row.values():
            value.encode()
        assert not set(row["message"]) & set("\n\x1b")
        assert (row["corrupt"] == "") == bool(row["text"])
        assert str(file.name).encode("ascii", "ignore").decode() in row["origin"] + row["message"]
    return [row["text"] for row in rows if not row["corrupt"]], [row["message"] for row in rows if row["corrupt"]]


@pytest.mark.parametrize("name", CASES)
def test_kinds(tmp_path, name):
    content, expected, parts = CASES[name]
    (tmp_path / name).write_bytes(content)
    texts, messages = read(tmp_path / name)
    assert texts == expected
    assert bool(messages) == bool(parts)
    for part in parts:
        assert any(part in message for message in messages), messages


@pytest.mark.parametrize("streaming", [False, True])
def test_all_kinds_in_one_folder(tmp_path, streaming):
    """Through the cache and the tokenizer, alone and in a mix."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name, (content, _, _) in CASES.items():
        (folder / name).write_bytes(content)
    for i, text in enumerate(GOOD):
        (folder / f"{i}.txt").write_text(text)
    with pytest.raises(InputError, match=r"--bad-data skip leaves it out$") as caught:
        list(load_corpus(str(folder), streaming=streaming).train)
    assert "\n" not in str(caught.value)
    source = f"0.5*{folder},0.5*{folder}"
    config = DataConfig(source=source, context_length=16, bad_data="skip", streaming=streaming)
    data = load_blocks(config, byte_tokenizer())
    list(islice(iter(data.train), 500))
    expected = sum(len(parts) > 0 for _, _, parts in CASES.values())
    assert sum(data.bad_data[0].counts.values()) > expected
    assert "\n" not in data.bad_summary()


def test_a_line_that_is_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr(files_module, "LINE_BYTES", 100)
    file = tmp_path / "long.jsonl"
    long = json.dumps({"text": "x" * 450})
    file.write_text("\n".join([OK, long, OK, long]))
    texts, messages = read(file)
    assert texts == ["fine", "fine"]
    assert [message.partition("long.jsonl, ")[2] for message in messages] == ["line 2", "line 4"]
    file.write_text(f"[{long}, {OK}]")  # a list in one line is not a line
    assert read(file)[0] == ["x" * 450, "fine"]
    monkeypatch.setattr(files_module, "LIST_BYTES", 400)
    assert read(file)[1] == [f"data: expected a list of at most 400 bytes, got more in {file}"]


PACKS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
LINES = "\n".join(json.dumps({"text": f"Text {i} with ümlauts."}) for i in range(6)).encode()
CONTENTS = {
    ".txt": b"Some text with \xc3\xbcmlauts.\n" * 9,
    ".jsonl": LINES,
    ".json": b"[" + LINES.replace(b"\n", b",") + b"]",
    ".parquet": parquet([f"Text {i}" for i in range(6)], row_group_size=2),
}


@pytest.mark.parametrize("suffix", PACKS)
@pytest.mark.parametrize("ending", CONTENTS)
def test_cut_anywhere_or_zeroed(tmp_path, ending, suffix):
    content = PACKS[suffix](CONTENTS[ending])
    file = tmp_path / f"a{ending}{suffix}"
    file.write_bytes(content)
    expected, _ = read(file)
    assert expected
    for at in range(0, len(content), max(len(content) // 40, 1)):
        for damaged in (content[:at], content[:at] + bytes(len(content) - at), bytes(at) + content[at:]):
            file.write_bytes(damaged)
            texts, messages = read(file)
            assert messages or texts != expected or damaged == content


DAMAGES = st.lists(st.tuples(st.integers(0, 2000), st.binary(max_size=12), st.integers(0, 40)), max_size=4)
BYTES = st.one_of(
    st.binary(max_size=200),
    st.lists(
        st.sampled_from(
            [b"{", b"}", b"[", b"]", b'"text"', b":", b",", b'"', b"\\ud83d", b"\n", b"1e9", b"\xff", b"\0"]
        )
    ).map(b"".join),
)


def check_anything(folder, name, content, damages, pack):
    for at, put, removed in damages:
        content = content[:at] + put + content[at + removed :]
    file = folder / name
    file.write_bytes(pack(content))
    read(file)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("anything")


ANYTHING = given(
    st.sampled_from(sorted(CONTENTS)),
    st.sampled_from(sorted(PACKS)),
    st.one_of(
        BYTES, st.sampled_from(list(CONTENTS.values())), st.sampled_from([case[0][:5000] for case in CASES.values()])
    ),
    DAMAGES,
    st.booleans(),
)
SUPPRESSED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@settings(max_examples=150, derandomize=True, deadline=None, suppress_health_check=SUPPRESSED)
@ANYTHING
def test_anything(folder, ending, suffix, content, damages, packed):
    """Any content, damaged before it is compressed or after, under any name."""
    check_anything(folder, f"a{ending}{suffix}", content, damages, PACKS[suffix] if packed else bytes)


@pytest.mark.slow
@settings(max_examples=20_000, deadline=None, suppress_health_check=SUPPRESSED)
@ANYTHING
def test_anything_at_length(folder, ending, suffix, content, damages, packed):
    check_anything(folder, f"a{ending}{suffix}", content, damages, PACKS[suffix] if packed else bytes)


NAMES = [
    b"caf\xe9.txt",
    "grüße.txt".encode(),
    b"two  spaces.txt",
    b"new\nline.txt",
    b"\x1b[31mred.txt",
    b"quote'\".txt",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("streaming", [False, True])
def test_names_of_files(tmp_path, name, streaming):
    """Names that are not UTF-8 or that would control a terminal."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / os.fsdecode(name)).write_text("Read from an odd name.")
    for i, text in enumerate(GOOD):
        (folder / f"{i}.txt").write_text(text)
    corpus = load_corpus(str(folder), streaming=streaming)
    documents = [*corpus.train, *corpus.validation]
    assert sorted(one["text"] for one in documents) == sorted([*GOOD, "Read from an odd name."])
    for one in documents:
        assert not set(one["origin"]) & set("\n\x1b")
    (folder / os.fsdecode(name)).write_bytes(b"\xff")
    with pytest.raises(InputError, match="expected UTF-8, got ") as caught:
        list(load_corpus(str(folder), streaming=streaming).train)
    assert not set(str(caught.value)) & set("\n\x1b")


def hub_dataset(tmp_path, monkeypatch, column):
    load = datasets.load_dataset
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda name, *rest, **options: load(str(tmp_path / name), *rest, **options),
    )
    (tmp_path / "owner/books").mkdir(parents=True)
    (tmp_path / "owner/books/train.parquet").write_bytes(parquet(column))


ODD = pyarrow.chunked_array([no_utf8_strings(), pyarrow.array([f"text {i}" for i in range(400)])])


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("column", [ODD, pyarrow.array([b"bytes"] * 400)], ids=["no utf-8", "bytes"])
def test_a_dataset_on_the_hub(tmp_path, monkeypatch, column, streaming):
    hub_dataset(tmp_path, monkeypatch, column)
    with pytest.raises(InputError, match=r"owner/books, row \d"):
        load_corpus("owner/books", streaming=streaming)
    if column is ODD:
        corpus = load_corpus("owner/books", streaming=streaming, bad_data="skip")
        assert len([*corpus.train, *corpus.validation]) == 401
        assert corpus.bad_data.counts == {"text with invalid characters": 1}


@pytest.mark.parametrize("streaming", [False, True])
def test_a_damaged_dataset_on_the_hub(tmp_path, monkeypatch, streaming):
    hub_dataset(tmp_path, monkeypatch, ["text"] * 9)
    (tmp_path / "owner/books/train.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(InputError, match=r"^data: .*owner/books") as caught:
        list(load_corpus("owner/books", streaming=streaming).train)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", [lambda content: content[: len(content) // 2], lambda content: bytes(len(content))])
def test_the_cache_of_a_dataset_on_the_hub_is_damaged(tmp_path, monkeypatch, damage):
    hub_dataset(tmp_path, monkeypatch, [f"text {i}" for i in range(400)])
    expected = sorted(load_corpus("owner/books").train["text"])
    for file in (tmp_path / "cache").rglob("*.arrow"):
        file.write_bytes(damage(file.read_bytes()))
    assert sorted(load_corpus("owner/books").train["text"]) == expected
