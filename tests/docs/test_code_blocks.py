"""Every Python block of README and docs runs, and every command is one that the command line takes."""

import re

import pytest
import torch
from documents import DOCUMENTS, ROOT, Blocks, Command, commands, parse
from typer.exceptions import TyperException

from flashmhf.errors import InputError

WITH_CODE = [file for file in DOCUMENTS if re.search(r"^```(python|bash|sh|console)|^ {4}flashmhf ", file.read_text(), re.M)]
SKIP = re.compile(r"<!-- skip: next")
INLINE = re.compile(r"(?<!`)`((?:\S+/bin/)?flashmhf [a-z]+ [^`]*--[^`]*)`(?!`)")


@pytest.fixture
def folder(tmp_path, corpus_folder, monkeypatch):
    """What the documents take for granted: text, and the variables that torchrun sets for one process."""
    monkeypatch.chdir(tmp_path)
    for name in ("my_texts", "books"):
        (tmp_path / name).symlink_to(corpus_folder)
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "0")
    yield tmp_path
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("file", WITH_CODE, ids=lambda file: str(file.relative_to(ROOT)))
def test_blocks_run(file, folder):
    assert Blocks(long=False).evaluate(file)


@pytest.mark.slow
@pytest.mark.parametrize("file", WITH_CODE, ids=lambda file: str(file.relative_to(ROOT)))
def test_blocks_run_with_comparisons_sweeps_and_benchmarks(file, folder):
    assert Blocks(long=True).evaluate(file)
