"""Which files of a folder are read: links, capitals, hidden files, pipes; and that what is passed over is said."""

import gzip
import lzma
import os
import socket

import datasets
import pytest

from flashmhf.data import DataConfig, load_blocks, load_corpus
from flashmhf.data import listing as listing_module
from flashmhf.data.files import read_rows
from flashmhf.data.listing import list_files
from flashmhf.data.tokenizer import byte_tokenizer
from flashmhf.errors import InputError


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "data"
    made.mkdir()
    (made / "a.txt").write_text("Some text of a file.")
    return made


def names(folder):
    listing = list_files(folder)
    return [path.relative_to(folder).as_posix() for path in listing.files], dict(listing.passed_over)


def test_links(folder, tmp_path):
    disk = tmp_path / "disk"
    (disk / "deep").mkdir(parents=True)
    (disk / "b.txt").write_text("b")
    (disk / "deep/c.txt").write_text("c")
    (folder / "more").symlink_to(disk)
    (folder / "again").symlink_to(disk)
    (folder / "loop").symlink_to(folder)
    (disk / "deep/up").symlink_to(disk)
    (folder / "one.txt").symlink_to(disk / "b.txt")
    (folder / "hard.txt").hardlink_to(folder / "a.txt")
    (folder / "gone.txt").symlink_to(tmp_path / "nowhere")
    (folder / "circle.txt").symlink_to(folder / "circle.txt")
    files, passed_over = names(folder)
    assert files == ["a.txt", "again/b.txt", "again/deep/c.txt", "circle.txt", "gone.txt"]
    assert set(passed_over) == {"reached before, through a link"}
    assert sorted(passed_over["reached before, through a link"]) == [
        "again/deep/up", "hard.txt", "loop", "more", "one.txt"
    ]  # fmt: skip


def test_a_path_without_links_comes_first(folder, tmp_path):
    (folder / "validation").mkdir()
    (folder / "validation/v.txt").write_text("Held out.")
    (folder / "a_link").symlink_to(folder / "validation")
    assert load_corpus(str(folder)).validation["text"][:] == ["Held out."]


@pytest.mark.parametrize("name", ["B.TXT", "b.Jsonl", "b.JSON.GZ", "b.txt.XZ", "b.PARQUET"])
def test_endings_in_capitals(folder, name):
    if name.endswith("PARQUET"):
        datasets.Dataset.from_dict({"text": ["Text of b."]}).to_parquet(str(folder / name))
    else:
        content = b"Text of b." if "txt" in name.lower() else b'{"text": "Text of b."}'
        pack = {".GZ": gzip.compress, ".XZ": lzma.compress}.get(name[-3:], bytes)
        (folder / name).write_bytes(pack(content))
    rows = read_rows([str(file) for file in list_files(folder).files], "text")
    assert sorted(row["text"] for row in rows) == ["Some text of a file.", "Text of b."]


def test_what_is_passed_over(folder, caplog):
    for i in range(5):
        (folder / f"notes{i}.md").write_text("notes")
    (folder / ".hidden.txt").write_text("hidden")
    (folder / ".git").mkdir()
    (folder / ".git/a.txt").write_text("hidden, too")
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__/a.pyc").write_text("")
    (folder / "TEST").mkdir()
    (folder / "TEST/t.txt").write_text("not for training")
    (folder / "a.txt.zip").write_text("")
    (folder / "\x1b[2Jx").write_text("")
    os.mkfifo(folder / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(str(folder / "s.txt"))
        with caplog.at_level("INFO", logger="flashmhf"):
            data = load_blocks(DataConfig(source=str(folder), context_length=1), byte_tokenizer())
    expected = (
        "passed over 13: 2 hidden (.git, .hidden.txt), 2 not regular files (pipe.txt, s.txt), "
        "8 of another format (\\x1b[2Jx, __pycache__/a.pyc, a.txt.zip, ...), 1 of another split (TEST/t.txt)"
    )
    lines = [record.getMessage() for record in caplog.records]
    assert f"data: reading 1 file, 0.0 MB in {folder}" in lines
    (line,) = [line for line in lines if "passed over" in line]
    assert line == f"data: {expected} in {folder}"
    assert data.read_summary() == f"{folder}: read 1 file, 0.0 MB; {expected}"


def test_a_pipe_is_never_opened(tmp_path):
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(InputError, match=r"expected a file or a folder, got .*a.txt, which is neither"):
        load_corpus(str(tmp_path / "a.txt"))
    with pytest.raises(InputError, match=r"with none of them \(passed over 1: 1 not regular files \(a.txt\)\)"):
        load_corpus(str(tmp_path))


def test_a_folder_that_cannot_be_listed(folder, monkeypatch):
    (folder / "secret").mkdir()
    scan = os.scandir

    def refusing(path):
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(listing_module.os, "scandir", refusing)
    with pytest.raises(InputError, match=r"could not list .*secret: Permission denied; --bad-data skip leaves it out"):
        load_corpus(str(folder))
    assert load_corpus(str(folder), bad_data="skip").bad_data.counts == {"unreadable file": 1}


def test_a_missing_decompressor(folder, monkeypatch):
    (folder / "b.txt.zst").write_bytes(b"")
    monkeypatch.setattr(listing_module, "infer_compression", lambda name: None)
    with pytest.raises(InputError, match=r"expected the package zstandard to be installed for .zst, got .*b.txt.zst"):
        load_corpus(str(folder))
