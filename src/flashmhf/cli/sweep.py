"""flashmhf sweep: learning rate and warm-up by successive halving."""

import math
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
    numbers,
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
    from flashmhf.sweeping import Sweep

OutputDir = Annotated[
    str, typer.Option(help="New, empty, or this sweep's, which goes on; rates, warm-ups, seeds, variants may be added.")
]
Model = Annotated[str, typer.Option(metavar="PRESET|FILE|DIR", help="The backbone, and the size to match.")]
LearningRates = Annotated[str, typer.Option(metavar="RATES", help="The grid's, or VARIANT=RATE/RATE,... for each.")]
Warmups = Annotated[str, typer.Option(help="The grid's, as shares of the steps.")]
MaxSteps = Annotated[int | None, typer.Option(help="Steps of a full run, in the last rung.")]
Budget = Annotated[
    str | None,
    typer.Option(metavar="TOKENS", help="For each variant, over all of its runs; gives --max-steps, or limits it."),
]
Rungs = Annotated[int, typer.Option(help="At most this many, each with twice the steps of the one before.")]

SETTINGS_FILE = "settings.json"  # of the folder, see `Sweep`
# Flags of `flashmhf train` that a sweep decides, and what is expected instead.
INSTEAD = {
    "learning-rate": "--learning-rates",
    "warmup-steps": "--warmups",
    "warmup-ratio": "--warmups",
    "num-train-epochs": "--max-steps or --budget",
    "max-steps": "it spelled --max-steps",
}


def sweep(
    context: typer.Context,
    output_dir: OutputDir,
    variants: Variants = "swiglu,flashmhf",
    model: Model = "flashmhf-tiny",
    data: Data = DataConfig.source,
    tokenizer: Tokenizer = DataConfig.tokenizer,
    learning_rates: LearningRates = "1e-3,2e-3,4e-3,8e-3",
    warmups: Warmups = "0.02,0.1",
    max_steps: MaxSteps = None,
    budget: Budget = None,
    seeds: Seeds = "0,1,2",
    rungs: Rungs = 3,
    context_length: ContextLength = DataConfig.context_length,
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
    json: Json = False,
) -> None:
    """Find learning rate and warm-up for your data, with equal effort per variant. Takes flags of `flashmhf train`."""
    options, flags = complete(context, SETTINGS_FILE)
    check_training(options, flags, split(options["model"]))
    with results_only():
        from flashmhf.reports.sweep import terminal_text, write_files
        from flashmhf.sweeping import sweep as run_sweep

        number = read_jobs(jobs)
        settings = _settings(options, flags)
        folder = Path(output_dir)
        try:
            with RunsProgress() as shown:
                result = run_sweep(settings, folder, say, jobs=number, environment=os.environ, watch=shown.watching)
        except (KeyboardInterrupt, Interrupted) as error:
            number = error.number if isinstance(error, Interrupted) else signal.SIGINT
            raise Interrupted(number, how_to_continue(context, SETTINGS_FILE)) from None
        report, picture = map(str, write_files(result, folder))
    text = f"{terminal_text(result, folder)}\n\npicture: {picture}\nreport: {report}"
    emit({**result.as_dict(), "report": report, "picture": picture}, text, json)
    raise typer.Exit(1 if any(contender.best.failed_seeds for contender in result.contenders) else 0)


def _settings(options: dict[str, Any], flags: tuple[str, ...]) -> "Sweep":
    from flashmhf.sweeping import Sweep
    from flashmhf.sweeping.budget import count_steps, count_tokens
    from flashmhf.sweeping.halving import Halving

    check_flags(flags, options["output_dir"], INSTEAD)
    variants = split(options["variants"])
    rates = rates_by_variant("learning-rates", options["learning_rates"], variants)
    warmups, seeds = numbers("warmups", options["warmups"]), whole_numbers("seeds", options["seeds"])
    halving = Halving(
        rates=max(map(len, rates.values()), default=0),
        warmups=len(warmups),
        seeds=len(seeds),
        rungs=options["rungs"],
        steps=0,
    )
    tokens = count_tokens(flags, options["output_dir"], options["context_length"])
    return Sweep(
        variants=variants,
        models=split(options["model"]),
        train=TrainConfig.from_options({**options, "model": ""}),
        training_flags=flags,
        seeds=seeds,
        learning_rates=rates,
        match=options["match"],
        depth=options["depth"],
        warmups=warmups,
        rungs=options["rungs"],
        max_steps=count_steps(halving, options["max_steps"], _tokens(options["budget"]), tokens),
    )


def _tokens(text: str | None) -> int | None:
    """Of a budget such as 20000000 or 2e7."""
    from flashmhf.errors import InputError

    if text is None:
        return None
    (budget,) = numbers("budget", text.replace(",", "_"))
    if not (math.isfinite(budget) and budget >= 1):
        raise InputError(f"budget: expected a positive number of tokens, got {text}")
    return int(budget)
