"""flashmhf train: pretraining on transformers' Trainer."""

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flashmhf.cli.config_file import CONFIG_FLAGS, Config
from flashmhf.cli.early_checks import check_training
from flashmhf.cli.output import (
    SOURCE,
    BadData,
    ContextLength,
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
from flashmhf.lifeline import has_parent
from flashmhf.training.config import TrainConfig

if TYPE_CHECKING:
    from flashmhf.training.run_files import TrainResult

CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True}
OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"  # of torchrun: a new store of addresses for each restart


def train(
    context: typer.Context,
    model: Annotated[str, typer.Option(metavar="PRESET|FILE|DIR", help="A folder: start from its weights.")],
    output_dir: Annotated[str, typer.Option(help="New or empty, unless --resume.")],
    config: Config = None,
    data: Annotated[
        str, typer.Option(metavar="SOURCE", help=f"{SOURCE}; or several by weight: 0.7*SOURCE,0.3*SOURCE.")
    ] = DataConfig.source,
    tokenizer: Tokenizer = DataConfig.tokenizer,
    context_length: ContextLength = DataConfig.context_length,
    text_column: TextColumn = DataConfig.text_column,
    streaming: Annotated[
        bool, typer.Option("--streaming", help="Read data as needed; requires --max-steps.")
    ] = DataConfig.streaming,
    validation_tokens: ValidationTokens = DataConfig.validation_tokens,
    document_mask: DocumentMask = DataConfig.document_mask,
    bad_data: BadData = DataConfig.bad_data,
    optimizer: Optimizer = None,
    mup_base_width: MupBaseWidth = TrainConfig.mup_base_width,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the last complete checkpoint in the folder.")
    ] = False,
    max_non_finite_steps: MaxNonFiniteSteps = TrainConfig.max_non_finite_steps,
    regional_compilation: RegionalCompilation = TrainConfig.regional_compilation,
    fused_loss: FusedLoss = TrainConfig.fused_loss,
    tensor_parallel: Annotated[
        int, typer.Option(help="Split the heads over groups of this many processes; each group has its own data.")
    ] = TrainConfig.tensor_parallel,
    json: Json = False,
) -> None:
    """Pretrain a model. Takes every flag of transformers.TrainingArguments too, such as --max-steps."""
    flags = [*context.meta.get(CONFIG_FLAGS, ()), *context.args]
    check_training(context.params, flags, [model])
    with results_only():
        from flashmhf.training.arguments import parse_arguments
        from flashmhf.training.run import train as run_training
        from flashmhf.training.run_files import optimizer_of, was_begun

        resume = (_was_restarted() and was_begun(Path(output_dir))) or resume
        optimizer = optimizer_of(optimizer, Path(output_dir), resume=resume)
        arguments = parse_arguments(flags, output_dir, optimizer=optimizer, resume=resume)
        options = {**context.params, "optimizer": optimizer}
        result = run_training(TrainConfig.from_options(options), arguments, resume=resume)
    number = result.interrupted_by
    if number is not None and arguments.process_index == 0 and not has_parent():
        say(
            f"flashmhf: {signal.Signals(number).name} after step {result.steps}; the checkpoint is in "
            f"{output_dir}, continue with --resume"
        )
    elif arguments.process_index == 0:
        emit(result.as_dict(), _text(result), json)
    raise typer.Exit(0 if number is None else 128 + number)


def _was_restarted() -> bool:
    """Whether `torchrun --max-restarts` has started this process to replace one that ended.

    Warns if such a restart may fail: torchrun keeps one store, in which the new processes find the addresses of the
    dead ones, which they cannot reach.
    """
    first = os.environ.get("RANK", "0") == "0"
    if first and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) and os.environ.get(OWN_STORE) != "1":
        say(f"torchrun --max-restarts: set {OWN_STORE}=1, or restarted processes may not find others")
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def _text(result: "TrainResult") -> str:
    used = ", ".join(f"{tokens:,} of {source}" for source, tokens in result.tokens_used.items())
    lines = [f"tokens used: {used}"] if len(result.tokens_used) > 1 else []
    lines += [line for line in (result.data_read, result.bad_data) if line]
    return (
        f"{result.steps:,} steps, {result.tokens:,} tokens, {result.elapsed_s:,.0f} s\n"
        f"validation loss {result.validation_loss:.4f} nats/token, {result.bits_per_byte:.4f} bits/byte\n"
        + "".join(f"{line}\n" for line in lines)
        + f"model: {result.output_dir}"
    )
