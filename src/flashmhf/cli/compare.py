"""flashmhf compare: feed-forward layers at matched parameters or FLOPs."""

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashmhf.cli.output import (
    BadData,
    ContextLength,
    Data,
    DocumentMask,
    FusedLoss,
    Json,
    MaxNonFiniteSteps,
    MupBaseWidth,
    Optimizer,
    RegionalCompilation,
    TextColumn,
    Tokenizer,
    ValidationTokens,
    emit,
    results_only,
)
from flashmhf.cli.terminal import say
from flashmhf.data.config import DataConfig
from flashmhf.errors import Interrupted
from flashmhf.training.config import TrainConfig

if TYPE_CHECKING:
    from flashmhf.comparison import Comparison

OutputDir = Annotated[
    str,
    typer.Option(help="New, empty, or this comparison's, which is resumed; seeds, variants, ablations may be added."),
]
Variants = Annotated[str, typer.Option(help="Of flashmhf, mhffn, pkv, dense_moe, swiglu.")]
Models = Annotated[
    str, typer.Option(metavar="PRESET|FILE|DIR,...", help="Backbones, and the sizes to match; several: each of them.")
]
Seeds = Annotated[
    str, typer.Option(help="Each fixes initial weights and the data's order. A verdict requires three or more.")
]
LearningRates = Annotated[
    str, typer.Option(metavar="RATES", help="1e-3,2e-3: the best of these per variant; or VARIANT=RATE/RATE,...")
]
GateType = Annotated[str, typer.Option(help="Ablations of flashmhf: some of sigmoid,softmax,none.")]
OnOff = Annotated[str, typer.Option(help="Ablations of flashmhf: on,off.")]
HeadDim = Annotated[str, typer.Option(help="Ablations of flashmhf, such as 32,64,128.")]
Subnetworks = Annotated[str, typer.Option(help="Ablations of flashmhf, such as 1,3,6.")]
Match = Annotated[str, typer.Option(help="What is equal: parameters or flops.")]
Depth = Annotated[str, typer.Option(help="same, or paper: 5 layers with several heads for 6 without.")]
Jobs = Annotated[
    str,
    typer.Option(metavar="auto|N", help="Runs at a time; auto: one per GPU, or on a CPU one per core if they fit."),
]
DocumentBytes = Annotated[int, typer.Option(help="Score this many bytes of each held-out document, from its start.")]

ABLATIONS = ("gate_type", "q_norm", "projections", "head_dim", "subnetworks")
AUTO = "auto"
DECIDED = ("streaming", "config", "tensor-parallel")  # options of `flashmhf train` that a comparison decides
VALIDATION_TOKENS = DataConfig.validation_tokens // 4  # for each of many short runs


def compare(
    context: typer.Context,
    output_dir: OutputDir,
    variants: Variants = "swiglu,flashmhf",
    model: Models = "flashmhf-tiny",
    data: Data = DataConfig.source,
    tokenizer: Tokenizer = DataConfig.tokenizer,
    seeds: Seeds = "0,1,2",
    context_length: ContextLength = DataConfig.context_length,
    learning_rate: LearningRates = "",
    gate_type: GateType = "",
    q_norm: OnOff = "",
    projections: OnOff = "",
    head_dim: HeadDim = "",
    subnetworks: Subnetworks = "",
    match: Match = "parameters",
    depth: Depth = "same",
    jobs: Jobs = AUTO,
    text_column: TextColumn = DataConfig.text_column,
    bad_data: BadData = DataConfig.bad_data,
    validation_tokens: ValidationTokens = VALIDATION_TOKENS,
    document_mask: DocumentMask = DataConfig.document_mask,
    optimizer: Optimizer = TrainConfig.optimizer,
    mup_base_width: MupBaseWidth = TrainConfig.mup_base_width,
    max_non_finite_steps: MaxNonFiniteSteps = TrainConfig.max_non_finite_steps,
    regional_compilation: RegionalCompilation = TrainConfig.regional_compilation,
    fused_loss: FusedLoss = TrainConfig.fused_loss,
    document_bytes: DocumentBytes = 2**16,
    resume: Annotated[bool, typer.Option("--resume", help="Changes nothing: a comparison is always resumed.")] = False,
    json: Json = False,
) -> None:
    """Train variants on the same data; verdict, table, curves, samples. Takes the flags of `flashmhf train`, too."""
    with results_only():
        from flashmhf.comparison import compare as run_comparison
        from flashmhf.reports.comparison import write_files
        from flashmhf.reports.comparison_tables import terminal_text

        number = _jobs(jobs)
        settings = _settings(context.params, tuple(context.args))
        try:
            result = run_comparison(settings, Path(output_dir), _progress, jobs=number, environment=os.environ)
        except (KeyboardInterrupt, Interrupted) as error:
            number = error.number if isinstance(error, Interrupted) else signal.SIGINT
            raise Interrupted(number, "the same command again continues the comparison") from None
        report, picture = (str(file) for file in write_files(result, Path(output_dir)))
    text = f"{terminal_text(result)}\n\nreport: {report}\nloss curves: {picture}"
    emit({**result.as_dict(), "report": report, "picture": picture}, text, json)
    raise typer.Exit(0 if all(run.finished for run in result.runs) else 1)


