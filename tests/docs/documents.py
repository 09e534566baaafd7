"""The code blocks of a Markdown document: Python is executed, commands are parsed or run at toy sizes.

A document's blocks run in order, in one namespace and one folder. A block with a title (```yaml title="run.yaml") is
written to the file of that name. `<!-- skip: next "reason" -->` before a block leaves it out.
"""

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any
from unittest import SkipTest

import typer
from sybil import Document, Example, Region
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser
from transformers import TrainingArguments
from typer.testing import CliRunner

from comparison_results import result
from flashmhf.cli import app
from flashmhf.cli.comparison_options import check_flags
from flashmhf.comparison.results import RESULTS_FILE, write_comparison
from flashmhf.training.arguments import parse_arguments

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SHELLS = ("bash", "console", "sh")
TITLED = re.compile(r'^```(?!python)\w+ title="([^"]+)"\n(.*?)^```', re.M | re.S)
INDENTED = re.compile(r"(?:^(?: {4}).*\n)+", re.M)
PROMPT = re.compile(r"^(?:\$ )?(?:.*\s-m |\S+/bin/)?flashmhf (?=[a-z-])")
PLACEHOLDERS = {"N": "8", "MODEL": "flashmhf-tiny", "DIR": "my_texts"}  # as values of options
TRAINS = ("train", "compare", "sweep")  # these take the flags of TrainingArguments, too
LONG = ("compare", "sweep", "bench")
TOY = "--max-steps 2 --context-length 32 --per-device-train-batch-size 2 --validation-tokens 64"
SIZES = {  # appended to a command that is run; of an option given twice the last counts
    "train": TOY,
    "eval": "--context-length 32 --stride 16 --document-bytes 64",
    "generate": "--max-new-tokens 2",
    "compare": f"{TOY} --seeds 0,1,2 --document-bytes 64 --jobs 1",
    "sweep": f"{TOY} --variants flashmhf --max-steps 8 --learning-rates 1e-3,2e-3 --warmups 0.1 --seeds 0 --jobs 1",
    "bench": "--tokens 16 --repeats 1",
    "bench model": "--batch-size 1 --context-length 16 --new-tokens 2 --repeats 1",
}


@dataclass(frozen=True)
class Command:
    """`flashmhf` with its words; `name` is the subcommand."""

    words: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.words[0]


def commands(text: str) -> list[Command]:
    """Those of `flashmhf` in the text of a block, with or without a prompt."""
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    found = [(line, match) for line in lines if (match := PROMPT.match(line))]
    split = [shlex.split(line[match.end() :].split(" | ")[0], comments=True) for line, match in found]
    return [Command(tuple(filled(words))) for words in split]


def filled(words: list[str]) -> list[str]:
    """With a value in place of each placeholder that follows an option."""
    return [
        PLACEHOLDERS.get(word, word) if before.startswith("--") else word
        for before, word in zip(["", *words], words, strict=False)
    ]


def unknown_flags(command: Command) -> list[str]:
    """Flags that neither the command nor, where it takes them, transformers.TrainingArguments has."""
    group: Any = typer.main.get_command(app)
    root = group.make_context("flashmhf", list(command.words))
    name, found, rest = group.resolve_command(root, list(command.words))
    known = {flag for parameter in found.params for flag in (*parameter.opts, *parameter.secondary_opts)}
    known |= {"--help", "-h"}
    if name in TRAINS:
        known |= {f"--{argument.name.replace('_', '-')}" for argument in fields(TrainingArguments)}
    return [word for word in rest if word.startswith("--") and word not in known]


def parse(command: Command) -> None:
    """Raises an error if the command line does not take these words."""
    group: Any = typer.main.get_command(app)
    root = group.make_context("flashmhf", list(command.words))
    name, found, rest = group.resolve_command(root, list(command.words))
    context = found.make_context(name, rest, parent=root)
    if name == "train":
        parse_arguments(
            list(context.args), context.params["output_dir"], optimizer=context.params["optimizer"] or "muon"
        )
    elif name in TRAINS:
        check_flags(tuple(context.args), context.params["output_dir"])


def run(command: Command) -> None:
    """Runs the command in this process, at a toy size."""
    size = SIZES.get(" ".join(command.words[:2]), SIZES.get(command.name, ""))
    words = [*command.words, *shlex.split(size)]
    outcome = CliRunner().invoke(app, words)
    if outcome.exception is not None and not isinstance(outcome.exception, SystemExit):
        raise outcome.exception
    assert outcome.exit_code == 0, f"flashmhf {' '.join(words)}: exit code {outcome.exit_code}: {outcome.output[-500:]}"


def can_run(command: Command, *, long: bool) -> bool:
    """Not what needs the network or data that is not here, and what takes minutes only if `long`."""
    if {"--tasks", "--push-to-hub"} & set(command.words):
        return False
    if command.name == "convert":
        return Path(command.words[1]).exists()
    return long or command.name not in LONG


@dataclass(frozen=True)
class Blocks:
    """Evaluates the blocks of a document; `long`: also runs what takes minutes, unless one of its kind was begun."""

    long: bool
    begun: set[str] = field(default_factory=set)

    def evaluate(self, file: Path) -> int:
        """Returns how many blocks were evaluated."""
        for name, content in TITLED.findall(file.read_text()):
            Path(name).write_text(content)
        parsers = [PythonCodeBlockParser(), SkipParser(), indented_commands(self.evaluate_commands)]
        parsers += [CodeBlockParser(shell, self.evaluate_commands) for shell in SHELLS]
        document = Document.parse(str(file), *parsers)
        evaluated = 0
        for example in document.examples():
            try:
                example.evaluate()
            except SkipTest:
                continue
            evaluated += is_code(example)
        return evaluated

    def evaluate_commands(self, example: Example) -> None:
        for command in commands(example.parsed):
            parse(command)
            kind = " ".join(command.words[:2]) if command.name == "bench" else command.name
            if "torchrun" not in example.parsed and can_run(command, long=self.long and kind not in self.begun):
                self.begun.add(kind)
                run(command)
            elif command.name == "compare":
                write_made_up_comparison(command)


def is_code(example: Example) -> bool:
    return isinstance(example.region.evaluator, PythonEvaluator) or bool(commands(str(example.parsed)))


def write_made_up_comparison(command: Command) -> None:
    """For the blocks that read its result."""
    folder = Path(command.words[command.words.index("--output-dir") + 1])
    folder.mkdir(exist_ok=True)
    write_comparison(result(), folder / RESULTS_FILE)


def indented_commands(evaluate: Callable[[Example], None]) -> Callable[[Document], list[Region]]:
    """A parser of blocks that are code because they are indented."""

    def parser(document: Document) -> list[Region]:
        fenced = [match.span() for match in re.finditer(r"^```.*?^```", document.text, re.M | re.S)]
        return [
            Region(match.start(), match.end(), re.sub(r"^ {4}", "", match[0], flags=re.M), evaluate)
            for match in INDENTED.finditer(document.text)
            if not any(start <= match.start() < end for start, end in fenced)
        ]

    return parser
