"""flashmhf eval: language-model loss of a trained model."""

from typing import Annotated

import typer

from flashmhf.cli.output import BadData, Data, Device, Json, TextColumn, emit, pick_device, results_only


def evaluate(
    model: Annotated[str, typer.Argument(metavar="DIR", help="A trained model with its tokenizer.")],
    data: Data = "stdlib",
    context_length: Annotated[
        int | None, typer.Option(help="Tokens in a window. Default: the model's longest.")
    ] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens a window moves on. Default: the context length.")] = None,
    split: Annotated[str, typer.Option(help="validation (as training holds it out) or all.")] = "validation",
    text_column: TextColumn = "text",
    bad_data: BadData = "refuse",
    tasks: Annotated[str, typer.Option(help="Run these lm-eval tasks instead, with commas.")] = "",
    tasks_path: Annotated[str | None, typer.Option(help="Folder with task definitions of your own.")] = None,
    tokenizer: Annotated[str | None, typer.Option(metavar="bytes|DIR|ID", help="Default: the model's own.")] = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Loss in nats a token, perplexity and bits a byte, over windows within each document."""
    with results_only():
        from flashmhf.errors import InputError
        from flashmhf.models.loading import load_model
        from flashmhf.tokenization import load_tokenizer

        if split not in ("validation", "all"):
            raise InputError(f"split: expected validation or all, got {split!r}")
        loaded = load_model(model).to(pick_device(device))
        own_tokenizer = load_tokenizer(model if tokenizer is None else tokenizer)
        if tasks:
            from flashmhf.tasks import evaluate_tasks

            names = [name.strip() for name in tasks.split(",")]
            measures = evaluate_tasks(
                loaded, own_tokenizer, names, tasks_path=tasks_path, context_length=context_length
            )
            result, text = {"tasks": measures}, _tasks_text(measures)
        else:
            documents = _documents(data, text_column, split, bad_data)
            result = _language_modelling(loaded, own_tokenizer, documents, context_length, stride)
            text = _text(result)
    emit(result, text, json)


def _documents(data: str, text_column: str, split: str, bad_data: str):
    import datasets

    from flashmhf.data import load_corpus

    corpus = load_corpus(data, text_column=text_column, bad_data=bad_data)
    if split == "all":
        return datasets.concatenate_datasets([corpus.train, corpus.validation])
    return corpus.validation


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


def _text(result: dict) -> str:
    return (
        f"{result['nats_per_token']:.4f} nats a token, perplexity {result['perplexity']:,.2f}, "
        f"{result['bits_per_byte']:.4f} bits a byte\n{result['tokens']:,} tokens, {result['bytes']:,} bytes, "
        f"{result['documents']:,} documents; windows of {result['context_length']}, stride {result['stride']}"
    )


def _tasks_text(measures: dict) -> str:
    lines = ["| task | measure | value | standard error |", "|---|---|---:|---:|"]
    for task, values in measures.items():
        for name, value in values.items():
            if isinstance(value, float) and "_stderr" not in name:
                error = values.get(name.replace(",", "_stderr,"), "")
                error = f"{error:.4f}" if isinstance(error, float) else ""
                lines.append(f"| {task} | {name.removesuffix(',none')} | {value:.4f} | {error} |")
    return "\n".join(lines)
