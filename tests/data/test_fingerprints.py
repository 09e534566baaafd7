"""Fingerprints of data: other text is another fingerprint, another place or spelling is not."""

import shutil

import datasets
import pytest

from flashmhf.data import DataConfig, load_blocks, load_corpus
from flashmhf.data.tokenizer import byte_tokenizer


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "data"
    (made / "val").mkdir(parents=True)
    for i in range(24):
        (made / f"{i:02d}.txt").write_text(f"Text number {i}, long enough to be cut.")
    (made / "val/a.txt").write_text("Held out text, and some more of it.")
    return made


def change_text(folder):
    (folder / "03.txt").write_text("Text number X, long enough to be cut.")


def change_validation_text(folder):
    (folder / "val/a.txt").write_text("Other text.")


def rename(folder):
    (folder / "03.txt").rename(folder / "99.txt")


def add(folder):
    (folder / "more.txt").write_text("More.")


def to_validation(folder):
    (folder / "03.txt").rename(folder / "val/03.txt")


@pytest.mark.parametrize("change", [change_text, change_validation_text, rename, add, to_validation])
@pytest.mark.parametrize("streaming", [False, True])
def test_other_text(folder, change, streaming):
    before = load_corpus(str(folder), streaming=streaming).fingerprint
    change(folder)
    assert load_corpus(str(folder), streaming=streaming).fingerprint != before


@pytest.mark.parametrize("streaming", [False, True])
def test_another_place(folder, tmp_path, monkeypatch, streaming):
    before = load_corpus(str(folder), streaming=streaming).fingerprint
    shutil.copytree(folder, tmp_path / "elsewhere/copy", copy_function=shutil.copyfile)  # times differ, too
    assert load_corpus(str(tmp_path / "elsewhere/copy"), streaming=streaming).fingerprint == before
    monkeypatch.chdir(tmp_path)
    for spelling in ("data", "./data/", str(folder / ".." / "data")):
        assert load_corpus(spelling, streaming=streaming).fingerprint == before


def test_one_file(folder, tmp_path):
    before = load_corpus(str(folder / "00.txt")).fingerprint
    shutil.copy(folder / "00.txt", tmp_path / "renamed.txt")
    assert load_corpus(str(tmp_path / "renamed.txt")).fingerprint == before
    assert load_corpus(str(folder / "01.txt")).fingerprint != before


def test_a_mix_has_one_for_each_source(folder):
    source = f"0.5*{folder},0.5*stdlib"
    data = load_blocks(DataConfig(source=source, context_length=16), byte_tokenizer())
    assert data.fingerprints == tuple(load_corpus(one).fingerprint for one in data.sources)


def test_a_dataset_on_the_hub(folder, tmp_path, monkeypatch):
    load = datasets.load_dataset
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda name, *rest, streaming=False: load(str(tmp_path / name), *rest, streaming=streaming),
    )
    (tmp_path / "owner/books").mkdir(parents=True)

    def fingerprints(first):
        rows = [f"{first} {i}" for i in range(400)]
        datasets.Dataset.from_dict({"text": rows}).to_parquet(str(tmp_path / "owner/books/train.parquet"))
        return [load_corpus("owner/books", streaming=streaming).fingerprint for streaming in (False, True)]

    before = fingerprints("a")
    assert [load_corpus("owner/books", streaming=streaming).fingerprint for streaming in (False, True)] == before
    assert not {*before} & {*fingerprints("b")}
