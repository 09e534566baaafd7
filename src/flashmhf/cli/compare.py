"""flashmhf compare: feed-forward layers against each other at matched parameters."""

import os
from pathlib import Path
from typing import Annotated

import typer

from flashmhf.cli.output import (
    BadData,
    ContextLength,
    Data,
    Json,
    TextColumn,
    Tokenizer,
    ValidationTokens,
    emit,
    results_only,
)
from flashmhf.cli.train import CONTEXT, train
from flashmhf.data.config import DataConfig

OWN = ("streaming", "resume", "config")  # options of `flashmhf train` that a comparison decides


def compare(
    context: typer.Context,
    output_dir: Annotated[
        str,
        typer.Option(
            help="New, empty, or holding this comparison, which goes on; seeds, variants, ablations may be added."
        ),
    ],
    variants: Annotated[str, typer.Option(help="Of flashmhf, mhffn, pkv, dense_moe, swiglu.")] = "swiglu,flashmhf",
    model: Annotated[
        str,
        typer.Option(metavar="PRESET|FILE|DIR,...", help="Gives backbone and size to match; several: of each."),
    ] = "flashmhf-tiny",
    data: Data = DataConfig.source,
    tokenizer: Tokenizer = DataConfig.tokenizer,
    seeds: Annotated[str, typer.Option(help="Each fixes initial weights and the data's order.")] = "0",
    context_length: ContextLength = DataConfig.context_length,
    learning_rate: Annotated[
        str, typer.Option(metavar="RATES", help="1e-3,2e-3: each variant its best of these; or VARIANT=RATE/RATE,...")
    ] = "",
    gate_type: Annotated[str, typer.Option(help="Ablations of flashmhf: some of sigmoid,softmax,none.")] = "",
    q_norm: Annotated[str, typer.Option(help="Ablations of flashmhf: on,off.")] = "",
    projections: Annotated[str, typer.Option(help="Ablations of flashmhf: on,off.")] = "",
    head_dim: Annotated[str, typer.Option(help="Ablations of flashmhf, such as 32,64,128.")] = "",
    subnetworks: Annotated[str, typer.Option(help="Ablations of flashmhf, such as 1,3,6.")] = "",
    match: Annotated[str, typer.Option(help="parameters or flops: what is equal.")] = "parameters",
    depth: Annotated[str, typer.Option(help="same, or paper: 5 layers with several heads for 6 without.")] = "same",
    jobs: Annotated[int, typer.Option(help="Runs at a time.")] = 1,
    text_column: TextColumn = DataConfig.text_column,
    bad_data: BadData = DataConfig.bad_data,
    validation_tokens: ValidationTokens = DataConfig.validation_tokens // 4,  # for each of many short runs
    document_bytes: Annotated[
        int, typer.Option(help="Of each held-out document at most so many are scored at the end.")
    ] = 2**16,
    json: Json = False,
) -> None:
    """Train variants on the same data; write table, curves and report. Takes the flags of `flashmhf train` too."""
    with results_only():
        from flashmhf.comparison import Comparison
        from flashmhf.comparison import compare as run_comparison
        from flashmhf.reports.comparison import markdown_table

        flags = list(context.args)
        _check_flags(flags, output_dir)
        names = _split(variants)
        ablations = {
            "gate-type": gate_type,
            "q-norm": q_norm,
            "projections": projections,
            "head-dim": head_dim,
            "subnetworks": subnetworks,
        }
        settings = Comparison(
            variants=names,
            models=_split(model),
            data=DataConfig(
                source=data,
                tokenizer=tokenizer,
                context_length=context_length,
                text_column=text_column,
                validation_tokens=validation_tokens,
                bad_data=bad_data,
            ),
            seeds=tuple(_number(int, "seeds", seed) for seed in _split(seeds)),
            learning_rates=_learning_rates(learning_rate, names),
            training_flags=tuple(flags),
            document_bytes=document_bytes,
            ablations={name: _split(values) for name, values in ablations.items() if values},
            match=match,
            depth=depth,
        )
        results = run_comparison(
            settings, Path(output_dir), lambda line: typer.echo(line, err=True), jobs=jobs, environment=os.environ
        )
    report = Path(output_dir) / "report.html"
    samples = results["samples"]
    text = [markdown_table(results), ""]
    text += [f"unigram entropy: {results['unigram_entropy_nats']:.3f} nats/token", ""]
    for variant, continuation in samples["continuations"].items():
        text += [f"--- {variant}, continuing a held-out document", samples["prompt"] + continuation, ""]
    emit({**results, "report": str(report)}, "\n".join([*text, f"report: {report}"]), json)
    raise typer.Exit(1 if any(run["status"] != "finished" for run in results["runs"]) else 0)


def _check_flags(flags: list[str], output_dir: str) -> None:
    """Raises InputError for a flag that `flashmhf train` does not know or that a comparison gives itself."""
    from flashmhf.errors import InputError
    from flashmhf.training.arguments import parse_arguments

    own = typer.main.get_command(_train_alone()).make_context("train", [*flags, "--model", "", "--output-dir", ""])
    with own:
        for name in OWN:
            if own.params[name]:
                raise InputError(f"{name.replace('_', '-')}: expected nothing, since a comparison decides, got a value")
        arguments, usual = (parse_arguments(given, output_dir) for given in (own.args, []))
    for name in ("seed", "data_seed", "logging_steps", "logging_strategy"):
        if getattr(arguments, name) != getattr(usual, name):
            instead = "--seeds" if "seed" in name else "nothing, since every step is logged"
            raise InputError(f"{name.replace('_', '-')}: expected {instead}, got {getattr(arguments, name)}")


def _train_alone() -> typer.Typer:
    alone = typer.Typer(add_completion=False)
    alone.command(context_settings=CONTEXT)(train)
    return alone


def _split(values: str) -> tuple[str, ...]:
    return tuple(value.strip() for value in values.split(",") if value.strip())


def _learning_rates(text: str, variants: tuple[str, ...]) -> dict[str, tuple[float, ...]]:
    if "=" not in text:
        rates = tuple(_number(float, "learning-rate", rate) for rate in _split(text))
        return dict.fromkeys(variants, rates) if rates else {}
    pairs = (pair.partition("=") for pair in _split(text))
    return {name: tuple(_number(float, "learning-rate", rate) for rate in rates.split("/")) for name, _, rates in pairs}


def _number(kind, option: str, text: str):
    from flashmhf.errors import InputError

    try:
        return kind(text)
    except ValueError as error:
        what = "a whole number" if kind is int else "a number"
        raise InputError(f"{option}: expected {what}, got {text!r}") from error
