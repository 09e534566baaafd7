"""The README's Python, commands and links work."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flashmhf.cli import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)
COMMANDS = [
    shlex.split(line, comments=True)
    for document in (README, *(file.read_text() for file in sorted((ROOT / "docs").glob("*.md"))))
    for line in re.findall(r"^    (?:\S+/bin/)?flashmhf (.*)$", document, re.M)
]


def test_python_blocks_run():
    assert PYTHON
    for block in PYTHON:
        exec(block, {})


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_commands_and_their_options_exist(command):
    words = [word for word in command if not word.startswith("-")]
    depth = 2 if words[0] == "bench" else 1
    result = CliRunner().invoke(app, [*words[:depth], "--help"], terminal_width=200)
    assert result.exit_code == 0
    trainer_flags = ("train", "compare", "sweep")
    for option in (word for word in command if word.startswith("--")):
        assert option in result.output or words[0] in trainer_flags


def test_links_have_targets():
    for target in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (ROOT / target).exists(), target
