"""Training with the heads split over groups of processes: tensor parallelism within a group, FSDP2 over the groups.

accelerate knows the mesh (`ParallelismConfig`), so its loaders give the processes of a group the same batches and the
Trainer counts a group once in losses and batch sizes. What they leave over is here: the split itself, evaluation and
token counts that see a group once, and checkpoints of which each process writes its part.
"""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.parallelism_config import ParallelismConfig
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import Trainer, TrainingArguments

from flashmhf.distributed.parallel import check_split, shard_parameters, tensor_parallel
from flashmhf.distributed.sharded import load_sharded, save_sharded
from flashmhf.errors import InputError
from flashmhf.models.fused_loss import IGNORED
from flashmhf.models.loading import load_model

SHARDS = "sharded"  # the folder in a checkpoint to which every process adds its part
OPTIMIZER = "optimizer.pt"
SCHEDULER = "scheduler.pt"


def split_heads(arguments: TrainingArguments, processes: int) -> None:
    """Lets a run with these arguments split its heads over groups of so many processes; 1 changes nothing.

    Raises:
        InputError: the run's processes do not fall into such groups, or a flag asks for another layout.
    """
    if processes < 1:
        raise InputError(f"tensor-parallel: expected 1 or more, got {processes}")
    if processes == 1:
        return
    world = arguments.world_size
    if world == 1:
        raise InputError(
            f"tensor-parallel: expected torchrun with a multiple of {processes} processes (--nproc-per-node), got one"
        )
    if world % processes != 0:
        raise InputError(f"tensor-parallel: expected a divisor of the {world} processes, got {processes}")
    for name in ("fsdp", "deepspeed", "torch_compile", "auto_find_batch_size"):  # compiled, DTensors reach the kernels
        if getattr(arguments, name):
            raise InputError(f"{name.replace('_', '-')}: expected none beside tensor-parallel, got it")
    if not arguments.average_tokens_across_devices:
        raise InputError("average-tokens-across-devices: expected true beside tensor-parallel, got false")
    arguments.parallelism_config = _Mesh(tp_size=processes, dp_shard_size=world // processes)
    loading: Any = arguments.accelerator_config
    loading.dispatch_batches = False  # dispatched, a stream's batch would go to every group


def head_processes(arguments: TrainingArguments) -> int:
    """Over how many processes the heads are split."""
    return 1 if arguments.parallelism_config is None else arguments.parallelism_config.tp_size


def check_layout(model: nn.Module, arguments: TrainingArguments, *, compiled: bool, fused_loss: bool) -> None:
    """Raises InputError where the model's heads cannot be split as `split_heads` has been told.

    Args:
        model: not split yet.
        arguments: what `split_heads` was given.
        compiled: whether its blocks are to be, which lets DTensors reach the kernels.
        fused_loss: whether it is asked for; no library has one for a vocabulary that is split.
    """
    if head_processes(arguments) == 1:
        return
    for name, wanted in (("regional-compilation", compiled), ("fused-loss", fused_loss)):
        if wanted:
            raise InputError(f"{name}: expected none beside tensor-parallel, got it")
    try:
        check_split(model, head_processes(arguments))
    except ValueError as error:
        raise InputError(f"tensor-parallel: the model's {error}") from error


class _Mesh(ParallelismConfig):
    """accelerate's, on the CPU too: accelerate refuses it there, where all that it does works as on GPUs."""

    def _validate_accelerator(self, accelerator: Accelerator) -> None:
        if accelerator.device.type != "cpu":
            super()._validate_accelerator(accelerator)


class LayoutTrainer(Trainer):
    """A Trainer that lays its model out as `split_heads` has been told, and goes on from checkpoints of any layout."""

    model: Any  # what the Trainer calls optional is there when these methods are called
    optimizer: Any
    lr_scheduler: Any

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._processes = head_processes(self.args)
        if self._processes > 1:
            mesh = self.accelerator.torch_device_mesh
            tensor_parallel(self.model, mesh["tp"])
            if self.args.world_size > self._processes:
                shard_parameters(self.model, mesh["dp_shard"])
            self.model._tp_size = self._processes  # what accelerate asks a model that is split already

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = super()._clip_grad_norm(model)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def _track_num_input_tokens(self, inputs: Any) -> None:
        before = self.state.num_input_tokens_seen
        super()._track_num_input_tokens(inputs)
        self.state.num_input_tokens_seen = before + (self.state.num_input_tokens_seen - before) // self._processes

    def floating_point_ops(self, inputs: Any) -> int:
        return super().floating_point_ops(inputs) // self._processes

    def evaluation_loop(self, *args: Any, **options: Any) -> Any:
        if self.args.world_size > 1 and self.args.average_tokens_across_devices:
            self.gather_function = self._mean_of_batch
        return super().evaluation_loop(*args, **options)

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **options: Any) -> Any:
        """The Trainer's, but for the blocks that accelerate repeats to fill up the last batches: they do not count."""
        if self._blocks_left() is not None:
            labels = inputs["labels"].clone()
            before = self.args.process_index // self._processes * len(labels)
            labels[max(0, self._blocks_left() - before) :] = IGNORED
            inputs = {**inputs, "labels": labels}
        return super().prediction_step(model, inputs, *args, **options)

    def _mean_of_batch(self, losses: Tensor) -> Tensor:
        """The loss of the batches of all processes, as often as they hold blocks: each loss is a part of their mean."""
        blocks = len(losses) * self.args.world_size // self._processes
        return self.accelerator.gather(losses).mean().repeat(self._blocks_left() or blocks)

    def _blocks_left(self) -> int | None:
        """In the last batches of a loader that does not fill them."""
        loader = self.accelerator.gradient_state
        return loader.remainder if loader.end_of_dataloader and loader.remainder > 0 else None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self._processes == 1:
            super().save_model(output_dir, _internal_call)
            return
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(self.model, options=whole)  # a collective operation; empty but on the first rank
        if self.args.should_save:
            first: dict[int, str] = {}
            for name, parameter in self.model.named_parameters(remove_duplicate=False):  # gathered apart, saved once
                state[name] = state[first.setdefault(id(parameter), name)]
            self._save(output_dir, state_dict=state)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._processes == 1:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        save_sharded(Path(output_dir) / SHARDS, self.model, self._plain_optimizer())
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        shards = Path(resume_from_checkpoint) / SHARDS
        if self._processes == 1:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        elif shards.is_dir():
            load_sharded(shards, self.model)
        else:
            weights = load_model(resume_from_checkpoint, dtype=torch.float32).state_dict()
            set_model_state_dict(self.model, weights, options=StateDictOptions(full_state_dict=True))

    def _load_best_model(self) -> None:
        if self._processes == 1:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        folder = Path(checkpoint or "")
        sharded = checkpoint is not None and (folder / SHARDS).is_dir()
        if not sharded and self._processes == 1:
            super()._load_optimizer_and_scheduler(checkpoint)
        elif sharded or (checkpoint is not None and (folder / OPTIMIZER).is_file()):  # else --save-only-model wrote it
            optimizer = self._plain_optimizer()
            if sharded:
                load_sharded(folder / SHARDS, self.model, optimizer)
            else:
                load_whole_optimizer(folder / OPTIMIZER, self.model, optimizer)
            self.lr_scheduler.load_state_dict(torch.load(folder / SCHEDULER, weights_only=True))
            for group, rate in zip(optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
                group["lr"] = rate

    def _plain_optimizer(self) -> Optimizer:
        return getattr(self.optimizer, "optimizer", self.optimizer)


def load_whole_optimizer(file: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Reads what one process saved, by the parameters' numbers, into an optimizer of the same model in any layout."""
    kept = torch.load(file, map_location="cpu", weights_only=True)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    order = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[str, Any] = {
        "state": {order[number]: values for number, values in kept["state"].items()},
        "param_groups": [{**group, "params": [order[i] for i in group["params"]]} for group in kept["param_groups"]],
    }
    set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(full_state_dict=True))
