"""flashmhf compare: feed-forward layers at matched parameters or FLOPs."""

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashmhf.cli.comparison_options import (
    AUTO,
    VALIDATION_TOKENS,
    Depth,
    Jobs,
    Match,
    Seeds,
    Variants,
    check_flags,
    rates_by_variant,
    read_jobs,
    split,
    whole_numbers,
)
from flashmhf.cli.earlier_settings import complete, how_to_continue
from flashmhf.cli.early_checks import check_training
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
from flashmhf.cli.runs_progress import RunsProgress
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
Models = Annotated[
    str, typer.Option(metavar="PRESET|FILE|DIR,...", help="Backbones, and the sizes to match; several: each of them.")
]
LearningRates = Annotated[
    str, typer.Option(metavar="RATES", help="1e-3,2e-3: the best of these per variant; or VARIANT=RATE/RATE,...")
]
GateType = Annotated[str, typer.Option(help="Ablations of flashmhf: some of sigmoid,softmax,none.")]
OnOff = Annotated[str, typer.Option(help="Ablations of flashmhf: on,off.")]
HeadDim = Annotated[str, typer.Option(help="Ablations of flashmhf, such as 32,64,128.")]
Subnetworks = Annotated[str, typer.Option(help="Ablations of flashmhf, such as 1,3,6.")]
DocumentBytes = Annotated[int, typer.Option(help="Score this many bytes of each held-out document, from its start.")]

SETTINGS_FILE = "compare.json"  # of the folder, see `Comparison`
ABLATIONS = ("gate_type", "q_norm", "projections", "head_dim", "subnetworks")


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
    options, flags = complete(context, SETTINGS_FILE)
    check_training(options, flags, split(options["model"]))
    with results_only():
        from flashmhf.comparison import compare as run_comparison
        from flashmhf.reports.comparison import write_files
        from flashmhf.reports.comparison_tables import terminal_text

        number = read_jobs(jobs)
        settings, folder = _settings(options, flags), Path(output_dir)
        try:
            with RunsProgress() as shown:
                result = run_comparison(
                    settings, folder, say, jobs=number, environment=os.environ, watch=shown.watching
                )
        except (KeyboardInterrupt, Interrupted) as error:
            number = error.number if isinstance(error, Interrupted) else signal.SIGINT
            raise Interrupted(number, how_to_continue(context, SETTINGS_FILE)) from None
        report, picture = (str(file) for file in write_files(result, folder))
    text = f"{terminal_text(result)}\n\nloss curves: {picture}\nreport: {report}"
    emit({**result.as_dict(), "report": report, "picture": picture}, text, json)
    raise typer.Exit(0 if all(run.finished for run in result.runs) else 1)


def _settings(options: dict[str, Any], flags: tuple[str, ...]) -> "Comparison":
    from flashmhf.comparison import Comparison

    check_flags(flags, options["output_dir"])
    variants = split(options["variants"])
    return Comparison(
        variants=variants,
        models=split(options["model"]),
        train=TrainConfig.from_options({**options, "model": ""}),
        training_flags=flags,
        seeds=whole_numbers("seeds", options["seeds"]),
        learning_rates=rates_by_variant("learning-rate", options["learning_rate"], variants),
        document_bytes=options["document_bytes"],
        ablations={name.replace("_", "-"): split(options[name]) for name in ABLATIONS if options[name]},
        match=options["match"],
        depth=options["depth"],
    )
