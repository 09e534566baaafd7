"""Sources of text, the split, tokens and blocks; and how bad input is refused."""

import bz2
import gzip
import json
import lzma
from itertools import islice

import datasets
import numpy as np
import pytest
import torch

from flashmhf.data.blocks import SHUFFLED_DOCUMENTS, TokenBlocks, iterate_blocks
from flashmhf.data.corpus import is_held_out, load_corpus
from flashmhf.data.tokenizer import byte_tokenizer
from flashmhf.data.tokens import tokenize
from flashmhf.errors import InputError


def texts(documents) -> list[str]:
    return sorted(row["text"] for row in documents)


def write_texts(folder, count: int) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    contents = [f"Document {i}.\n" + "words " * (i + 1) for i in range(count)]
    for i, content in enumerate(contents):
        (folder / f"{i:03d}.txt").write_text(content)
    return contents


def test_a_folder_of_text_files(tmp_path):
    contents = write_texts(tmp_path / "books", 40)
    corpus = load_corpus(str(tmp_path / "books"))
    held_out = [text for text in contents if is_held_out(text)]
    assert texts(corpus.validation) == sorted(held_out) != []
    assert sorted(texts(corpus.train) + texts(corpus.validation)) == sorted(contents)
    assert f"{40 - len(held_out)} documents" in corpus.description


def test_a_document_stays_on_its_side_when_files_come_and_go(tmp_path):
    folder = tmp_path / "books"
    contents = write_texts(folder, 60)
    before = load_corpus(str(folder))
    (folder / "000.txt").unlink()
    for i in range(30):
        (folder / f"0{i:02d}a.txt").write_text(f"A new one, {i}.")
    after = load_corpus(str(folder))
    old = set(contents[1:])
    assert old & set(texts(after.validation)) == old & set(texts(before.validation)) != set()
    assert old & set(texts(after.train)) == old & set(texts(before.train))
    streamed = load_corpus(str(folder), streaming=True)
    assert texts(streamed.train) == texts(after.train)
    assert texts(streamed.validation) == texts(after.validation)


def test_at_least_one_document_is_held_out(tmp_path):
    kept = [text for text in (f"Book {i}." for i in range(100)) if not is_held_out(text)][:20]
    for i, text in enumerate(kept):
        (tmp_path / f"{i}.txt").write_text(text)
    corpus = load_corpus(str(tmp_path))
    assert (len(corpus.train), len(corpus.validation)) == (19, 1)


def test_the_sources_own_split(tmp_path):
    train = write_texts(tmp_path / "books/train", 3)
    validation = write_texts(tmp_path / "books/val", 2)
    write_texts(tmp_path / "books/test", 5)
    corpus = load_corpus(str(tmp_path / "books"))
    assert (texts(corpus.train), texts(corpus.validation)) == (sorted(train), sorted(validation))


