"""transformers' Trainer with what long pretraining runs need: one training step from top to bottom."""

import dataclasses
import logging
import math
import time
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import Trainer
from transformers.integrations import get_reporting_integration_callbacks

from flashmhf.data.shuffling import ShuffledBlocks
from flashmhf.distributed.evaluation import EvaluationBatches
from flashmhf.distributed.sharded import (
    SCHEDULER,
    SHARDS,
    full_state_dict,
    is_sharded,
    load_training_state,
    load_weights,
    save_sharded,
)
from flashmhf.distributed.tensor_parallel import parallelize, tensor_parallel_size
from flashmhf.errors import RunError
from flashmhf.files import only_finite, write_json
from flashmhf.layers.former_shapes import accept_former_shapes
from flashmhf.training.checkpoints import (
    TRAINER_STATE,
    CheckpointWriter,
    check_resumable,
    find_best_checkpoint,
    loading,
    replace_pickled_arguments,
)
from flashmhf.training.config import ADAMW, MUON
from flashmhf.training.finite_weights import check_weights
from flashmhf.training.instability import STATE, InstabilityDetector, watch
from flashmhf.training.label_smoothing import SmoothedLoss
from flashmhf.training.learning_rates import learning_rate_factors, scale_learning_rates
from flashmhf.training.manifest import check
from flashmhf.training.muon import Muon, gate_factors, matrices
from flashmhf.training.non_finite_steps import BLOCK, NonFiniteGuard
from flashmhf.training.run_files import record_warmup, was_begun
from flashmhf.training.throughput import ThroughputMeter, speed
from flashmhf.training.validation import losses_unfiltered, weights_kept
from flashmhf.training.warmup import check_warmup, warmup_steps

logger = logging.getLogger(__name__)


