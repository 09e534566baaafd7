"""Files are old or new, links are not followed, a lock has one holder, and JSON is JSON."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flashmhf.errors import InputError
from flashmhf.files import (
    append_to,
    atomic_write,
    exclusive_lock,
    json_text,
    parse_json,
    read_json,
    remove_leftovers,
    temporary_file,
    write_json,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_written_with_the_permissions_of_any_other(tmp_path):
    atomic_write(tmp_path / "a", "text")
    (tmp_path / "b").touch()
    assert (tmp_path / "a").read_text() == "text"
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode
    assert names(tmp_path) == ["a", "b"]


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    atomic_write(tmp_path / "a", "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*/a'"):
        atomic_write(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_a_link_in_the_place_of_a_file_is_replaced_not_followed(tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "result.json").symlink_to("victim")
    write_json(tmp_path / "result.json", {"a": 1})
    assert (tmp_path / "victim").read_text() == "precious"
    assert read_json(tmp_path / "result.json") == {"a": 1}


def use_lock(file: Path) -> None:
    with exclusive_lock(file):
        pass


def append(file: Path) -> None:
    with append_to(file) as opened:
        opened.write(b"x")


@pytest.mark.parametrize("use", [use_lock, append])
@pytest.mark.parametrize("kind", ["link", "dangling", "folder", "pipe"])
def test_what_is_not_a_regular_file_is_refused_at_once(tmp_path, use, kind):
    (tmp_path / "victim").write_text("precious")
    file = tmp_path / "file"
    {
        "link": lambda: file.symlink_to("victim"),
        "dangling": lambda: file.symlink_to("nothing"),
        "folder": file.mkdir,
        "pipe": lambda: os.mkfifo(file),
    }[kind]()
    with pytest.raises(InputError, match=r"expected a regular file, got a link, a folder or a device at .*file"):
        use(file)
    assert (tmp_path / "victim").read_text() == "precious"
    assert names(tmp_path) == ["file", "victim"]


def test_a_lock_keeps_what_the_file_holds_under_another_name(tmp_path):
    (tmp_path / "victim").write_text("precious")
    os.link(tmp_path / "victim", tmp_path / "lock")
    use_lock(tmp_path / "lock")
    assert (tmp_path / "victim").read_text() == "precious"


HOLD = """
import fcntl, os, sys, time
from pathlib import Path
from flashmhf.files import exclusive_lock
lock, gone = Path(sys.argv[1]), sys.argv[2:]
real = fcntl.lockf
def slow(*arguments):  # opened before the first process leaves, locked after
    print("opened", flush=True)
    sys.stdin.readline()
    fcntl.lockf = real
    return real(*arguments)
fcntl.lockf = slow
try:
    with exclusive_lock(lock):
        print("inside", flush=True)
        sys.stdin.readline()
except BlockingIOError:
    print("refused", flush=True)
"""


def start_holder(lock: Path) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "opened\n"
    return process


def go_on(process: subprocess.Popen) -> str:
    process.stdin.write("\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


def test_two_processes_never_hold_one_lock(tmp_path):
    lock = tmp_path / "lock"
    with exclusive_lock(lock):
        during, after = start_holder(lock), start_holder(lock)
        assert go_on(during) == "refused"
    assert go_on(after) == "inside"  # it had opened the file that the first one removed
    with pytest.raises(BlockingIOError, match=r"used by another process: '.*lock'"), exclusive_lock(lock):
        pass
    after.communicate("\n")
    assert during.wait() == after.returncode == 0
    use_lock(lock)
    assert names(tmp_path) == []


def test_a_lock_ends_with_its_process(tmp_path):
    process = start_holder(tmp_path / "lock")
    assert go_on(process) == "inside"
    process.kill()
    process.communicate()
    use_lock(tmp_path / "lock")


def test_what_a_kill_left_is_removed_and_what_is_in_use_is_not(tmp_path):
    write = "import sys, time; from pathlib import Path; from flashmhf.files import temporary_file\n"
    write += "with temporary_file(Path(sys.argv[1])): print('written', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", write, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "written\n"
    remove_leftovers(tmp_path)
    (left,) = names(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    (tmp_path / ".flashmhf-planted.tmp").symlink_to("victim")
    with temporary_file(tmp_path) as (_, temporary):
        remove_leftovers(tmp_path)
        assert names(tmp_path) == sorted([".flashmhf-planted.tmp", temporary.name])
        assert temporary.name != left


def test_numbers_that_are_not_finite_are_null():
    text = json_text({"a": float("nan"), "b": [1.5, float("-inf"), (float("inf"),)]})
    assert text == '{"a": null, "b": [1.5, null, [null]]}'
    assert parse_json("[NaN, -Infinity, 1e999, 1e3, 2]") == [None, None, None, 1000.0, 2]


@pytest.mark.parametrize(
    "content",
    [b"", b'{"a": 1', b"\0" * 20, b"[]", b"null", b"7", b"[" * 200_000, b'{"a":' * 200_000, b"\xff\xfe", b"9" * 5000],
    ids=["empty", "half", "zeroed", "list", "null", "number", "deep list", "deep object", "binary", "huge number"],
)
def test_what_is_no_json_object_is_named(tmp_path, content):
    (tmp_path / "file.json").write_bytes(content)
    with pytest.raises(InputError, match=r"expected a JSON object in .*file\.json, got "):
        read_json(tmp_path / "file.json")


@pytest.mark.parametrize("make", [Path.mkdir, lambda file: file.symlink_to("nothing"), lambda file: None])
def test_a_file_that_cannot_be_opened_is_named(tmp_path, make):
    make(tmp_path / "file.json")
    with pytest.raises(InputError, match=r"expected a JSON object in .*file\.json, got "):
        read_json(tmp_path / "file.json")
