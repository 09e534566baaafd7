"""`eval` and `inspect` read what the model was trained on, say so, or ask; never another text in silence."""

import json

import pytest

from flashmhf.cli.trained_data import data_of
from flashmhf.errors import InputError

NOT_GIVEN = {"data": None, "text_column": None, "bad_data": None}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run's folder whose record has these options."""
    monkeypatch.chdir(tmp_path)

    def make(**options):
        folder = tmp_path / "run"
        (folder / "checkpoint-3").mkdir(parents=True, exist_ok=True)
        record = {"version": 1, "model": "x", "directory": str(tmp_path), **options}
        (folder / "run.json").write_text(json.dumps(record))
        return str(folder)

    return make


def test_the_record_says_what_is_read(run, capsys):
    folder = run(data="owner/name", text_column="body", bad_data="skip")
    for model in (folder, f"{folder}/checkpoint-3"):
        read = data_of(model, NOT_GIVEN)
        assert (read.source, read.text_column, read.bad_data) == ("owner/name", "body", "skip")
        assert capsys.readouterr().err == "data: owner/name, which the model was trained on\n"
    assert data_of(folder, {**NOT_GIVEN, "text_column": "other"}).text_column == "other"


def test_given_data_is_not_that_of_the_record(run, capsys):
    read = data_of(run(data="owner/name", text_column="body"), {**NOT_GIVEN, "data": "stdlib"})
    assert (read.source, read.text_column) == ("stdlib", "text")
    assert capsys.readouterr().err == ""


def test_a_relative_path_is_found_from_another_folder(run, tmp_path, monkeypatch):
    (tmp_path / "books").mkdir()
    (tmp_path / "elsewhere").mkdir()
    folder = run(data="books")
    assert data_of(folder, NOT_GIVEN).source == "books"
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert data_of(folder, NOT_GIVEN).source == str(tmp_path / "books")


def test_what_is_asked_for(run, tmp_path):
    with pytest.raises(InputError, match=r"data: expected --data SOURCE, since .*/none does not record"):
        data_of(str(tmp_path / "none"), NOT_GIVEN)
    with pytest.raises(InputError, match=r"data: expected --data with one of the sources"):
        data_of(run(data="0.7*stdlib,0.3*owner/name"), NOT_GIVEN)
    with pytest.raises(InputError, match="data: no such file or folder: /gone/books"):
        data_of(run(data="/gone/books"), NOT_GIVEN)
