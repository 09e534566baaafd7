"""flashmhf inspect: what a trained model's heads do."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from flashmhf import extras
from flashmhf.cli.early_checks import check_tokenizer
from flashmhf.cli.output import (
    Device,
    Json,
    TrainedBadData,
    TrainedData,
    TrainedTextColumn,
    check_file,
    emit,
    pick_device,
    results_only,
    table_text,
)
from flashmhf.cli.trained_data import data_of
from flashmhf.console import progress_bar
from flashmhf.names import check_model_folder

# What a terminal has room for; all of them are in --json, in --output and in what is piped.
SHOWN = ("load_entropy", "score_rms", "dead_rows", "v_rank")


def inspect(
    model: Annotated[str, typer.Argument(metavar="DIR", help="A trained model with its tokenizer.")],
    data: TrainedData = None,
    tokens: Annotated[int, typer.Option(help="About how many held-out tokens to pass through the model.")] = 4096,
    output: Annotated[str | None, typer.Option(metavar="FILE", help="Also draw every figure, into this PNG.")] = None,
    text_column: TrainedTextColumn = None,
    bad_data: TrainedBadData = None,
    tokenizer: Annotated[str | None, typer.Option(metavar="bytes|DIR|ID", help="Default: the model's own.")] = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Gates, activations, dead rows and rank of the weights, for every head of every FlashMHF layer."""
    extras.check("flashmhf inspect", "matplotlib")
    check_model_folder(model)
    read = data_of(model, {"data": data, "text_column": text_column, "bad_data": bad_data})
    check_tokenizer(tokenizer)
    with results_only():
        from flashmhf.data.corpus import load_corpus
        from flashmhf.data.tokenizer import check_same_tokenizer, load_tokenizer
        from flashmhf.errors import InputError
        from flashmhf.evaluation import inspection
        from flashmhf.models.loading import load_model
        from flashmhf.reports.heads import draw_heads, heads_table

        if output is not None and Path(output).suffix != ".png":
            raise InputError(f"output: expected a file that ends in .png, got {output!r}")
        if output is not None:
            check_file(output)
        loaded = load_model(model).to(pick_device(device))
        own_tokenizer = load_tokenizer(model if tokenizer is None else tokenizer)
        check_same_tokenizer(model, own_tokenizer)
        documents = load_corpus(read.source, text_column=read.text_column, bad_data=read.bad_data).validation
        with progress_bar("inspecting", note="tokens") as progress:
            reports = inspection.inspect(loaded, own_tokenizer, documents, tokens=tokens, progress=progress)
        if output is not None:
            draw_heads(reports, Path(output))
    text = table_text(heads_table(reports, SHOWN if sys.stdout.isatty() else None))
    emit({"model": model, "heads": inspection.as_dicts(reports)}, text, json)
