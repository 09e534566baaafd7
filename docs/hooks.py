"""Hooks of the site (mkdocs.yml): pages made from files outside docs/ and from the command line's own help."""

import html
import logging
import re
from pathlib import Path
from typing import Any

import typer
from mkdocs.structure.files import File, Files

from flashmhf.cli import app
from flashmhf.cli.training_flags import COMMON, TrainingCommand
from flashmhf.training.flags import shown_defaults

logger = logging.getLogger("mkdocs.hooks")  # its warnings fail `mkdocs build --strict`
ROOT = Path(__file__).parents[1]
SOURCE_URL = "/blob/main/"
ROOT_PAGES = ("DESIGN.md", "CHANGELOG.md")
EXAMPLES = "examples/README.md"
TRAINING_LINK = "\nAnd the [flags of training](#flags-of-training).\n"
TRAINING = """## Flags of training

`train`, `compare` and `sweep` take the flags of `transformers.TrainingArguments`, except those that they decide
themselves. Defaults are this package's.
"""
ALERT = re.compile(r"^> \[!(NOTE|TIP|WARNING)\]\n((?:>.*\n)+)", re.M)
LINK = re.compile(r"(\]\()(?!https?:|#|mailto:)([^)#\s]+)(#[^)\s]*)?(?=[)\s])")


def on_files(files: Files, config: Any) -> Files:
    for name in ROOT_PAGES:
        files.append(File.generated(config, name, content=(ROOT / name).read_text()))
    files.append(File.generated(config, "examples.md", content=(ROOT / EXAMPLES).read_text()))
    files.append(File.generated(config, "commands.md", content=command_reference()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links work on GitHub, from where the file is; here they lead to a page, or to the file in the repository."""
    uri = page.file.src_uri
    folder = ROOT / EXAMPLES if uri == "examples.md" else ROOT / uri if uri in ROOT_PAGES else ROOT / "docs" / uri
    repository = config["repo_url"].rstrip("/") + SOURCE_URL

    def target(match: re.Match[str]) -> str:
        start, path, anchor = match[1], match[2], match[3] or ""
        file = (folder.parent / path).resolve()
        if not file.exists():
            logger.warning("%s: the link %s leads nowhere", uri, path)
        inside = file.relative_to(ROOT).as_posix()
        site = "examples.md" if inside == EXAMPLES else inside.removeprefix("docs/")
        if (inside.startswith("docs/") or inside in (*ROOT_PAGES, EXAMPLES)) and file.is_file():
            depth = uri.count("/")
            return f"{start}{'../' * depth}{site}{anchor}"
        return f"{start}{repository}{inside}{anchor}"

    return LINK.sub(target, for_python_markdown(markdown))


def for_python_markdown(markdown: str) -> str:
    """What GitHub reads otherwise: lists right after a paragraph, lists in lists by two spaces, `> [!WARNING]`."""
    lines: list[str] = []
    fenced = False
    for line in markdown.splitlines():
        fenced ^= line.startswith("```")
        before = lines[-1] if lines else ""
        if line.startswith("- ") and not fenced and before and not before.startswith(("- ", " ")):
            lines.append("")
        lines.append(line if fenced else re.sub(r"^  - ", "    - ", line))
    return ALERT.sub(_admonition, "\n".join(lines) + "\n")


def _admonition(match: re.Match[str]) -> str:
    return f"!!! {match[1].lower()}\n\n" + re.sub(r"^> ?", "    ", match[2], flags=re.M)


def command_reference() -> str:
    """All commands with their arguments and options, as `flashmhf COMMAND --help` lists them."""
    group: Any = typer.main.get_command(app)
    context = group.make_context("flashmhf", [], resilient_parsing=True)
    parts = ["# Commands\n", f"{group.help}\n", "`flashmhf COMMAND --help` prints the same.\n"]
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if command.hidden:
            continue
        usage = " ".join(command.collect_usage_pieces(context))
        more = TRAINING_LINK if isinstance(command, TrainingCommand) else ""
        parts.append(f"## flashmhf {name}\n\n{command.help}\n\n```text\nflashmhf {name} {usage}\n```\n")
        records = [record for p in command.get_params(context) if (record := p.get_help_record(context))]
        parts.append(_table("option", records) + more)
    flags = [
        (
            f"--{name.replace('_', '-')}",
            f"{COMMON.get(name, '')} [default: {default}]" if default else COMMON.get(name, ""),
        )
        for name, default in shown_defaults().items()
    ]
    return "\n".join([*parts, TRAINING, _table("flag", flags)])


def _table(title: str, rows: list[tuple[str, str]]) -> str:
    lines = [f"| <code>{_cell(name)}</code> | {_cell(text)} |\n" for name, text in rows]
    return f"| {title} | |\n|---|---|\n" + "".join(lines)


def _cell(text: str) -> str:
    """Plain text, in a table of Markdown."""
    return re.sub(r"[|*_`\\\[\]]", lambda match: f"&#{ord(match[0])};", html.escape(" ".join(text.split())))
