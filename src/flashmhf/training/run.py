"""Pretraining on transformers' Trainer: a model, a SOURCE of text and an output folder that can be resumed."""

import contextlib
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from flashmhf.data.mixing import TrainingData, load_blocks
from flashmhf.data.tokenizer import check_same_tokenizer, fit_vocabulary, load_tokenizer
from flashmhf.data.workers import loading_in_workers
from flashmhf.distributed.tensor_parallel import check_tensor_parallel, configure_tensor_parallel
from flashmhf.errors import InputError, RunError
from flashmhf.estimates.cost import model_cost
from flashmhf.models.checks import check_context_length, check_vocabulary
from flashmhf.models.fused_loss import use_fused_loss
from flashmhf.models.loading import check_memory, load_config, load_model, new_model
from flashmhf.training.arguments import settings_of
from flashmhf.training.banner import banner
from flashmhf.training.callbacks import StopOnSignal
from flashmhf.training.compilation import check_no_other_compilation, compile_layers
from flashmhf.training.config import TrainConfig
from flashmhf.training.fingerprints import fingerprints
from flashmhf.training.hub import check_hub, push
from flashmhf.training.instability import recorded
from flashmhf.training.learning_rates import check_base_width
from flashmhf.training.model_card import write_card
from flashmhf.training.muon import check_optimizer
from flashmhf.training.non_finite_steps import check_limit, count_skipped, count_spikes, numbered
from flashmhf.training.progress import ProgressBar, ProgressLines
from flashmhf.training.resuming import (
    check_same_inputs,
    explain_full_disk,
    only_writer,
    prepare_output_dir,
)
from flashmhf.training.run_files import TrainResult, write_result, write_run
from flashmhf.training.run_log import LogLines
from flashmhf.training.throughput import median_tokens_per_second, peak_memory_mib
from flashmhf.training.trackers import check_trackers
from flashmhf.training.trainer import PretrainingTrainer
from flashmhf.training.watchdog import Watchdog

logger = logging.getLogger(__name__)


def train(config: TrainConfig, arguments: TrainingArguments, *, resume: bool = False) -> TrainResult:
    """Trains, validates and saves model and tokenizer into `arguments.output_dir`.

    SIGINT and SIGTERM save a checkpoint after the current step and end the run; the result then says so.

    Args:
        config: what is trained, and on what; the `identity` of a resumed run must stay the same.
        arguments: those of transformers, from `parse_arguments`.
        resume: continue from the last complete checkpoint in the folder.

    Returns:
        The result, which is also in result.json if the run has finished.

    Raises:
        InputError: data, model, tokenizer, sizes or output folder do not fit.
        RunError: `config.max_non_finite_steps` in a row had no finite loss and gradient; a checkpoint is saved. Or the
            weights or the final validation loss are not finite; such weights are saved nowhere.
    """
    check_limit(config.max_non_finite_steps)
    if config.regional_compilation:
        check_no_other_compilation(arguments)
    check_optimizer(config.optimizer, arguments, config.mup_base_width)
    check_base_width(config.mup_base_width, arguments)
    configure_tensor_parallel(arguments, config.tensor_parallel)
    check_trackers(arguments)
    check_hub(arguments)
    output_dir = Path(str(arguments.output_dir))
    with (
        only_writer(output_dir) if arguments.process_index == 0 else contextlib.nullcontext(),
        explain_full_disk(output_dir),
    ):
        return _train(config, arguments, output_dir, resume)


