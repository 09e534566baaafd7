"""transformers' Trainer with what long pretraining runs need: one training step from top to bottom."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import Trainer

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
from flashmhf.layers.former_shapes import accept_former_shapes
from flashmhf.training.checkpoints import CheckpointWriter, replace_pickled_arguments
from flashmhf.training.learning_rates import learning_rate_factors, scale_learning_rates
from flashmhf.training.non_finite_steps import BLOCK, NonFiniteGuard
from flashmhf.training.throughput import ThroughputMeter


class PretrainingTrainer(Trainer):
    """Overrides of transformers' Trainer, in the order in which a run meets them; each delegates to a collaborator.

    `ThroughputMeter` times steps, `NonFiniteGuard` skips steps without a finite loss and gradient, `CheckpointWriter`
    makes checkpoints complete or absent, `EvaluationBatches` averages validation losses over processes. With tensor
    parallelism, `flashmhf.distributed` splits the model and reads and writes its checkpoints.

    Args:
        max_non_finite_steps: this many in a row end training, see `NonFiniteGuard`.
        flops_per_token: of a training step, as `estimates.cost.model_cost` counts them.
        mup_base_width: scales learning rates by fan-in, see `flashmhf.training.learning_rates`.
    """

    model: Any  # optional to transformers; set whenever these methods are called
    optimizer: Any
    lr_scheduler: Any

    def __init__(
        self,
        *args: Any,
        max_non_finite_steps: int,
        flops_per_token: float,
        mup_base_width: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self._mup_base_width = mup_base_width
        self._tensor_parallel = tensor_parallel_size(self.args)
        if self._tensor_parallel > 1:
            parallelize(self.model, self.accelerator)
        blocks = self.train_dataset
        describe = blocks.describe if isinstance(blocks, ShuffledBlocks) else None
        self.guard = NonFiniteGuard(self.accelerator, max_non_finite_steps, describe)
        self._meter = ThroughputMeter(self.args, flops_per_token)
        self._checkpoints = CheckpointWriter(self.args, self.accelerator)
        self._evaluation = EvaluationBatches(self.args, self.accelerator)

    # Before the first step: a new optimizer, then the state of the checkpoint that the run resumes from.

    def create_optimizer(self, *args: Any, **options: Any) -> torch.optim.Optimizer:
        new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **options)
        if new and isinstance(optimizer, torch.optim.Optimizer):
            accept_former_shapes(optimizer, self.model)
        if new and self._mup_base_width is not None:
            scale_learning_rates(optimizer, learning_rate_factors(self.model, self._mup_base_width))
        return optimizer

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._tensor_parallel > 1:
            load_weights(Path(resume_from_checkpoint), self.model)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and (self._tensor_parallel > 1 or is_sharded(Path(checkpoint))):
            load_training_state(Path(checkpoint), self.model, self._plain_optimizer(), self.lr_scheduler)
        else:
            super()._load_optimizer_and_scheduler(checkpoint)

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
        return norm

    # After the step, as often as the arguments say: log, evaluate, save. Their time is not that of training.

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self._meter.lap(self.state.num_input_tokens_seen)
        super().log(logs)  # without start_time, from which the Trainer would log another throughput

    def evaluate(self, *args: Any, **options: Any) -> dict[str, float]:
        if self.args.world_size > 1 and self.args.average_tokens_across_devices:
            self.gather_function = self._evaluation.gather_losses
        with self._meter.paused():
            return super().evaluate(*args, **options)

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **options: Any) -> Any:
        return super().prediction_step(model, self._evaluation.without_padding(inputs), *args, **options)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with self._meter.paused(), self._checkpoints.writing(Path(self._get_output_dir(trial)), self.state):
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
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            replace_pickled_arguments(Path(str(output_dir or self.args.output_dir)), self.args)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._tensor_parallel == 1:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        save_sharded(Path(output_dir) / SHARDS, self.model, self._plain_optimizer())  # a collective operation
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER)

    # After the last step, with --load-best-model-at-end.

    def _load_best_model(self) -> None:
        if self._tensor_parallel > 1:
            load_weights(Path(str(self.state.best_model_checkpoint)), self.model)
        else:
            super()._load_best_model()

    def _plain_optimizer(self) -> torch.optim.Optimizer:
        """Without accelerate's wrapper."""
        return getattr(self.optimizer, "optimizer", self.optimizer)
