"""The cache of rows and tokens: what is damaged is built again, what cannot be written is one line."""

import os
import resource
import shutil
import time

import datasets
import pytest

from flashmhf.data.cache import BUILDING, FOLDER, SEAL, cached
from flashmhf.data.corpus import load_corpus
from flashmhf.data.tokenizer import byte_tokenizer
from flashmhf.data.tokens import tokenize
from flashmhf.errors import RunError
from flashmhf.files import exclusive_lock


@pytest.fixture
def entries(own_cache):
    return own_cache / FOLDER


def read(books):
    corpus = load_corpus(str(books))
    return corpus.validation["text"][:], tokenize(corpus.train, byte_tokenizer())["input_ids"][:]


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def cut_to_nothing(file):
    file.write_bytes(b"")


def zero(file):
    file.write_bytes(bytes(file.stat().st_size))


def zero_the_middle(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 64] = bytes(64)
    file.write_bytes(content)


def lengthen(file):
    file.write_bytes(file.read_bytes() + b"more")


def remove(file):
    file.unlink()


def make_a_folder(file):
    file.unlink()
    file.mkdir()


def of_another_type(file):
    file.write_text("[1, 2]")


def nested(file):
    file.write_text("[" * 200_000)


DAMAGES = [cut, cut_to_nothing, zero, zero_the_middle, lengthen, remove, make_a_folder, of_another_type, nested]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("pattern", ["*.arrow", SEAL])
def test_a_damaged_entry_is_built_again(books, entries, caplog, pattern, damage):
    expected = read(books)
    files = sorted(entries.rglob(pattern))
    assert len(files) == 2  # of rows and of tokens
    for file in files:
        damage(file)
    caplog.clear()
    assert read(books) == expected
    for file in files:
        (entry,) = {parent for parent in file.parents if parent.parent == entries}
        assert any(str(entry) in record.getMessage() for record in caplog.records)
    caplog.clear()
    assert read(books) == expected
    assert not [record for record in caplog.records if "built again" in record.getMessage()]
    assert all(path.is_dir() and path.suffix == "" for path in entries.iterdir())


def test_a_file_or_a_link_in_the_place_of_an_entry(books, entries, tmp_path):
    expected = read(books)
    rows, tokens = entries.iterdir()
    shutil.rmtree(rows)
    rows.write_text("")
    tokens.rename(tmp_path / "moved")
    tokens.symlink_to(tmp_path / "moved")
    (tmp_path / "moved" / SEAL).unlink()
    assert read(books) == expected
    assert all(path.is_dir() and not path.is_symlink() for path in entries.iterdir())
    assert (tmp_path / "moved").exists()


def test_a_cache_that_cannot_be_written(books, entries):
    entries.parent.mkdir()
    entries.write_text("a file")
    with pytest.raises(RunError, match=f"could not write the cache in {entries}: .*; HF_DATASETS_CACHE selects"):
        read(books)


@pytest.mark.parametrize("limit", [1000, 30_000])
def test_a_full_disk(books, entries, limit):
    """Stood in for by a limit on the size of files."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(RunError, match=f"could not write the cache in {entries}: File too large") as caught:
            read(books)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(caught.value)
    assert not list(entries.glob(f"*{BUILDING}"))
    assert len(read(books)[1]) > 30


def test_what_a_killed_process_left_is_removed(books, entries):
    entries.mkdir(parents=True)
    for name in ("left", "in_use"):
        (entries / f"{name}{BUILDING}").mkdir()
        (entries / f"{name}{BUILDING}/part.arrow").write_bytes(b"part")
    held, parent = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:  # another process still builds one of them
        with exclusive_lock(entries / "in_use.lock"):
            os.write(held[1], b"1")
            os.read(parent[0], 1)
        os._exit(0)
    os.read(held[0], 1)
    read(books)
    os.write(parent[1], b"1")
    os.waitpid(child, 0)
    assert [path.name for path in entries.glob(f"*{BUILDING}")] == [f"in_use{BUILDING}"]


def test_processes_that_need_the_same_entry_build_it_once(tmp_path):
    log = tmp_path / "builds"

    def build(folder):
        with log.open("a") as opened:
            opened.write("built\n")
        time.sleep(0.5)
        rows = datasets.Dataset.from_dict({"text": ["a"]})
        return rows.map(lambda row: row, cache_file_name=str(folder / "a.arrow"), load_from_cache_file=False)

    child = os.fork()
    found = cached("key", build)["text"][:]
    if child == 0:
        os._exit(0 if found == ["a"] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert found == ["a"]
    assert log.read_text() == "built\n"
