"""flashmhf eval: language-model loss and downstream tasks of a trained model."""

from typing import TYPE_CHECKING, Annotated, Any

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

if TYPE_CHECKING:
    from flashmhf.evaluation import Evaluation

Model = Annotated[str, typer.Argument(metavar="DIR", help="A trained model with its tokenizer.")]
ContextLength = Annotated[int | None, typer.Option(help="Tokens in a window. Default: the model's maximum.")]
Stride = Annotated[int | None, typer.Option(help="Tokens that a window moves on. Default: the context length.")]
Split = Annotated[
    str, typer.Option(help="validation (as held out in training), train, all, or one that the data has: test.")
]
DocumentBytes = Annotated[
    int | None, typer.Option(help="Score this many bytes of each document, from its start. Default: all.")
]
Tasks = Annotated[str, typer.Option(help="Run these lm-eval tasks instead, with commas; paper: its six.")]
TasksPath = Annotated[str | None, typer.Option(help="Folder with task definitions of your own.")]
Tokenizer = Annotated[str | None, typer.Option(metavar="bytes|DIR|ID", help="Default: the model's own.")]
Output = Annotated[str | None, typer.Option(metavar="FILE", help="Write the JSON object there, too.")]


def evaluate(
    context: typer.Context,
    model: Model,
    data: TrainedData = None,
    context_length: ContextLength = None,
    stride: Stride = None,
    split: Split = "validation",
    document_bytes: DocumentBytes = None,
    text_column: TrainedTextColumn = None,
    bad_data: TrainedBadData = None,
    tasks: Tasks = "",
    tasks_path: TasksPath = None,
    tokenizer: Tokenizer = None,
    output: Output = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Loss in nats/token, perplexity and bits/byte, over windows within each document."""
    extras.check("flashmhf eval --tasks" if tasks else "flashmhf eval", "lm-eval" if tasks else "datasets")
    check_model_folder(model)
    read = None if tasks else data_of(model, context.params)
    check_tokenizer(tokenizer)
    with results_only():
        from flashmhf.data.tokenizer import check_same_tokenizer, load_tokenizer
        from flashmhf.models.loading import load_model

        if output is not None:
            check_file(output)
        loaded = load_model(model).to(pick_device(device))
        own_tokenizer = load_tokenizer(model if tokenizer is None else tokenizer)
        check_same_tokenizer(model, own_tokenizer)
        measure = _tasks if tasks else _language_modelling
        result, text = measure(loaded, own_tokenizer, {**context.params, "read": read})
    emit({"model": model, **result}, text, json, output)


def _tasks(model: Any, tokenizer: Any, options: dict[str, Any]) -> tuple[dict[str, Any], str]:
    from flashmhf.evaluation.tasks import evaluate_tasks
    from flashmhf.reports.table import Table

    names, limits = options["tasks"].split(","), {key: options[key] for key in ("tasks_path", "context_length")}
    measures = evaluate_tasks(model, tokenizer, names, **limits)
    rows = []
    for task, values in measures.items():
        for name, value in values.items():
            if isinstance(value, float) and "_stderr" not in name:
                error = values.get(name.replace(",", "_stderr,"), "")
                shown = f"{error:.4f}" if isinstance(error, float) else ""
                rows.append((task, name.removesuffix(",none"), f"{value:.4f}", shown))
    return {"tasks": measures}, table_text(Table(("task", "measure", "value", "standard error"), rows))


def _language_modelling(model: Any, tokenizer: Any, options: dict[str, Any]) -> tuple[dict[str, Any], str]:
    from flashmhf.data.splits import load_documents, truncate_documents
    from flashmhf.evaluation import evaluate as run_evaluation

    read, split = options["read"], options["split"]
    documents = load_documents(read.source, split=split, text_column=read.text_column, bad_data=read.bad_data)
    if options["document_bytes"] is not None:
        documents = truncate_documents(documents, options["document_bytes"])
    with progress_bar("evaluating", note="tokens") as progress:
        result = run_evaluation(
            model,
            tokenizer,
            documents,
            context_length=options["context_length"],
            stride=options["stride"],
            progress=progress,
        )
    return {"data": read.source, "split": split, **result.as_dict()}, _text(result)


def _text(result: "Evaluation") -> str:
    from flashmhf.reports.table import Table

    scores = {"nats/token": result.nats_per_token, "perplexity": result.perplexity, "bits/byte": result.bits_per_byte}
    intervals = {name.replace("_per_", "/"): ends for name, ends in (result.intervals or {}).items()}
    measures = [(name, f"{value:,.4f}", _interval(intervals.get(name))) for name, value in scores.items()]
    lines = [
        table_text(Table(("measure", "value", "95 % interval"), measures)),
        "",
        f"{result.tokens:,} tokens, {result.bytes:,} bytes, {result.documents:,} documents; "
        f"windows of {result.context_length}, stride {result.stride}",
        "intervals by a bootstrap over documents" if result.intervals else "no interval: it requires two documents",
    ]
    rows = []
    for one in result.by_position:
        context = f"{one.first} to {one.last}" if one.last > one.first else f"{one.first}"
        rows.append((context, f"{one.nats_per_token:.4f}", one.tokens))
    return "\n".join([*lines, "", table_text(Table(("tokens of context", "nats/token", "tokens"), rows))])


def _interval(ends: tuple[float, float] | None) -> str:
    return "" if ends is None else f"{ends[0]:,.4f} to {ends[1]:,.4f}"
