"""Paths, presets and ids on the Hub are told apart, and misspelt names get a suggestion."""

import pytest

from flashmhf.data.corpus import load_corpus
from flashmhf.data.tokenizer import load_tokenizer
from flashmhf.errors import InputError
from flashmhf.models.loading import load_config
from flashmhf.names import check_exists, check_model, did_you_mean, looks_like_path

PATHS = ("./books", "../a", "~/books", "/data/books", "a/b/c", "books.txt", "tok/tokenizer.JSON", "books/", "c:\\books")
IDS = ("wikitext", "Salesforce/wikitext", "a/b:sub/set", "Qwen/Qwen2.5-0.5B", "meta-llama/Llama-3.2-1B", "gpt2", "")


def test_what_looks_like_a_path():
    assert [name for name in PATHS if not looks_like_path(name)] == []
    assert [name for name in IDS if looks_like_path(name)] == []


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize(
    ("read", "option"),
    [(load_corpus, "data"), (load_tokenizer, "tokenizer"), (load_config, "model")],
    ids=["data", "tokenizer", "model"],
)
def test_a_path_is_never_looked_for_on_the_hub(read, option, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        read(name)
    assert str(caught.value) == f"{option}: no such file or folder: {name}"


def test_suggestions(tmp_path):
    (tmp_path / "books.txt").touch()
    with pytest.raises(InputError, match=r"did you mean .*/books\.txt\?$"):
        check_exists("data", str(tmp_path / "boks.txt"))
    with pytest.raises(InputError, match=r"got 'flashmhf-tny'; did you mean flashmhf-tiny\?$"):
        check_model("flashmhf-tny")
    with pytest.raises(InputError, match=r"a preset \(dense_moe-tiny, flashmhf-1\.3b, "):
        check_model("gpt-9")
    assert did_you_mean("xyz", ["abc"]) == ""
