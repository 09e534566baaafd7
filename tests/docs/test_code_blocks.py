"""Every Python block of README and docs runs, and every command is one that the command line takes."""

import re

import pytest
import torch

pytest.importorskip("sybil")

from documents import DOCUMENTS, ROOT, Blocks, Command, commands, parse, unknown_flags
from typer.exceptions import TyperException

from flashmhf.errors import InputError

CODE = re.compile(r"^```(python|bash|sh|console)|^ {4}flashmhf ", re.M)
WITH_CODE = [file for file in DOCUMENTS if CODE.search(file.read_text())]
SKIP = re.compile(r"<!-- skip: next \"[^\"]+\" -->")
INLINE = re.compile(r"(?<!`)`(flashmhf [a-z]+ [^`]*--[^`]*)`(?!`)")
MAX_SKIPPED = 6  # in all documents: what needs a GPU, the network or a package that is not here


def name_of(file):
    return str(file.relative_to(ROOT))


TORCHRUN = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}


@pytest.fixture
def folder(tmp_path, corpus_folder, monkeypatch):
    """With the text that the documents take for granted."""
    monkeypatch.chdir(tmp_path)
    for name in ("my_texts", "books"):
        (tmp_path / name).symlink_to(corpus_folder)
    return tmp_path


@pytest.fixture(autouse=True)
def one_process_of_torchrun(request, monkeypatch):
    """Its variables, for a document that makes a mesh."""
    file = request.node.callspec.params.get("file") if hasattr(request.node, "callspec") else None
    if file is not None and "init_device_mesh" in file.read_text():
        for name, value in TORCHRUN.items():
            monkeypatch.setenv(name, value)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("file", WITH_CODE, ids=name_of)
def test_blocks_run(file, folder):
    assert Blocks(long=False).evaluate(file)


@pytest.fixture(scope="session")
def begun():
    """Kinds of commands that take minutes and have run: once is enough for all documents."""
    return set()


@pytest.mark.slow
@pytest.mark.parametrize("file", WITH_CODE, ids=name_of)
def test_comparisons_sweeps_and_benchmarks_run(file, folder, begun):
    assert Blocks(long=True, begun=begun).evaluate(file)


def test_few_blocks_are_skipped():
    assert sum(len(SKIP.findall(file.read_text())) for file in DOCUMENTS) <= MAX_SKIPPED


@pytest.mark.parametrize("file", DOCUMENTS, ids=name_of)
def test_flags_in_the_text_exist(file):
    for text in INLINE.findall(file.read_text()):
        for command in commands(" ".join(text.split())):
            assert not unknown_flags(command), text


@pytest.mark.parametrize(
    "words",
    [
        "info --no-such-option",
        "generate",
        "train --model flashmhf-tiny",
        "train --model flashmhf-tiny --output-dir run --max-step-count 3",
        "compare --output-dir out --per-device-batch 3",
        "eval run --context-length many",
    ],
)
def test_a_wrong_command_is_noticed(words):
    with pytest.raises((TyperException, InputError)):
        parse(Command(tuple(words.split())))


def test_unknown_flags_are_noticed():
    assert unknown_flags(Command(("train", "--max-steps", "3", "--maximum-steps", "3"))) == ["--maximum-steps"]
    assert unknown_flags(Command(("info", "--max-steps", "3"))) == ["--max-steps"]


def test_an_error_names_the_line_of_the_document(tmp_path):
    file = tmp_path / "page.md"
    file.write_text("# Page\n\n```python\nx = 1\n```\n\nText.\n\n```python\nassert x == 2\n```\n")
    with pytest.raises(AssertionError) as caught:
        Blocks(long=False).evaluate(file)
    assert (caught.traceback[-1].path, caught.traceback[-1].lineno + 1) == (file, 10)


def test_a_skipped_block_is_not_run(tmp_path):
    file = tmp_path / "page.md"
    block = "```python\nraise AssertionError\n```\n"
    file.write_text(f'<!-- skip: next "needs a GPU" -->\n{block}\n```python\nx = 1\n```\n')
    assert Blocks(long=False).evaluate(file) == 1
    file.write_text(block)
    with pytest.raises(AssertionError):
        Blocks(long=False).evaluate(file)


def test_commands_are_found(tmp_path):
    text = "flashmhf info\n$ flashmhf train --model MODEL \\\n  --max-steps N  # a comment\nmake setup\n"
    text += "torchrun --nproc-per-node 2 -m flashmhf train --model x\n.venv/bin/flashmhf info | head\n"
    assert [" ".join(command.words) for command in commands(text)] == [
        "info",
        "train --model flashmhf-tiny --max-steps 8",
        "train --model x",
        "info",
    ]
