"""Rows on disk: complete or absent, separated by provenance, and readable after any interruption."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from lease_facts import FACTS

import gpu_rows
from gpu_rows import RowFile, UnusableError, append_failure, done, file_of, read_lines, rows_of, started


def test_a_line_has_rounded_values_and_provenance(rows):
    rows.prepare()
    rows.append("op", "a", {"median_ms": 1 / 3, "error": float("inf"), "tiles": (1, 2.00000001), "passed": True})
    (line,) = [json.loads(text) for text in rows.path.read_text().splitlines()]
    assert line["median_ms"] == 0.333333
    assert line["error"] == "inf"
    assert line["tiles"] == [1, 2.0]
    assert line["passed"] is True
    assert all(line[key] == value for key, value in FACTS.items())


def test_files_are_named_by_device_and_commit(tmp_path):
    assert file_of(tmp_path, FACTS | {"device": "NVIDIA H100 80GB HBM3"}).name == "nvidia-h100-80gb-hbm3-abc.jsonl"
    assert file_of(tmp_path, FACTS | {"commit": "1234567"}).name == "toy-gpu-1234567.jsonl"


@pytest.mark.parametrize("change", [{"code": "def"}, {"device": "Other"}, {"torch": "3"}, {"triton": "4"}])
def test_rows_of_another_device_version_or_code_belong_to_another_run(rows, change):
    rows.append("op", "a", {"state": "done"})
    other = RowFile(rows.path, FACTS | change)
    assert other.read() == []
    other.append("op", "b", {"state": "done"})
    assert (done(rows.read(), "op"), done(other.read(), "op")) == ({"a"}, {"b"})


def test_state_lines_are_not_rows(rows):
    rows.append("op", "a", {"state": "started", "variant": "x"})
    rows.append("op", "a", {"value": 1})
    assert (started(rows.read(), "op"), done(rows.read(), "op")) == ({"a"}, set())
    append_failure(rows, "op", "a", rows.read()[0], "no row for 3 s")
    assert done(rows.read(), "op") == {"a"}
    assert [row.get("failed") for row in rows_of(rows.read(), "op")] == [None, "no row for 3 s"]
    assert rows_of(rows.read())[1]["variant"] == "x"
    assert rows_of(rows.read(), "layer") == []


def test_a_failed_attempt_leaves_its_case_open(rows):
    append_failure(rows, "op", "a", {"state": "trying", "variant": "x"}, "killed by SIGKILL")
    assert done(rows.read(), "op") == set()


def test_a_truncated_line_is_ignored_and_the_next_is_complete(rows):
    rows.append("op", "a", {"value": 1})
    with rows.path.open("ab") as file:
        file.write(b'{"step": "op", "case": "b", "val')
    rows.prepare()
    rows.append("op", "c", {"value": 3})
    lines, corrupt = read_lines(rows.path)
    assert [line["value"] for line in lines] == [1, 3]
    assert corrupt == 1


@pytest.mark.parametrize("text", [b"[1]\n", b'{"value": 1}\n', b"\xff\xfe\n", b"null\n"])
def test_corrupt_lines_are_counted(rows, text):
    rows.path.write_bytes(b"\n" + text)
    assert read_lines(rows.path) == ([], 1)


def test_no_write_access_is_a_one_line_error(tmp_path):
    (tmp_path / "taken").write_text("a file, no folder")
    with pytest.raises(UnusableError, match=r"^output: cannot write to '.*taken/x.jsonl': ") as raised:
        RowFile(tmp_path / "taken/x.jsonl", FACTS).prepare()
    assert "\n" not in str(raised.value)


def test_an_unreadable_file_is_a_one_line_error(tmp_path):
    with pytest.raises(UnusableError, match=r"^rows: cannot read '.*': Is a directory"):
        read_lines(tmp_path)


FULL = """
import resource, signal, sys
from pathlib import Path
from gpu_rows import RowFile, UnusableError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
rows = RowFile(Path(sys.argv[1]), {})
rows.append("op", "a", {"value": 1})
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
try:
    rows.append("op", "b", {"value": "x" * 200})
except UnusableError as error:
    print(error)
"""


def test_a_full_disk_leaves_the_earlier_rows(tmp_path):
    file = tmp_path / "rows.jsonl"
    command = [sys.executable, "-c", FULL, str(file)]
    environment = {**os.environ, "PYTHONPATH": str(Path(gpu_rows.__file__).parent)}
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert printed.strip() == f"output: cannot write to {str(file)!r}: the disk is full"
    assert read_lines(file) == ([{"step": "op", "case": "a", "value": 1}], 0)


def test_a_write_error_leaves_the_earlier_rows(rows, monkeypatch):
    rows.append("op", "a", {"value": 1})

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UnusableError, match="No space left on device"):
            rows.append("op", "b", {"value": 2})
    assert [row["value"] for row in rows_of(rows.read())] == [1]