def _progress(line: str) -> None:
    say(line)


def _settings(options: dict[str, Any], flags: tuple[str, ...]) -> "Comparison":
    from flashmhf.comparison import Comparison

    _check_flags(flags, options["output_dir"])
    variants = _split(options["variants"])
    return Comparison(
        variants=variants,
        models=_split(options["model"]),
        train=TrainConfig.from_options({**options, "model": ""}),
        training_flags=flags,
        seeds=tuple(_number(int, "seeds", seed) for seed in _split(options["seeds"])),
        learning_rates=_learning_rates(options["learning_rate"], variants),
        document_bytes=options["document_bytes"],
        ablations={name.replace("_", "-"): _split(options[name]) for name in ABLATIONS if options[name]},
        match=options["match"],
        depth=options["depth"],
    )


def _check_flags(flags: tuple[str, ...], output_dir: str) -> None:
    """Raises InputError for a flag that TrainingArguments does not have or that a comparison decides."""
    from flashmhf.errors import InputError
    from flashmhf.training.arguments import parse_arguments

    for name in DECIDED:
        if any(flag.partition("=")[0] == f"--{name}" for flag in flags):
            raise InputError(f"{name}: expected nothing, since a comparison decides, got a value")
    arguments, defaults = (parse_arguments(given, output_dir) for given in (list(flags), []))
    for name in ("seed", "data_seed", "logging_steps", "logging_strategy"):
        if getattr(arguments, name) != getattr(defaults, name):
            instead = "--seeds" if "seed" in name else "nothing, since every step is logged"
            raise InputError(f"{name.replace('_', '-')}: expected {instead}, got {getattr(arguments, name)}")


def _split(values: str) -> tuple[str, ...]:
    return tuple(value.strip() for value in values.split(",") if value.strip())


def _learning_rates(text: str, variants: tuple[str, ...]) -> dict[str, tuple[float, ...]]:
    if "=" not in text:
        rates = tuple(_number(float, "learning-rate", rate) for rate in _split(text))
        return dict.fromkeys(variants, rates) if rates else {}
    pairs = (pair.partition("=") for pair in _split(text))
    return {name: tuple(_number(float, "learning-rate", rate) for rate in rates.split("/")) for name, _, rates in pairs}


def _jobs(text: str) -> int | None:
    """None for auto."""
    from flashmhf.errors import InputError

    if text == AUTO:
        return None
    if not (text.isdecimal() and int(text) > 0):
        raise InputError(f"jobs: expected auto or a number of at least 1, got {text}")
    return int(text)


def _number(kind, option: str, text: str):
    from flashmhf.errors import InputError

    try:
        return kind(text)
    except ValueError as error:
        what = "a whole number" if kind is int else "a number"
        raise InputError(f"{option}: expected {what}, got {text!r}") from error
