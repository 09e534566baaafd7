"""What the operating system refuses ends every command with one line; a bug still shows where it is."""

import errno
import os
import subprocess
import sys

import pytest
from safetensors import SafetensorError

from flashmhf import cli
from flashmhf.system_errors import is_disk_full, system_error


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def os_error(number: int, *name: str) -> OSError:
    return OSError(number, os.strerror(number), *name)


REFUSED = {
    "full disk": (os_error(errno.ENOSPC, "a/file"), "[Errno 28] No space left on device: 'a/file'"),
    "quota": (os_error(errno.EDQUOT, "a/file"), "[Errno 122] Disk quota exceeded: 'a/file'"),
    "descriptors": (os_error(errno.EMFILE, "a/file"), "[Errno 24] Too many open files: 'a/file'"),
    "read-only": (os_error(errno.EROFS, "a/file"), "[Errno 30] Read-only file system: 'a/file'"),
    "long name": (os_error(errno.ENAMETOOLONG, "a" * 300), "[Errno 36] File name too long: 'aaa"),
    "gone": (os_error(errno.ENOENT, "a/file"), "[Errno 2] No such file or directory: 'a/file'"),
    "no permission": (os_error(errno.EACCES, "a/file"), "[Errno 13] Permission denied: 'a/file'"),
    "memory": (MemoryError(), "MemoryError"),
    "safetensors": (
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        "Error while serializing: I/O error: No space left on device (os error 28)",
    ),
    "wrapped": (caused(RuntimeError("An error occurred"), os_error(errno.ENOSPC)), "[Errno 28] No space left on"),
    "shared memory": (
        RuntimeError("unable to allocate shared memory(shm) for file </torch_1>:\n No space left on device (28)"),
        "unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)",
    ),
    "worker": (
        caused(
            RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"),
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that"),
        ),
        "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_one_line(kind, monkeypatch, capsys):
    error, line = REFUSED[kind]

    def command(**options) -> None:
        raise error

    monkeypatch.setattr(cli, "app", command)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    captured = capsys.readouterr().err
    assert captured.startswith(f"flashmhf: {line}")
    assert captured.count("\n") == 1


@pytest.mark.parametrize("error", [RuntimeError("a bug"), caused(KeyError("name"), ValueError("text")), ValueError()])
def test_a_bug_is_raised(error, monkeypatch):
    def command(**options) -> None:
        raise error

    monkeypatch.setattr(cli, "app", command)
    with pytest.raises(type(error)):
        cli.main()


def test_causes_that_point_at_each_other_end():
    first, second = RuntimeError("first"), RuntimeError("second")
    first.__cause__, second.__cause__ = second, first
    assert system_error(first) is None
    assert not is_disk_full(first)
    assert is_disk_full(caused(RuntimeError(), os_error(errno.EDQUOT)))
    assert not is_disk_full(os_error(errno.EMFILE))


INFO = [sys.executable, "-m", "flashmhf", "info", "flashmhf-tiny", "--json"]


@pytest.mark.slow
def test_a_result_that_cannot_be_written():
    with open("/dev/full", "w") as full:
        ended = subprocess.run(INFO, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr == "flashmhf: [Errno 28] No space left on device\n"


@pytest.mark.slow
def test_a_reader_that_has_left_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    ended = subprocess.run(INFO, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (1, "")
