"""flashmhf inspect: what a trained model's heads do."""

from pathlib import Path
from typing import Annotated

import typer

from flashmhf.cli.output import Data, Device, Json, TextColumn, check_file, emit, pick_device, results_only


def inspect(
    model: Annotated[str, typer.Argument(metavar="DIR", help="A trained model with its tokenizer.")],
    data: Data = "stdlib",
    tokens: Annotated[int, typer.Option(help="About how many held-out tokens to pass through the model.")] = 4096,
    output: Annotated[str | None, typer.Option(metavar="FILE", help="Also draw every figure, into this PNG.")] = None,
    text_column: TextColumn = "text",
    tokenizer: Annotated[str | None, typer.Option(metavar="bytes|DIR|ID", help="Default: the model's own.")] = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Gates, activations, dead rows and rank of the weights, of every head of every FlashMHF layer."""
    with results_only():
        from rich.console import Console
        from rich.progress import Progress

        from flashmhf.data.corpus import load_corpus
        from flashmhf.data.tokenizer import check_same_tokenizer, load_tokenizer
        from flashmhf.errors import InputError
        from flashmhf.evaluation import inspection
        from flashmhf.models.loading import load_model

        if output is not None and Path(output).suffix != ".png":
            raise InputError(f"output: expected a file that ends in .png, got {output!r}")
        if output is not None:
            check_file(output)
        loaded = load_model(model).to(pick_device(device))
        own_tokenizer = load_tokenizer(model if tokenizer is None else tokenizer)
        check_same_tokenizer(model, own_tokenizer)
        documents = load_corpus(data, text_column=text_column).validation
        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("inspecting", total=tokens)
            reports = inspection.inspect(
                loaded,
                own_tokenizer,
                documents,
                tokens=tokens,
                progress=lambda passed, total: bar.update(task, completed=passed),
            )
        if output is not None:
            from flashmhf.reports.heads import draw_heads

            draw_heads(reports, Path(output))
    emit({"model": model, "heads": inspection.as_dicts(reports)}, _text(reports), json)


def _text(reports: list) -> str:
    """A table: a line a head."""
    from flashmhf.evaluation.inspection import FIGURES

    names = ("layer", "head", *FIGURES)
    lines = ["| " + " | ".join(name.replace("_", " ") for name in names) + " |", "|" + "---:|" * len(names)]
    for report in reports:
        values = (getattr(report, name) for name in names)
        cells = ("" if x is None else f"{x:.3g}" if isinstance(x, float) else str(x) for x in values)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
