"""Converted folders appear complete or not at all: kills, full disks and two conversions at once."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flashmhf.errors import InputError
from flashmhf.models.reference.conversion import convert
from flashmhf.new_folder import new_folder
from reference_model import reference_config, reference_model, save_reference

WRITER = """
import sys, time
from pathlib import Path
from flashmhf.new_folder import new_folder
with new_folder("DST", Path(sys.argv[1])) as folder:
    (folder / "part").write_text("half")
    print("writing", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def start(destination: Path, seconds: float) -> subprocess.Popen:
    """A process that writes for a while; returns once it does."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(destination), str(seconds)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    return process


@pytest.fixture
def source(tmp_path):
    config = reference_config()
    save_reference(reference_model(config), config, tmp_path / "theirs")
    return tmp_path / "theirs"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_a_kill_leaves_is_removed_by_the_next_conversion_to_the_same_folder(source, tmp_path):
    killed = start(tmp_path / "ours", 60)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert len(names(tmp_path)) > 1
    assert not (tmp_path / "ours").exists()
    convert(source, tmp_path / "another")
    assert any("ours" in name for name in names(tmp_path))  # perhaps somebody else's, who is still writing
    convert(source, tmp_path / "ours")
    assert names(tmp_path) == ["another", "ours", "theirs"]
    assert "part" not in names(tmp_path / "ours")


def test_two_conversions_to_one_folder(source, tmp_path):
    first = start(tmp_path / "ours", 1.0)
    with pytest.raises(InputError, match=r"DST: expected a folder that no other process writes, got .*ours"):
        convert(source, tmp_path / "ours")
    assert first.wait() == 0
    assert names(tmp_path / "ours") == ["part"]
    assert names(tmp_path) == ["ours", "theirs"]


def test_a_folder_that_somebody_filled_meanwhile_is_left_alone(tmp_path):
    def fill(folder: Path) -> None:
        with new_folder("DST", folder):
            folder.mkdir()
            (folder / "precious").write_text("kept")

    with pytest.raises(OSError, match=r"DST: .*ours cannot be written"):
        fill(tmp_path / "ours")
    assert names(tmp_path) == ["ours"]
    assert (tmp_path / "ours/precious").read_text() == "kept"


def test_a_link_in_the_place_of_the_unfinished_folder_is_not_followed(source, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/file").write_text("kept")
    (tmp_path / ".ours-flashmhf-unfinished").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match=r"DST: .*ours cannot be written"):
        convert(source, tmp_path / "ours")
    assert (tmp_path / "precious/file").read_text() == "kept"


@pytest.mark.parametrize("function", ["save_file", "shutil.copyfile"])
def test_a_full_disk_leaves_nothing(source, tmp_path, monkeypatch, function):
    (source / "tokenizer.json").write_text("{}")

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(f"flashmhf.models.reference.conversion.{function}", full)
    with pytest.raises(OSError, match=r"DST: .*ours cannot be written: .*No space left on device"):
        convert(source, tmp_path / "ours")
    assert names(tmp_path) == ["theirs"]


@pytest.mark.slow
def test_a_disk_that_fills_up_while_the_command_writes(source, tmp_path):
    """A limit on the size of files stands for the disk; it takes effect inside safetensors."""
    script = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)); "
    script += "from flashmhf.cli import main; main()"
    command = [sys.executable, "-c", script, "convert", str(source), str(tmp_path / "ours")]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert time.monotonic() - began < 60
    assert done.returncode == 1
    assert "DST: " in done.stderr.splitlines()[-1]
    assert "cannot be written" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert names(tmp_path) == ["theirs"]


@pytest.mark.parametrize("kind", [OSError, Exception])
def test_a_full_disk_while_a_tokenizer_is_saved(tmp_path, corpus_folder, monkeypatch, capsys, kind):
    from transformers import PreTrainedTokenizerFast

    from flashmhf import cli

    def full(self, folder, **options):
        (Path(folder) / "tokenizer.json").write_text("half")
        raise kind("No space left on device (os error 28)")

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", full)
    command = ["flashmhf", "tokenizer", str(corpus_folder), str(tmp_path / "bpe"), "--vocab-size", "270"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"flashmhf: DIR: {tmp_path}/bpe cannot be written: No space left on device (os error 28)"
    assert names(tmp_path) == []
