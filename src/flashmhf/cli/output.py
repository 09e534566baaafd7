"""What the commands share: options, and standard output kept for the result alone."""

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Data = Annotated[
    str, typer.Option(metavar="SOURCE", help="stdlib, a file or folder of .txt, .jsonl or .parquet, or a Hub dataset.")
]
BadData = Annotated[
    str,
    typer.Option(
        "--bad-data", metavar="skip|refuse", help="What cannot be read. Empty documents are skipped; all is counted."
    ),
]
Tokenizer = Annotated[str, typer.Option(metavar="bytes|DIR|ID", help="bytes, a folder, or an id on the Hub.")]
TextColumn = Annotated[str, typer.Option(help="Column of .jsonl, .parquet or Hub data that holds the text.")]
Device = Annotated[str | None, typer.Option(help="Torch device. Default: the first GPU, else the CPU.")]


@contextlib.contextmanager
def results_only() -> Iterator[None]:
    """Sends what libraries print to standard error, so that standard output holds the command's result."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def emit(result: dict[str, Any], text: str, as_json: bool) -> None:
    """Prints a command's result."""
    print(json.dumps(result) if as_json else text)


def pick_device(device: str | None) -> Any:
    """The named torch device, or the first GPU, or the CPU."""
    import torch

    from flashmhf.errors import InputError

    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
        torch.empty(0, device=picked)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device: {device!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return picked
