"""Pretraining on transformers' Trainer: a model, a SOURCE of text and an output folder that can be resumed."""

import contextlib
import logging
import math
import time
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import broadcast_object_list
from transformers import (
    AutoModelForCausalLM,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProgressCallback,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import TensorBoardCallback

from flashmhf.data.mixing import TrainingData, load_blocks
from flashmhf.data.tokenizer import check_same_tokenizer, fit_vocabulary, load_tokenizer
from flashmhf.distributed.trainer import check_layout, split_heads
from flashmhf.errors import InputError
from flashmhf.estimates.cost import model_cost
from flashmhf.models.checks import check_context_length, check_vocabulary
from flashmhf.models.fused_loss import use_fused_loss
from flashmhf.models.loading import load_config, load_model
from flashmhf.training.compilation import check_not_compiled_whole, compile_layers
from flashmhf.training.config import TrainConfig
from flashmhf.training.learning_rates import check_base_width
from flashmhf.training.non_finite_steps import check_limit, numbered
from flashmhf.training.resuming import (
    explain_full_disk,
    finished_state,
    only_writer,
    prepare_output_dir,
)
from flashmhf.training.run_files import TrainResult, write_result, write_run
from flashmhf.training.run_log import LogLines
from flashmhf.training.trainer import Progress, SpeedTrainer, StopOnSignal, median_speed, peak_memory_mib
from flashmhf.training.watchdog import Watchdog

logger = logging.getLogger(__name__)

DEFAULTS: dict[str, Any] = {
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
    "warmup_steps": 0.02,
    "adam_beta2": 0.95,
    "weight_decay": 0.1,
    "num_train_epochs": 1.0,
    "train_sampling_strategy": "sequential",  # the blocks come shuffled
    "logging_steps": 10,
    "logging_first_step": True,
    "eval_strategy": "steps",
    "eval_steps": 500,
    "save_steps": 500,
    "save_total_limit": 2,
    "report_to": ["tensorboard"],
    "include_num_input_tokens_seen": True,
    "remove_unused_columns": False,  # the numbers of the blocks come along
    "ddp_find_unused_parameters": False,
}


def parse_arguments(flags: list[str], output_dir: str) -> TrainingArguments:
    """`transformers.TrainingArguments` from command-line flags, on this package's defaults.

    Raises:
        InputError: an unknown flag or a value that does not fit.
    """
    parser = _Parser(cast(Any, TrainingArguments), prog="flashmhf train", add_help=False, allow_abbrev=False)
    gpu = torch.cuda.is_available()
    parser.set_defaults(
        **DEFAULTS,
        bf16=gpu and torch.cuda.is_bf16_supported(),
        dataloader_pin_memory=gpu,
        use_cpu=not torch.accelerator.is_available(),  # else each process of torchrun would train for itself
        output_dir=output_dir,
    )
    try:
        arguments, unknown = parser.parse_args_into_dataclasses(
            flags, look_for_args_file=False, return_remaining_strings=True
        )
    except (ValueError, ImportError) as error:
        raise InputError(str(error).splitlines()[0]) from error
    if unknown:
        raise InputError(
            f"flags: expected those of flashmhf train or transformers.TrainingArguments, got {unknown[0]!r}"
        )
    if torch.distributed.is_torchelastic_launched() and arguments.parallel_mode.value == "not_parallel":
        raise InputError("use-cpu: expected true under torchrun on a machine without a GPU, got false")
    if arguments.fsdp and arguments.use_cpu:
        raise InputError("fsdp: expected a GPU, got the CPU, on which accelerate would train with DDP instead")
    return arguments


def train(config: TrainConfig, arguments: TrainingArguments, *, resume: bool = False) -> TrainResult:
    """Trains, validates and saves model and tokenizer into `arguments.output_dir`.

    SIGINT and SIGTERM save a checkpoint after the step under way and end the run; the result then says so.

    Args:
        config: what is trained, on what; a resumed run must be about the same.
        arguments: those of transformers, from `parse_arguments`.
        resume: go on from the last checkpoint in the folder that is whole.

    Returns:
        The result, which result.json in the folder of a finished run holds, too.

    Raises:
        InputError: data, model, tokenizer, sizes or output folder do not fit.
        RunError: `config.max_non_finite_steps` in a row had no finite loss and gradient; a checkpoint is saved.
    """
    check_limit(config.max_non_finite_steps)
    if config.regional_compilation:
        check_not_compiled_whole(arguments)
    check_base_width(config.mup_base_width, arguments)
    split_heads(arguments, config.tensor_parallel)
    output_dir = Path(str(arguments.output_dir))
    with only_writer(output_dir) if arguments.process_index == 0 else contextlib.nullcontext():
        return _train(config, arguments, output_dir, resume)


def _train(config: TrainConfig, arguments: TrainingArguments, output_dir: Path, resume: bool) -> TrainResult:
    started = time.perf_counter()
    checkpoint = prepare_output_dir(output_dir, config, resume) if arguments.process_index == 0 else None
    (checkpoint,) = broadcast_object_list([checkpoint])
    set_seed(arguments.seed)
    tokenizer = load_tokenizer(config.data.tokenizer)
    finished = None if checkpoint is None else finished_state(checkpoint, arguments)
    model = _new_or_loaded_model(config, tokenizer) if finished is None else load_model(str(checkpoint))
    _prepare_model(model, config, arguments)
    with arguments.main_process_first(desc="data"):
        data = load_blocks(config.data, tokenizer, seed=_data_seed(arguments))
    if arguments.process_index == 0:
        write_run(output_dir, config)
    stop = StopOnSignal()
    trainer = _trainer(model, config, arguments, data, tokenizer, stop)
    if finished is None:
        with stop, explain_full_disk(output_dir):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        trainer.check_finite()
    else:
        trainer.state = finished
        trainer.remove_callback(TensorBoardCallback)  # its folder is that of a training
    if stop.signal is None:
        trainer.save_model()
        validation = trainer.evaluate()
    else:
        validation = {}
    trainer.save_state()
    result = _result(trainer, data, validation.get("eval_loss"), stop.signal, time.perf_counter() - started)
    if stop.signal is None and arguments.process_index == 0:
        write_result(result)
    return result


def _prepare_model(model: PreTrainedModel, config: TrainConfig, arguments: TrainingArguments) -> None:
    """How the model computes, beside what it is: compiled, with a fused loss."""
    check_layout(model, arguments, compiled=config.regional_compilation, fused_loss=config.fused_loss == "on")
    if config.regional_compilation:
        compile_layers(model)
    fused_loss = "off" if config.tensor_parallel > 1 else config.fused_loss
    use_fused_loss(model, fused_loss, arguments.device.type, arguments.bf16 or arguments.fp16)


def _trainer(
    model: PreTrainedModel,
    config: TrainConfig,
    arguments: TrainingArguments,
    data: TrainingData,
    tokenizer: PreTrainedTokenizerBase,
    stop: StopOnSignal,
) -> SpeedTrainer:
    trainer = SpeedTrainer(
        model=model,
        args=arguments,
        train_dataset=numbered(data.train),
        eval_dataset=data.validation,
        processing_class=tokenizer,
        callbacks=[stop, Watchdog(arguments.ddp_timeout), LogLines()],
        max_non_finite_steps=config.max_non_finite_steps,
        flops_per_token=model_cost(model.config, data.block_length).training_flops_per_token,
        base_width=config.mup_base_width,
    )
    trainer.remove_callback(ProgressCallback)
    if not arguments.disable_tqdm:
        trainer.add_callback(Progress)
    return trainer


def _result(
    trainer: SpeedTrainer,
    data: TrainingData,
    validation_loss: float | None,
    interrupted_by: int | None,
    elapsed_s: float,
) -> TrainResult:
    state = trainer.state
    return TrainResult(
        steps=state.global_step,
        tokens=state.num_input_tokens_seen,
        parameters=trainer.model.num_parameters(),
        train_loss=next((row["loss"] for row in reversed(state.log_history) if "loss" in row), None),
        validation_loss=validation_loss,
        bits_per_byte=None if validation_loss is None else validation_loss / math.log(2) / data.bytes_per_token,
        tokens_per_second=median_speed(trainer),
        peak_memory_mib=peak_memory_mib(),
        elapsed_s=elapsed_s,
        skipped_steps=trainer.skipped_steps(),
        tokens_used=data.tokens_used(state.num_input_tokens_seen),
        bad_data=data.bad_summary(),
        interrupted_by=interrupted_by,
        output_dir=str(trainer.args.output_dir),
    )


def _data_seed(arguments: TrainingArguments) -> int:
    return arguments.seed if arguments.data_seed is None else arguments.data_seed


def _new_or_loaded_model(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    if Path(config.model).is_dir():
        model = load_model(config.model, dtype=torch.float32)
        check_vocabulary(model, tokenizer)
        check_same_tokenizer(config.model, tokenizer)
    else:
        model_config = load_config(config.model)
        fit_vocabulary(model_config, tokenizer)
        model = AutoModelForCausalLM.from_config(model_config, dtype=torch.float32)
    check_context_length(model.config, config.data.context_length)
    return model


class _Parser(HfArgumentParser):
    def error(self, message: str):
        raise InputError(message)