class PretrainingTrainer(Trainer):
    """Overrides of transformers' Trainer, in the order in which a run meets them; each delegates to a collaborator.

    `ThroughputMeter` times steps, `NonFiniteGuard` skips steps without a finite loss and gradient, `CheckpointWriter`
    makes checkpoints complete or absent, `EvaluationBatches` averages validation losses over processes. With tensor
    parallelism, `flashmhf.distributed` splits the model and reads and writes its checkpoints.

    Args:
        max_non_finite_steps: this many in a row end training, see `NonFiniteGuard`.
        flops_per_token: of a training step, as `estimates.cost.model_cost` counts them.
        optimizer: "adamw" or "muon", see `flashmhf.training.muon`.
        mup_base_width: scales learning rates by fan-in, see `flashmhf.training.learning_rates`.
    """

    model: Any  # optional to transformers; set whenever these methods are called
    optimizer: Any
    lr_scheduler: Any
    eval_dataset: Any

    def __init__(
        self,
        *args: Any,
        max_non_finite_steps: int,
        flops_per_token: float,
        optimizer: str = ADAMW,
        mup_base_width: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self._muon = optimizer == MUON
        self._mup_base_width = mup_base_width
        self._tensor_parallel = tensor_parallel_size(self.args)
        self._data_parallel = self.args.world_size // self._tensor_parallel
        if self._tensor_parallel > 1:
            parallelize(self.model, self.accelerator)
        blocks = self.train_dataset
        describe = blocks.describe if isinstance(blocks, ShuffledBlocks) else None
        self.guard = NonFiniteGuard(self.accelerator, max_non_finite_steps, describe)
        self._meter = ThroughputMeter(self.args, flops_per_token)
        self._checkpoints = CheckpointWriter(self.args, self.accelerator)
        self._instability = InstabilityDetector()
        self._evaluation = EvaluationBatches(self.args, self.accelerator)
        self._resumed_at = 0  # the last step of the checkpoint
        self._finished = False  # whether that is the last of all
        self._training_since_s = self._evaluating_since_s = time.monotonic()
        if self.args.label_smoothing_factor:
            self.label_smoother, self.compute_loss_func = None, SmoothedLoss(self.args.label_smoothing_factor)

    # Uploads are made of the finished folder alone, by `training.hub`.

    def init_hf_repo(self, *args: Any, **options: Any) -> None:
        """Nothing: `hub.push` makes the repository."""

    def push_to_hub(self, *args: Any, **options: Any) -> Any:
        """Nothing: when the Trainer saves the final model, its card is not written yet."""

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing: a checkpoint is not uploaded."""

    # Before the first step: a new optimizer, then the state of the checkpoint that the run resumes from.

    def _init_training_state(self, max_steps: int, *args: Any, **options: Any) -> Any:
        if self.state.global_step > self._resumed_at:  # --auto-find-batch-size starts again, with the weights of now
            raise RunError(
                f"auto-find-batch-size: expected batches that fit from the first step on, got no memory after step "
                f"{self.state.global_step}; start again with a smaller --per-device-train-batch-size"
            )
        self._training_since_s = time.monotonic()
        self.guard.reset()
        trained = super()._init_training_state(max_steps, *args, **options)
        find_best_checkpoint(self.state, self.args)
        self._instability.load(cast(Any, self.state.stateful_callbacks).get(STATE))
        self._resumed_at = self.state.global_step
        self._finished = self._resumed_at >= max_steps
        if self._finished:  # they would start another file or run
            for callback in get_reporting_integration_callbacks(self.args.report_to):
                self.remove_callback(callback)
        return trained

    def _prepare_for_training(self, *args: Any, **options: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **options)
        self.check_weights()
        return prepared

    def create_optimizer(self, *args: Any, **options: Any) -> torch.optim.Optimizer:
        new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **options)
        if new and self._muon:
            optimizer = self.optimizer = Muon(optimizer.param_groups, matrices(self.model), gate_factors(self.model))
        if new and isinstance(optimizer, torch.optim.Optimizer):
            accept_former_shapes(optimizer, self.model)
        if new and self._mup_base_width is not None:
            scale_learning_rates(optimizer, learning_rate_factors(self.model, self._mup_base_width))
        return optimizer

    def create_scheduler(self, num_training_steps: int, *args: Any, **options: Any) -> Any:
        folder = Path(str(self.args.output_dir))
        if self.args.warmup_steps is None:
            cast(Any, self.args).warmup_steps = steps = warmup_steps(self.args, num_training_steps)
            if self.is_world_process_zero() and was_begun(folder):
                record_warmup(folder, steps)
        else:
            check_warmup(self.args, num_training_steps)
        return super().create_scheduler(num_training_steps, *args, **options)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with loading(resume_from_checkpoint):
            if self._tensor_parallel > 1:
                load_weights(Path(resume_from_checkpoint), self.model)
            else:
                super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and not self._finished:
            check_resumable(Path(checkpoint))
        with loading(checkpoint):
            if checkpoint is not None and (self._tensor_parallel > 1 or is_sharded(Path(checkpoint))):
                load_training_state(Path(checkpoint), self.model, self._plain_optimizer(), self.lr_scheduler)
            else:
                super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with loading(checkpoint):
            super()._load_rng_state(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        with loading(checkpoint):
            super()._load_scaler(checkpoint)

    def _run_epoch(self, *args: Any, **options: Any) -> None:
        if self._finished:  # the Trainer would take one more step
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **options)

    # A step: its batches; forward, backward and counts per batch; the gradient norm; then the optimizer, which skips
    # parameters without a gradient.

    def get_batch_samples(self, *args: Any, **options: Any) -> Any:
        self._meter.start(self.state.num_input_tokens_seen)
        with self._meter.waiting():
            return super().get_batch_samples(*args, **options)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **options: Any) -> Tensor:
        blocks = inputs.pop(BLOCK, None)
        loss = super().training_step(model, inputs, *args, **options)
        self.guard.add(loss, blocks)
        return loss

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **options: Any) -> Any:
        smoothed = self.compute_loss_func
        if not model.training:
            self.compute_loss_func = None  # validation losses are the model's own
        try:
            return super().compute_loss(model, inputs, *args, **options)
        finally:
            self.compute_loss_func = smoothed

    def floating_point_ops(self, inputs: Any) -> int:
        return super().floating_point_ops(inputs) // self._tensor_parallel

    def _track_num_input_tokens(self, inputs: Any) -> None:
        """The Trainer's, with the tokens that the processes of a tensor-parallel group share counted once."""
        before = self.state.num_input_tokens_seen
        super()._track_num_input_tokens(inputs)
        self.state.num_input_tokens_seen = before + (self.state.num_input_tokens_seen - before) // self._tensor_parallel

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self.guard.check(model, norm, self.state, self.control)
        if self.guard.in_a_row == 1:
            self.check_weights()
        watch(self._instability, self.guard, self.state, self.args)
        return norm

    # After the step, as often as the arguments say: log, evaluate, save. Their time is not that of training.

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._finished and "train_runtime" in logs:
            return
        if "loss" in logs:
            self._tr_loss.zero_()  # the Trainer subtracts it from itself, which leaves NaN after an infinite loss
            logs |= self._meter.lap(self.state.num_input_tokens_seen)
        if "train_runtime" in logs:
            steps = self.state.global_step - self._resumed_at
            batch = self._train_batch_size * self.args.gradient_accumulation_steps * self._data_parallel
            logs |= speed("train", time.monotonic() - self._training_since_s, samples=steps * batch, steps=steps)
        if "eval_runtime" in logs:
            blocks, batch = len(self.eval_dataset), self.args.eval_batch_size * self._data_parallel
            seconds = time.monotonic() - self._evaluating_since_s
            logs |= speed("eval", seconds, samples=blocks, steps=math.ceil(blocks / batch))
        super().log(logs)  # without start_time, from which the Trainer would log another throughput
        self.state.log_history[-1] = only_finite(self.state.log_history[-1])

    def evaluate(self, *args: Any, **options: Any) -> dict[str, float]:
        if self.args.world_size > 1 and self.args.average_tokens_across_devices:
            self.gather_function = self._evaluation.gather_losses
        self._evaluating_since_s = time.monotonic()
        with self._meter.paused(), losses_unfiltered(self.args), weights_kept(self.model, self.args):
            metrics = super().evaluate(*args, **options)
        if not math.isfinite(metrics["eval_loss"]):
            logger.warning("validation loss at step %d is %s", self.state.global_step, metrics["eval_loss"])
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        asked_for = self.control.should_save  # by a signal, say; the Trainer forgets it with --save-strategy best
        better = math.isfinite(metrics["eval_loss"]) and super()._determine_best_metric(metrics, trial)
        return better or asked_for

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **options: Any) -> Any:
        return super().prediction_step(model, self._evaluation.without_padding(inputs), *args, **options)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.check_weights()
        folder = Path(self._get_output_dir(trial))
        cast(Any, self.state.stateful_callbacks)[STATE] = self._instability.state()
        displacing = self.guard.in_a_row == 0  # otherwise older weights may be the last good ones
        with self._meter.paused(), self._checkpoints.writing(folder, self.state, displacing=displacing):
            super()._save_checkpoint(model, trial)

    def _get_output_dir(self, trial: Any) -> str:
        return self._checkpoints.redirect(super()._get_output_dir(trial))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self._tensor_parallel == 1:
            super().save_model(output_dir, _internal_call)
            return
        state = full_state_dict(self.model)  # a collective operation
        if self.args.should_save:
            self._save(output_dir, state_dict=state)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        with self._checkpoints.placing(Path(str(output_dir or self.args.output_dir))) as folder:
            super()._save(str(folder), state_dict)
            if self.args.should_save:
                replace_pickled_arguments(folder, self.args)

    def save_state(self) -> None:
        if self.is_world_process_zero():
            write_json(Path(str(self.args.output_dir)) / TRAINER_STATE, dataclasses.asdict(self.state))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._tensor_parallel == 1:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        save_sharded(Path(output_dir) / SHARDS, self.model, self._plain_optimizer())  # a collective operation
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER)

    # After the last step, with --load-best-model-at-end.

    def _finalize_training(self, *args: Any, **options: Any) -> Any:
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:  # with a limit of 1, the Trainer would delete the newest checkpoint and keep the best one
            return super()._finalize_training(*args, **options)
        finally:
            self.args.save_total_limit = limit

    def _load_best_model(self) -> None:
        best = Path(str(self.state.best_model_checkpoint))
        reason = check(best)
        if reason is not None:
            raise RunError(f"load-best-model-at-end: expected the files that were written to {best}, got {reason}")
        if self._tensor_parallel > 1:
            load_weights(best, self.model)
        else:
            super()._load_best_model()

    def check_weights(self) -> None:
        """Raises RunError if the weights are not finite."""
        check_weights(self.model, self.accelerator, self.state.global_step, Path(str(self.args.output_dir)))

    def _plain_optimizer(self) -> torch.optim.Optimizer:
        """Without accelerate's wrapper."""
        return getattr(self.optimizer, "optimizer", self.optimizer)
