"""Bad data: each kind is counted and named, and skipped or refused."""

import json
from itertools import islice

import datasets
import pytest
import torch

from flashmhf.data import corpus as corpus_module
from flashmhf.data import files
from flashmhf.data.config import DataConfig
from flashmhf.data.corpus import load_corpus
from flashmhf.data.corrupt_records import PLURALS, CorruptRecords
from flashmhf.data.mixing import load_blocks
from flashmhf.data.tokenizer import byte_tokenizer
from flashmhf.errors import InputError

GOOD = [f"Good text number {i}, long enough to be cut." for i in range(30)]


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "data"
    made.mkdir()
    for i, text in enumerate(GOOD):
        (made / f"{i:02d}.txt").write_text(text)
    return made


def binary(folder):
    (folder / "photo.txt").write_bytes(b"\x89PNG\0\0\1")


def latin(folder):
    (folder / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))


def broken_line(folder):
    (folder / "rows.jsonl").write_text('{"text": \n"just a string"\n')


def no_column(folder):
    (folder / "rows.jsonl").write_text('{"body": "text"}\n{"text": 5}\n')


def parquet_without(folder):
    datasets.Dataset.from_dict({"body": ["a"]}).to_parquet(str(folder / "rows.parquet"))


def truncated_parquet(folder):
    (folder / "rows.parquet").write_bytes(b"PAR1 and no more")


def truncated_gzip(folder):
    (folder / "rows.jsonl.gz").write_bytes(b"\x1f\x8b\x08 and no more")


def dangling(folder):
    (folder / "gone.txt").symlink_to(folder / "nowhere")


KINDS = [
    (binary, "binary file", 1, r"expected text, got binary in .*photo.txt"),
    (latin, "file not in UTF-8", 1, r"expected UTF-8, got .*latin.txt with .* at byte 3"),
    (broken_line, "broken line", 2, r"could not read .*rows.jsonl, line 1: "),
    (no_column, "row without text column", 2, r"text-column: expected one of body in .*rows.jsonl, line 1, got 'text'"),
    (parquet_without, "row without text column", 1, r"text-column: expected one of body in .*rows.parquet, got 'text'"),
    (truncated_parquet, "unreadable file", 1, r"could not read .*rows.parquet: "),
    (truncated_gzip, "unreadable file", 1, r"could not read .*rows.jsonl.gz: "),
    (dangling, "unreadable file", 1, r"could not read .*gone.txt: No such file or directory"),
]


@pytest.mark.parametrize(("make", "kind", "count", "message"), KINDS, ids=[row[0].__name__ for row in KINDS])
@pytest.mark.parametrize("streaming", [False, True])
def test_refused_or_skipped(folder, make, kind, count, message, streaming):
    make(folder)
    with pytest.raises(InputError, match=message) as caught:
        list(load_corpus(str(folder), streaming=streaming).train)
    assert "\n" not in str(caught.value)
    assert "--bad-data skip leaves it out" in str(caught.value)
    for _ in range(2):  # from the files, then from the cache
        corpus = load_corpus(str(folder), streaming=streaming, bad_data="skip")
        texts = [one["text"] for one in [*corpus.train, *corpus.validation]]
        assert sorted(texts) == sorted(GOOD)
        assert corpus.bad_data.counts == {kind: count}
        assert f"{count} {PLURALS[kind] if count > 1 else kind}" in corpus.bad_data.summary()


def test_empty_documents_are_skipped_and_counted_either_way(folder, caplog):
    (folder / "blank.txt").write_text(" \n")
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("", None, "\t")))
    for policy in ("refuse", "skip"):
        caplog.clear()
        corpus = load_corpus(str(folder), bad_data=policy)
        assert corpus.bad_data.counts == {"empty document": 4}
        assert "bad data skipped: 4 empty documents (" in caplog.text
        assert "blank.txt" in caplog.text


def test_a_file_that_vanishes_between_listing_and_reading(folder, monkeypatch):
    listed = corpus_module.list_files

    def vanishing(path):
        listing = listed(path)
        listing.files[3].unlink(missing_ok=True)
        return listing

    monkeypatch.setattr(corpus_module, "list_files", vanishing)
    with pytest.raises(InputError, match=r"could not read .*03.txt: No such file"):
        load_corpus(str(folder))
    (folder / "03.txt").write_text(GOOD[3])
    corpus = load_corpus(str(folder), bad_data="skip")
    assert len(corpus.train) + len(corpus.validation) == 29
    assert corpus.bad_data.counts == {"unreadable file": 1}
    monkeypatch.undo()


def test_nothing_but_bad_data(tmp_path):
    binary(tmp_path)
    with pytest.raises(InputError, match=r"expected some text, got none in .* \(bad data skipped: 1 binary file"):
        load_corpus(str(tmp_path), bad_data="skip")


def test_the_summary_names_a_few_of_each_kind():
    bad = CorruptRecords("skip")
    for i in range(5):
        bad.add("broken line", f"line {i}")
    bad.add("broken line", "line 0")  # a stream comes by it again
    bad.add("binary file", "x.txt")
    assert bad.summary() == "bad data skipped: 1 binary file (x.txt); 5 broken lines (line 0, line 1, line 2, ...)"
    with pytest.raises(InputError, match="bad-data: expected skip or refuse, got 'ignore'"):
        CorruptRecords("ignore")


def test_a_run_sums_up(folder):
    binary(folder)
    data = load_blocks(DataConfig(source=str(folder), context_length=16, bad_data="skip"), byte_tokenizer())
    assert data.bad_summary().startswith("bad data skipped: 1 binary file (data: expected text, got binary in ")


def test_what_a_worker_process_skips_is_counted(tmp_path):
    lines = [json.dumps({"text": f"text {i}"}) for i in range(3500)]
    lines[3400:3400] = ['{"text": ', '{"text": "\\ud83d"}', '{"text": ']
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    config = DataConfig(source=str(tmp_path), context_length=64, bad_data="skip", streaming=True)
    data = load_blocks(config, byte_tokenizer())
    assert data.bad_data[0].counts == {}  # not read yet
    list(islice(torch.utils.data.DataLoader(data.train, batch_size=None, num_workers=1), 600))
    assert data.bad_data[0].counts == {"broken line": 2, "text with invalid characters": 1}


LONG = "".join(f"line {i} of an é or 漢\r\n" for i in range(40))


@pytest.mark.parametrize("part", [16, 17, 18, 19, 20, 64, 10_000])
def test_a_long_file_is_read_in_parts(tmp_path, monkeypatch, part):
    monkeypatch.setattr(files, "PART_BYTES", part)
    file = tmp_path / "long.txt"
    file.write_bytes(LONG.encode())
    rows = list(files.read_rows([str(file)], "text"))
    assert "".join(row["text"] for row in rows).rstrip() == LONG.replace("\r\n", "\n").rstrip()
    assert len(rows) == 1 if part == 10_000 else len(rows) > 5
    assert all(len(row["text"]) <= 3 * part for row in rows)
    if part >= 64:
        assert all(row["text"].endswith("\n") for row in rows)
    expected = [f"{file}, part {i + 1}" for i in range(len(rows))] if len(rows) > 1 else [str(file)]
    assert [row["origin"] for row in rows] == expected


def test_a_long_file_with_another_encoding_names_the_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PART_BYTES", 16)
    file = tmp_path / "long.txt"
    file.write_bytes("é".encode() * 50 + b"\xff" + b"x" * 30)
    assert list(files.read_rows([str(file)], "text"))[-1]["message"].endswith(
        "got " + str(file) + " with invalid start byte at byte 100"
    )
