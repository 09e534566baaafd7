"""A folder and its manifest: whatever happens to a file afterwards is named."""

import json
from pathlib import Path

import pytest

from flashmhf.training.manifest import MANIFEST, check, write_manifest


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/shard").write_bytes(bytes(range(256)) * 99)
    (tmp_path / "state.json").write_text("{}")
    (tmp_path / "empty").touch()
    write_manifest(tmp_path)
    return tmp_path


def test_what_was_written_fits(folder):
    assert check(folder) is None
    entries = json.loads((folder / MANIFEST).read_text())["files"]
    assert sorted(entries) == ["empty", "state.json", "weights/shard"]
    assert entries["weights/shard"]["size"] == 256 * 99
    assert len(entries["empty"]["sha256"]) == 64
    write_manifest(folder)  # again: the manifest does not list itself
    assert check(folder) is None


def test_a_truncated_file_is_found_at_every_length(folder):
    whole = (folder / "state.json").read_bytes()
    for size in range(len(whole)):
        (folder / "state.json").write_bytes(whole[:size])
        assert check(folder) == f"state.json has {size} bytes instead of 2"


def test_every_flipped_byte_is_found(folder):
    file = folder / "weights/shard"
    whole = file.read_bytes()
    for position in (0, 1, 1000, len(whole) - 1):
        altered = bytearray(whole)
        altered[position] ^= 1
        file.write_bytes(altered)
        assert check(folder) == "weights/shard does not have the sha256 it was written with"
        assert check(folder, contents=False) is None


def test_missing_and_added_files(folder):
    (folder / "empty").unlink()
    assert check(folder) == "empty is missing"
    (folder / "empty").touch()
    (folder / "weights/other").write_text("x")
    assert check(folder) == "weights/other is not in its manifest.json"


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"files": 3}', '{"files": {"empty": 0}}', '{"files": {"empty": {"size": 0}}}', '{"version": 1}'],
)
def test_a_manifest_that_is_none(folder, text):
    (folder / MANIFEST).write_text(text)
    assert check(folder) == "manifest.json is corrupt"


def test_no_manifest(folder):
    (folder / MANIFEST).unlink()
    assert check(folder) == "manifest.json is missing"
    assert check(folder / "nowhere") == "manifest.json is missing"


def test_names_that_lead_out_of_the_folder_are_missing(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "file"
    outside.touch()
    entry = json.loads((folder / MANIFEST).read_text())["files"]["empty"]
    (folder / MANIFEST).write_text(json.dumps({"files": {str(outside): entry}}))
    assert check(folder) == f"{outside} is missing"