def _train(config: TrainConfig, arguments: TrainingArguments, output_dir: Path, resume: bool) -> TrainResult:
    started = time.perf_counter()
    checkpoint = prepare_output_dir(output_dir, config, resume) if arguments.process_index == 0 else None
    (checkpoint,) = broadcast_object_list([checkpoint])
    set_seed(arguments.seed)
    tokenizer = load_tokenizer(config.data.tokenizer)
    model = _new_or_loaded_model(config, tokenizer)
    _prepare_model(model, config, arguments)
    for line in banner(config, arguments, model):
        logger.info("%s", line)
    with arguments.main_process_first(desc="data"):
        data = load_blocks(config.data, tokenizer, seed=_data_seed(arguments))
    if arguments.process_index == 0:
        inputs = fingerprints(config, arguments, tokenizer, data)
        if resume:
            check_same_inputs(output_dir, inputs)
        write_run(output_dir, config, inputs, settings_of(arguments))
    stop, bar = StopOnSignal(), ProgressBar(arguments)
    trainer = _trainer(model, config, arguments, data, tokenizer, [stop, bar])
    with stop, bar, loading_in_workers():
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trainer.guard.check_finite()
    validation_loss = None
    if stop.signal is None:
        with bar, loading_in_workers():
            validation_loss = _final_loss(trainer)
        trainer.save_model()
    trainer.save_state()
    result = _result(trainer, model, data, validation_loss, stop.signal, time.perf_counter() - started)
    if stop.signal is None and arguments.process_index == 0:
        write_card(config, trainer.args, model.config, result)
        write_result(result)
        if arguments.push_to_hub:
            logger.info("uploaded to %s", push(arguments))
    return result


def _prepare_model(model: PreTrainedModel, config: TrainConfig, arguments: TrainingArguments) -> None:
    """Sets how the model computes: compiled, with a fused loss."""
    if arguments.label_smoothing_factor and config.fused_loss == "on":
        raise InputError(
            f"label-smoothing-factor: expected 0 with --fused-loss on, got {arguments.label_smoothing_factor}"
        )
    check_tensor_parallel(model, arguments, compiled=config.regional_compilation, fused_loss=config.fused_loss == "on")
    if config.regional_compilation:
        compile_layers(model)
    fused_loss = "off" if config.tensor_parallel > 1 or arguments.label_smoothing_factor else config.fused_loss
    use_fused_loss(model, fused_loss, arguments.device.type, arguments.bf16 or arguments.fp16)


def _trainer(
    model: PreTrainedModel,
    config: TrainConfig,
    arguments: TrainingArguments,
    data: TrainingData,
    tokenizer: PreTrainedTokenizerBase,
    callbacks: Sequence[TrainerCallback],
) -> PretrainingTrainer:
    trainer = PretrainingTrainer(
        model=model,
        args=arguments,
        train_dataset=numbered(data.train),
        eval_dataset=data.validation,
        processing_class=tokenizer,
        callbacks=[*callbacks, ProgressLines(), Watchdog(arguments.ddp_timeout), LogLines()],
        max_non_finite_steps=config.max_non_finite_steps,
        flops_per_token=model_cost(model.config, data.block_length).training_flops_per_token,
        optimizer=config.optimizer,
        mup_base_width=config.mup_base_width,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)  # with --disable-tqdm
    return trainer


def _final_loss(trainer: PretrainingTrainer) -> float:
    """The validation loss of the final weights, before they are saved as the run's model."""
    trainer.check_weights()
    loss = trainer.evaluate()["eval_loss"]
    if not math.isfinite(loss):
        raise RunError(
            f"validation loss: expected a finite one after step {trainer.state.global_step}, got {loss}; "
            "the final model was not saved, the checkpoints are kept"
        )
    return loss


def _result(
    trainer: PretrainingTrainer,
    model: PreTrainedModel,
    data: TrainingData,
    validation_loss: float | None,
    interrupted_by: int | None,
    elapsed_s: float,
) -> TrainResult:
    state = trainer.state
    return TrainResult(
        steps=state.global_step,
        tokens=state.num_input_tokens_seen,
        parameters=model.num_parameters(),
        train_loss=next((row["loss"] for row in reversed(state.log_history) if row.get("loss") is not None), None),
        validation_loss=validation_loss,
        bits_per_byte=None if validation_loss is None else validation_loss / math.log(2) / data.bytes_per_token,
        tokens_per_second=median_tokens_per_second(state.log_history),
        peak_memory_mib=peak_memory_mib(),
        elapsed_s=elapsed_s,
        skipped_steps=count_skipped(state.log_history),
        spikes=count_spikes(state.log_history),
        instabilities=recorded(state.log_history),
        tokens_used=data.tokens_used(state.num_input_tokens_seen),
        data_read=data.read_summary(),
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
        check_memory(model_config)
        model = new_model(model_config, torch.float32)
    check_context_length(model.config, config.data.context_length)
    return model
