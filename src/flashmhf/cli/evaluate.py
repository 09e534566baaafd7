"""flashmhf eval: language-model loss and downstream tasks of a trained model."""

from typing import Annotated, Any

import typer

from flashmhf.cli.output import BadData, Data, Device, Json, TextColumn, check_file, emit, pick_device, results_only


def evaluate(
    model: Annotated[str, typer.Argument(metavar="DIR", help="A trained model with its tokenizer.")],
    data: Data = "stdlib",
    context_length: Annotated[
        int | None, typer.Option(help="Tokens in a window. Default: the model's longest.")
    ] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens a window moves on. Default: the context length.")] = None,
    split: Annotated[
        str, typer.Option(help="validation (as training holds it out), train, all, or one that the data has: test.")
    ] = "validation",
    document_bytes: Annotated[
        int | None, typer.Option(help="Score at most so many bytes of each document. Default: all.")
    ] = None,
    text_column: TextColumn = "text",
    bad_data: BadData = "refuse",
    tasks: Annotated[str, typer.Option(help="Run these lm-eval tasks instead, with commas; paper: its six.")] = "",
    tasks_path: Annotated[str | None, typer.Option(help="Folder with task definitions of your own.")] = None,
    tokenizer: Annotated[str | None, typer.Option(metavar="bytes|DIR|ID", help="Default: the model's own.")] = None,
    output: Annotated[str | None, typer.Option(metavar="FILE", help="Write the JSON object there, too.")] = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Loss in nats/token, perplexity and bits/byte, over windows within each document."""
    with results_only():
        from flashmhf.data.tokenizer import check_same_tokenizer, load_tokenizer
        from flashmhf.models.loading import load_model

        if output is not None:
            check_file(output)
        loaded = load_model(model).to(pick_device(device))
        own_tokenizer = load_tokenizer(model if tokenizer is None else tokenizer)
        check_same_tokenizer(model, own_tokenizer)
        result: dict[str, Any] = {"model": model}
        if tasks:
            from flashmhf.evaluation.tasks import evaluate_tasks

            measures = evaluate_tasks(
                loaded, own_tokenizer, tasks.split(","), tasks_path=tasks_path, context_length=context_length
            )
            result["tasks"], text = measures, _tasks_text(measures)
        else:
            from flashmhf.data.splits import load_documents, truncate_documents

            documents = load_documents(data, split=split, text_column=text_column, bad_data=bad_data)
            if document_bytes is not None:
                documents = truncate_documents(documents, document_bytes)
            result |= {"data": data, "split": split}
            result |= _language_modelling(loaded, own_tokenizer, documents, context_length, stride)
            text = _text(result)
    emit(result, text, json, output)


def _language_modelling(model, tokenizer, documents, context_length: int | None, stride: int | None) -> dict:
    from rich.console import Console
    from rich.progress import Progress

    from flashmhf.evaluation import evaluate as run_evaluation

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("evaluating", total=None)
        result = run_evaluation(
            model,
            tokenizer,
            documents,
            context_length=context_length,
            stride=stride,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    return result.as_dict()


def _text(result: dict[str, Any]) -> str:
    lines = [
        f"{result['nats_per_token']:.4f} nats/token, perplexity {result['perplexity']:,.2f}, "
        f"{result['bits_per_byte']:.4f} bits/byte",
        f"{result['tokens']:,} tokens, {result['bytes']:,} bytes, {result['documents']:,} documents; "
        f"windows of {result['context_length']}, stride {result['stride']}",
    ]
    if result["intervals"] is None:
        lines.append("no interval: it takes two documents")
    else:
        ends = {name: f"{low:,.4f} to {high:,.4f}" for name, (low, high) in result["intervals"].items()}
        lines.append(
            f"95 % intervals, by a bootstrap over documents: {ends['nats_per_token']} nats/token, "
            f"perplexity {ends['perplexity']}, {ends['bits_per_byte']} bits/byte"
        )
    lines += ["", "| tokens of context | nats/token | tokens |", "|---|---:|---:|"]
    for one in result["by_position"]:
        context = f"{one['first']} to {one['last']}" if one["last"] > one["first"] else one["first"]
        lines.append(f"| {context} | {one['nats_per_token']:.4f} | {one['tokens']:,} |")
    return "\n".join(lines)


def _tasks_text(measures: dict) -> str:
    lines = ["| task | measure | value | standard error |", "|---|---|---:|---:|"]
    for task, values in measures.items():
        for name, value in values.items():
            if isinstance(value, float) and "_stderr" not in name:
                error = values.get(name.replace(",", "_stderr,"), "")
                error = f"{error:.4f}" if isinstance(error, float) else ""
                lines.append(f"| {task} | {name.removesuffix(',none')} | {value:.4f} | {error} |")
    return "\n".join(lines)
