"""flashmhf convert: checkpoints of the reference code to ours and back."""

from pathlib import Path
from typing import Annotated

import typer

from flashmhf.cli.output import Json, emit, results_only


def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A checkpoint folder with safetensors.")],
    destination: Annotated[str, typer.Argument(metavar="DST", help="A new or empty folder.")],
    to: Annotated[str, typer.Option(help="flashmhf or reference.")] = "flashmhf",
    json: Json = False,
) -> None:
    """Convert a checkpoint of the reference code (mhffnmoe, mhffn) to this package's format, or back."""
    with results_only():
        from flashmhf.models.reference.conversion import convert as run_conversion

        result = run_conversion(Path(source), Path(destination), to=to)
    emit(
        {**result, "destination": destination},
        f"{destination}: {result['tensors']} tensors, {result['parameters']:,} parameters in {result['files']} files",
        json,
    )