def test_one_file_is_split_at_its_end(tmp_path):
    (tmp_path / "book.txt").write_text("".join(f"{i:04d}" for i in range(1000)))
    corpus = load_corpus(str(tmp_path / "book.txt"))
    (front,), (back,) = texts(corpus.train), texts(corpus.validation)
    assert front + back == (tmp_path / "book.txt").read_text()
    assert len(back) == 200


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [("", bytes), (".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)],
)
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_formats_and_compressions(tmp_path, suffix, pack, kind):
    folder = tmp_path / "data"
    folder.mkdir()
    contents = [f"Text {i} with ümlauts and\nlines." for i in range(25)]
    if kind == "txt":
        for i, content in enumerate(contents):
            (folder / f"{i:02d}.txt{suffix}").write_bytes(pack(content.encode()))
    else:
        rows = "\n".join(json.dumps({"text": content, "other": 1}) for content in contents)
        (folder / f"rows.jsonl{suffix}").write_bytes(pack(rows.encode()))
    corpus = load_corpus(str(folder))
    assert sorted(texts(corpus.train) + texts(corpus.validation)) == sorted(contents)


def test_parquet_and_another_column(tmp_path):
    datasets.Dataset.from_dict({"body": [f"row {i}" for i in range(30)], "text": ["no"] * 30}).to_parquet(
        str(tmp_path / "rows.parquet")
    )
    corpus = load_corpus(str(tmp_path / "rows.parquet"), text_column="body")
    assert corpus.train.column_names == ["text", "origin"]
    assert corpus.train[0] == {"text": "row 0", "origin": f"{tmp_path / 'rows.parquet'}, row 1"}
    assert sorted(texts(corpus.train) + texts(corpus.validation)) == sorted(f"row {i}" for i in range(30))


def test_mixed_formats_in_one_folder(tmp_path):
    write_texts(tmp_path / "data", 12)
    (tmp_path / "data/more.jsonl").write_text("\n".join(json.dumps({"text": f"row {i}"}) for i in range(12)))
    corpus = load_corpus(str(tmp_path / "data"))
    assert len(corpus.train) + len(corpus.validation) == 24


def test_stdlib():
    corpus = load_corpus("stdlib")
    assert len(corpus.train) > 300
    assert "MB" in corpus.description
    assert any("def " in text for text in texts(corpus.validation))
    streamed = load_corpus("stdlib", streaming=True)
    assert next(iter(streamed.train))["text"] in texts(corpus.train)
    assert set(texts(streamed.validation)) <= set(texts(corpus.validation))


def test_empty_documents_are_passed_over(tmp_path):
    contents = write_texts(tmp_path / "data", 25)
    (tmp_path / "data/empty.txt").write_text("")
    (tmp_path / "data/blank.txt").write_text(" \n\t")
    corpus = load_corpus(str(tmp_path / "data"))
    assert sorted(texts(corpus.train) + texts(corpus.validation)) == sorted(contents)


def test_streaming_gives_the_same_blocks(tmp_path):
    rows = [{"text": f"document {i} " + "x" * (i % 37)} for i in range(300)]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    corpus = load_corpus(str(file), streaming=True)
    assert 5 < len(corpus.validation) < 30
    shuffled = list(corpus.train.shuffle(np.random.default_rng([0, 0]), buffer_size=SHUFFLED_DOCUMENTS))
    assert texts(shuffled) == sorted(one["text"] for one in rows if not is_held_out(one["text"]))
    stored = TokenBlocks(tokenize(datasets.Dataset.from_list(shuffled), byte_tokenizer()), 64)
    streamed = islice(iterate_blocks(corpus.train, byte_tokenizer(), 64), len(stored))
    for mine, theirs in zip(streamed, stored, strict=True):
        assert mine["input_ids"] == theirs["input_ids"].tolist()


@pytest.mark.parametrize("block_length", [1, 7, 64, 1000])
def test_blocks_are_the_documents_with_eos_tokens(block_length):
    documents = datasets.Dataset.from_dict({"text": ["abc", "d", "", "öfg" * 200, "h" * 50]})
    tokenizer = byte_tokenizer()
    tokens = tokenize(documents, tokenizer)
    stream = np.concatenate([np.asarray(ids) for ids in tokens["input_ids"]])
    assert (stream == tokenizer.eos_token_id).sum() == 5
    assert tokens["bytes"] == [3, 1, 0, 800, 50]
    blocks = TokenBlocks(tokens, block_length)
    assert len(blocks) == len(stream) // block_length
    for index in range(len(blocks)):
        item = blocks[index]
        assert item["input_ids"].dtype == torch.int64
        assert torch.equal(item["input_ids"], item["labels"])
        expected = stream[index * block_length : (index + 1) * block_length]
        assert item["input_ids"].tolist() == expected.tolist()
    with pytest.raises(IndexError):
        blocks[len(blocks)]


def test_blocks_across_arrow_chunks():
    parts = [datasets.Dataset.from_dict({"text": [f"{i}" * 10] * 3}) for i in range(4)]
    tokens = tokenize(datasets.concatenate_datasets(parts), byte_tokenizer())
    twice = datasets.concatenate_datasets([tokens, tokens])
    stream = np.concatenate([np.asarray(ids) for ids in twice["input_ids"]])
    blocks = TokenBlocks(twice, 50)
    joined = np.concatenate([blocks[i]["input_ids"] for i in range(len(blocks))])
    assert (joined == stream[: len(joined)]).all()


@pytest.mark.parametrize("block_length", [1, 7, 11, 22, 100])
def test_the_documents_of_a_block(block_length):
    tokens = tokenize(datasets.Dataset.from_dict({"text": ["abc", "d", "", "e" * 30, "h" * 9]}), byte_tokenizer())
    documents = datasets.concatenate_datasets([tokens, tokens.select(range(1, 4)), tokens])  # one is a slice
    owners = np.repeat(np.arange(len(documents)), [len(ids) for ids in documents["input_ids"]])
    blocks = TokenBlocks(documents, block_length)
    for index in range(len(blocks)):
        held = np.unique(owners[index * block_length : (index + 1) * block_length]).tolist()
        assert list(blocks.documents(index)) == held
    with pytest.raises(IndexError):
        blocks.documents(len(blocks))


def bad_empty(folder):
    (folder / "a.txt").write_text("")


def bad_nothing(folder):
    (folder / "a.pdf").write_text("text")


def bad_binary(folder):
    (folder / "a.txt").write_bytes(b"text\0\1\2")


def bad_encoding(folder):
    (folder / "fine.txt").write_text("fine")
    (folder / "latin.txt").write_bytes("caf\xe9 au lait".encode("latin-1"))


def bad_jsonl(folder):
    (folder / "rows.jsonl").write_text('{"text": "fine"}\n{"text": \n')


def bad_column(folder):
    (folder / "rows.jsonl").write_text('{"body": "fine"}\n')


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (bad_empty, "expected some text, got none in .*a.txt"),
        (bad_nothing, r"expected .txt, .jsonl, .json, .parquet files .*, got .* with none of them"),
        (bad_binary, "expected text, got binary in .*a.txt"),
        (bad_encoding, "expected UTF-8, got .*latin.txt with .* at byte 3"),
        (bad_jsonl, "could not read .*rows.jsonl"),
        (bad_column, "text-column: expected one of body in .*, got 'text'"),
    ],
)
def test_bad_folders(tmp_path, make, message):
    folder = tmp_path / "data"
    folder.mkdir()
    make(folder)
    with pytest.raises(InputError, match=message) as caught:
        load_corpus(str(folder))
    assert "\n" not in str(caught.value)


def test_a_source_that_is_nowhere():
    with pytest.raises(
        InputError, match="data: expected stdlib, a file, a folder or a dataset on the Hub, got 'no/such'"
    ):
        load_corpus("no/such")


def test_too_little_text_to_hold_any_out(tmp_path):
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(InputError, match="expected enough text to hold some out"):
        load_corpus(str(tmp_path / "a.txt"))


def test_a_file_that_cannot_be_read(tmp_path):
    (tmp_path / "a.txt").symlink_to(tmp_path / "gone")
    with pytest.raises(InputError, match="data: "):
        load_corpus(str(tmp_path))
