"""flashmhf eval: language-model loss of a trained model."""

from typing import Annotated

import typer

from flashmhf.cli.output import Data, Device, Json, TextColumn, emit, pick_device, results_only


def evaluate(
    model: Annotated[str, typer.Argument(metavar="DIR", help="A trained model with its tokenizer.")],
    data: Data = "stdlib",
    context_length: Annotated[
        int | None, typer.Option(help="Tokens in a window. Default: the model's longest.")
    ] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens a window moves on. Default: the context length.")] = None,
    split: Annotated[str, typer.Option(help="validation (as training holds it out) or all.")] = "validation",
    text_column: TextColumn = "text",
    tokenizer: Annotated[str | None, typer.Option(metavar="bytes|DIR|ID", help="Default: the model's own.")] = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Loss in nats a token, perplexity and bits a byte, over windows within each document."""
    with results_only():
        import datasets
        from rich.progress import Progress

        from flashmhf.data import load_corpus
        from flashmhf.errors import InputError
        from flashmhf.evaluation import evaluate as run_evaluation
        from flashmhf.models.loading import load_model
        from flashmhf.tokenization import load_tokenizer

        if split not in ("validation", "all"):
            raise InputError(f"split: expected validation or all, got {split!r}")
        loaded = load_model(model).to(pick_device(device))
        own_tokenizer = load_tokenizer(model if tokenizer is None else tokenizer)
        corpus = load_corpus(data, text_column=text_column)
        documents = corpus.validation
        if split == "all":
            documents = datasets.concatenate_datasets([corpus.train, corpus.validation])
        with Progress(console=_stderr_console(), transient=True) as bar:
            task = bar.add_task("evaluating", total=None)
            result = run_evaluation(
                loaded,
                own_tokenizer,
                documents,
                context_length=context_length,
                stride=stride,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
    text = (
        f"{result.nats_per_token:.4f} nats a token, perplexity {result.perplexity:,.2f}, {result.bits_per_byte:.4f} "
        f"bits a byte\n{result.tokens:,} tokens, {result.bytes:,} bytes, {result.documents:,} documents; windows of "
        f"{result.context_length}, stride {result.stride}"
    )
    emit(result.as_dict(), text, json)


def _stderr_console():
    from rich.console import Console

    return Console(stderr=True)
