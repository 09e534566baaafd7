"""Named splits, of folders and of datasets in the Hub's layout."""

import datasets
import pytest

from flashmhf.data.corpus import load_corpus
from flashmhf.data.splits import load_documents, truncate_documents
from flashmhf.errors import InputError

SIZES = {"train": 30, "validation": 4, "test": 3}


def contents(split):
    return [f"{split} text {i}" for i in range(SIZES[split])]


@pytest.fixture
def layout(tmp_path):
    """owner/books as its parquet files lie on the Hub."""
    folder = tmp_path / "owner/books"
    (folder / "data").mkdir(parents=True)
    for split in SIZES:
        rows = datasets.Dataset.from_dict({"text": contents(split), "short_book_title": ["A Title"] * SIZES[split]})
        rows.to_parquet(str(folder / f"data/{split}-00000-of-00001.parquet"))
    return folder


@pytest.fixture
def hub(layout, monkeypatch):
    """A Hub that holds owner/books and records whether it is asked to stream."""
    load, streamed = datasets.load_dataset, []

    def load_here(name, *arguments, streaming=False):
        streamed.append(streaming)
        return load(str(layout.parent.parent / name), *arguments, streaming=streaming)

    monkeypatch.setattr(datasets, "load_dataset", load_here)
    return streamed


@pytest.mark.parametrize("offline", [True, False])
def test_a_split_of_a_dataset_on_the_hub(hub, monkeypatch, offline):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", offline)
    for split in ("test", "validation"):
        assert load_documents("owner/books", split=split)["text"][:] == contents(split)
    assert hub == [not offline] * 2
    assert len(load_documents("owner/books", split="train")) == 30
    assert len(load_documents("owner/books", split="all")) == 34
    with pytest.raises(InputError, match=r"split: .* or one of train, validation, test in owner/books, got 'tset'"):
        load_documents("owner/books", split="tset")


def test_a_dataset_without_a_validation_split_is_split_as_for_training(hub, layout):
    (layout / "data/validation-00000-of-00001.parquet").unlink()
    held_out = load_documents("owner/books")["text"][:]
    assert held_out == load_corpus("owner/books").validation["text"][:]
    assert set(held_out) <= set(contents("train"))


def test_a_copy_of_the_hubs_folder(layout):
    corpus = load_corpus(str(layout))
    assert corpus.train["text"][:] == contents("train")  # the test split is left alone
    assert corpus.validation["text"][:] == contents("validation")
    for split in SIZES:
        assert load_documents(str(layout), split=split)["text"][:] == contents(split)
    with pytest.raises(InputError, match=r"split: expected validation, train or all, got 'tset', which .*books lacks"):
        load_documents(str(layout), split="tset")
    with pytest.raises(InputError, match="split: expected validation, train or all, got 'test', which stdlib lacks"):
        load_documents("stdlib", split="test")


def test_a_dataset_of_a_script_is_refused_with_a_way_out(monkeypatch):
    def load_script(*arguments, **options):
        raise RuntimeError("Dataset scripts are no longer supported, but found pg19.py")

    monkeypatch.setattr(datasets, "load_dataset", load_script)
    with pytest.raises(InputError, match=r"found pg19.py; use a copy in parquet"):
        load_documents("deepmind/pg19", split="test")


def test_truncation_ends_between_characters():
    documents = datasets.Dataset.from_dict({"text": ["naïve", "abc", ""], "origin": ["a", "b", "c"]})
    assert list(truncate_documents(documents, 3)["text"]) == ["na", "abc", ""]  # ï takes bytes 3 and 4
    assert list(truncate_documents(documents, 4)["text"]) == ["naï", "abc", ""]
    assert list(truncate_documents(documents, 4)["origin"]) == ["a", "b", "c"]
    with pytest.raises(InputError, match="document-bytes: expected 1 or more, got 0"):
        truncate_documents(documents, 0)
