"""The cache of tokens: written once, completely or not at all, and used only for its content and tokenizer."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest

from flashmhf.data import corpus as corpus_module
from flashmhf.data import tokens, workers
from flashmhf.data.corpus import load_corpus
from flashmhf.data.tokenizer import byte_tokenizer, encode_documents, train_bpe
from flashmhf.data.tokens import tokenize
from flashmhf.data.workers import count_rows, count_workers


@pytest.fixture
def calls(monkeypatch):
    """Documents encoded in this process since the list was cleared."""
    seen: list[str] = []

    def counting(tokenizer, texts):
        seen.extend(texts)
        return encode_documents(tokenizer, texts)

    monkeypatch.setattr(tokens, "encode_documents", counting)
    return seen


def ids_of(folder, tokenizer) -> list[list[int]]:
    return tokenize(load_corpus(str(folder)).train, tokenizer)["input_ids"]


def test_tokenised_once(books, calls):
    first = ids_of(books, byte_tokenizer())
    assert len(calls) > 30
    calls.clear()
    os.utime(books / "00.txt")  # touched, not changed
    assert ids_of(books, byte_tokenizer()) == first
    assert calls == []
    tokenised = tokenize(load_corpus(str(books)).train, byte_tokenizer())
    assert tokenised.cache_files
    assert str(tokenised.features["input_ids"].feature.dtype) == "uint16"


def test_other_content_or_another_tokenizer_builds_it_again(books, calls):
    ids_of(books, byte_tokenizer())
    file = books / "03.txt"
    before, text = file.stat(), file.read_text()
    file.write_text(text.replace("Book", "Buch"))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # neither size nor time tells
    calls.clear()
    assert list(file.read_bytes()) in [ids[:-1] for ids in ids_of(books, byte_tokenizer())]
    assert calls
    calls.clear()
    ids_of(books, train_bpe(["word after word"] * 9, 262))
    assert calls


def test_files_that_change_while_they_are_read_are_read_again(books, monkeypatch):
    before = (books / "05.txt").read_text()
    key_of, changes = corpus_module.content_key, []

    def change_after_hashing(*arguments):
        key = key_of(*arguments)
        if not changes:
            changes.append((books / "05.txt").write_text("Changed, and longer or shorter than before."))
        return key

    monkeypatch.setattr(corpus_module, "content_key", change_after_hashing)
    corpus = load_corpus(str(books))
    found = [*corpus.train["text"], *corpus.validation["text"]]
    assert "Changed, and longer or shorter than before." in found
    assert len(found) == 40
    (books / "05.txt").write_text(before)
    corpus = load_corpus(str(books))
    assert before in [*corpus.train["text"], *corpus.validation["text"]]


def test_several_processes_give_the_same(books, own_cache, monkeypatch):
    expected = ids_of(books, byte_tokenizer())
    monkeypatch.setattr(workers, "WORKER_BYTES", 1000)
    monkeypatch.setattr(workers.os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", own_cache / "other")
    assert ids_of(books, byte_tokenizer()) == expected
    assert len(list((own_cache / "other").rglob("tokens_*_of_00002.arrow"))) == 2


def test_workers_are_bounded(monkeypatch):
    monkeypatch.setattr(workers.os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    assert count_workers(2**40, 1000) == 6
    assert count_workers(2**40, 3) == 3
    assert count_workers(2**20, 1000) == 1


def test_few_long_documents_are_held_at_once():
    assert [count_rows(size) for size in (0, 1000, 2**20, 2**23, 2**30)] == [64, 64, 32, 4, 1]


def test_large_documents_are_encoded_few_at_once():
    texts = ["a" * 10, "b" * tokens.BATCH_CHARACTERS, "c", "d", "e" * (tokens.BATCH_CHARACTERS - 1)]
    assert [[text[0] for text in part] for part in tokens._parts(texts)] == [["a"], ["b"], ["c", "d"], ["e"]]


SLOW = """
import sys, time
from pathlib import Path
import datasets
datasets.config.HF_DATASETS_CACHE = Path(sys.argv[2])
from flashmhf.data import tokens
from flashmhf.data.corpus import load_corpus
from flashmhf.data.tokenizer import byte_tokenizer
tokens.rows_at_once = lambda documents: 4
plain = tokens.encode_documents
def slow(tokenizer, texts):
    print("encoding", flush=True)
    time.sleep(0.05)
    return plain(tokenizer, texts)
tokens.encode_documents = slow
tokens.tokenize(load_corpus(sys.argv[1]).train, byte_tokenizer())
"""


def kill_while_tokenising(books: Path, cache: Path, batches: int) -> str:
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, str(books), str(cache)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for _ in range(batches):
        assert process.stdout.readline() == "encoding\n"
    time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    return process.communicate()[1]


def test_a_kill_leaves_nothing_that_counts_as_complete(books, own_cache, calls):
    errors = kill_while_tokenising(books, own_cache, 5)
    assert "tokenizing" in errors  # progress, on standard error
    cached = ids_of(books, byte_tokenizer())
    assert len(calls) == len(cached)
    assert cached == [[*text.encode(), 256] for text in load_corpus(str(books)).train["text"]]
