"""What the commands share: options, and a standard output that holds only the result."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashmhf.cli.terminal import show
from flashmhf.console import has_bars

if TYPE_CHECKING:
    from flashmhf.reports.table import Table

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
SOURCE = "stdlib, a file or folder of .txt, .json, .jsonl or .parquet (compressed too), or a Hub dataset"
Data = Annotated[str, typer.Option(metavar="SOURCE", help=f"{SOURCE}.")]
BadData = Annotated[
    str,
    typer.Option(
        "--bad-data",
        metavar="skip|refuse",
        help="Corrupt records. Empty documents are always skipped; both are counted.",
    ),
]
Tokenizer = Annotated[str, typer.Option(metavar="bytes|DIR|ID", help="bytes, a folder, or an id on the Hub.")]
TextColumn = Annotated[str, typer.Option(help="Column of .jsonl, .parquet or Hub data that holds the text.")]
# Of a trained model, which says itself what it was trained on.
TrainedData = Annotated[
    str | None, typer.Option("--data", metavar="SOURCE", help=f"{SOURCE}. Default: what the model was trained on.")
]
TrainedBadData = Annotated[
    str | None,
    typer.Option("--bad-data", metavar="skip|refuse", help="Corrupt records. Default: as in training, or refuse."),
]
TrainedTextColumn = Annotated[
    str | None, typer.Option("--text-column", help="Column that holds the text. Default: as in training, or text.")
]
ContextLength = Annotated[int, typer.Option(help="Tokens per training block.")]
ValidationTokens = Annotated[int, typer.Option(help="Maximum number of tokens for validation.")]
DocumentMask = Annotated[bool, typer.Option("--document-mask", help="No attention between the documents of a block.")]
Optimizer = Annotated[
    str | None,
    typer.Option(help="muon (default: momentum orthogonalised for the layers' matrices, AdamW for the rest) or adamw."),
]
MupBaseWidth = Annotated[
    int | None,
    typer.Option(metavar="BASE_WIDTH", help="Scale learning rates by fan-in; the given rate is for this hidden size."),
]
MaxNonFiniteSteps = Annotated[
    int, typer.Option(help="This many in a row without a finite loss and gradient end the run.")
]
RegionalCompilation = Annotated[
    bool,
    typer.Option(
        "--regional-compilation", help="Compile each decoder layer separately; not together with --torch-compile."
    ),
]
FusedLoss = Annotated[
    str,
    typer.Option(metavar="auto|on|off", help="Loss by liger-kernel or cut-cross-entropy, which never hold all logits."),
]
Device = Annotated[str | None, typer.Option(help="Torch device. Default: the first GPU, otherwise the CPU.")]


@contextlib.contextmanager
def results_only() -> Iterator[None]:
    """Sends what libraries print to standard error, so that standard output holds only the command's result.

    Of transformers' and the Hub's bars, those of downloads remain, on a terminal.
    """
    if has_bars():
        from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
        from transformers.utils.logging import disable_progress_bar

        kept = not are_progress_bars_disabled()
        disable_progress_bar()  # also those of the Hub
        if kept:
            enable_progress_bars()
    with contextlib.redirect_stdout(sys.stderr):
        yield


def table_text(table: "Table") -> str:
    """Aligned columns on a terminal, as many as fit; Markdown for what is piped into a file."""
    from flashmhf.reports.table import TERMINAL_WIDTH

    return table.fitting(TERMINAL_WIDTH, least=2) if sys.stdout.isatty() else table.markdown()


def emit(
    result: dict[str, Any], text: str, as_json: bool, output: str | None = None, *, verbatim: bool = False
) -> None:
    """Prints a command's result, and writes it as JSON into the file `output`. For `verbatim` see `terminal.show`."""
    from flashmhf.files import json_text, write_json

    if output is not None:
        write_json(Path(output), result)
    show(json_text(result) if as_json else text, verbatim=verbatim)


def check_file(output: str) -> None:
    """Raises InputError if no file of this name can be written, before any work is done."""
    from flashmhf.errors import InputError

    path = Path(output)
    if path.is_dir():
        raise InputError(f"output: expected a file, got the folder {output}")
    if not path.parent.is_dir():
        raise InputError(f"output: expected a file in a folder that exists, got {output}")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"output: expected a folder that can be written to, got {path.parent}")


def check_folder(option: str, folder: str) -> None:
    """Raises InputError if there is no such folder and none can be made, or a file was probably meant."""
    from flashmhf.errors import InputError

    path = Path(folder)
    if path.suffix == ".json" or (path.exists() and not path.is_dir()):
        raise InputError(f"{option}: expected a folder, got {folder!r}")
    above = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise InputError(f"{option}: expected a folder that can be written to, got {folder!r}")


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
