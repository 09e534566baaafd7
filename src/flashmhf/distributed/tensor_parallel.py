"""`--tensor-parallel`: the heads split over groups of processes, FSDP2 over the groups.

accelerate knows the mesh (`ParallelismConfig`): its loaders give the processes of a group the same batches, and the
Trainer counts a group once in losses and batch sizes.
"""

from typing import Any

from accelerate import Accelerator
from accelerate.parallelism_config import ParallelismConfig
from torch import nn
from transformers import TrainingArguments

from flashmhf.distributed.parallel import check_split, shard_parameters, tensor_parallel
from flashmhf.errors import InputError


def configure_tensor_parallel(arguments: TrainingArguments, size: int) -> None:
    """Has a run with these arguments split its heads over groups of `size` processes; 1 changes nothing.

    Raises:
        InputError: the number of processes is no multiple of `size`, or a flag asks for another kind of parallelism.
    """
    if size < 1:
        raise InputError(f"tensor-parallel: expected 1 or more, got {size}")
    if size == 1:
        return
    world = arguments.world_size
    if world == 1:
        raise InputError(
            f"tensor-parallel: expected torchrun with a multiple of {size} processes (--nproc-per-node), got one"
        )
    if world % size != 0:
        raise InputError(f"tensor-parallel: expected a divisor of the {world} processes, got {size}")
    # compiled, DTensors would reach the kernels; only the first process gathers the model
    for name in ("fsdp", "deepspeed", "torch_compile", "auto_find_batch_size", "save_on_each_node"):
        if getattr(arguments, name):
            raise InputError(f"{name.replace('_', '-')}: expected none together with tensor-parallel, got it")
    if not arguments.average_tokens_across_devices:
        raise InputError("average-tokens-across-devices: expected true together with tensor-parallel, got false")
    arguments.parallelism_config = _ParallelismConfig(tp_size=size, dp_shard_size=world // size)
    loading: Any = arguments.accelerator_config
    loading.dispatch_batches = False  # if dispatched, a stream's batch would go to every group


def tensor_parallel_size(arguments: TrainingArguments) -> int:
    """The number of processes over which the heads are split."""
    return 1 if arguments.parallelism_config is None else arguments.parallelism_config.tp_size


def check_tensor_parallel(model: nn.Module, arguments: TrainingArguments, *, compiled: bool, fused_loss: bool) -> None:
    """Raises InputError if the model's heads cannot be split as `configure_tensor_parallel` was told.

    Args:
        model: not split yet.
        arguments: after `configure_tensor_parallel`.
        compiled: whether its layers are to be compiled, in which case DTensors would reach the kernels.
        fused_loss: whether a fused loss is asked for; no library has one for a sharded vocabulary.
    """
    size = tensor_parallel_size(arguments)
    if size == 1:
        return
    for name, requested in (("regional-compilation", compiled), ("fused-loss", fused_loss)):
        if requested:
            raise InputError(f"{name}: expected none together with tensor-parallel, got it")
    try:
        check_split(model, size)
    except ValueError as error:
        raise InputError(f"tensor-parallel: the model's {error}") from error


def parallelize(model: Any, accelerator: Accelerator) -> None:
    """Splits the model over the mesh that `configure_tensor_parallel` gave accelerate, in place."""
    mesh = accelerator.torch_device_mesh
    tensor_parallel(model, mesh["tp"])
    if accelerator.num_processes > mesh["tp"].size():
        shard_parameters(model, mesh["dp_shard"])
    model._tp_size = mesh["tp"].size()  # accelerate asks a model that is already split


class _ParallelismConfig(ParallelismConfig):
    """accelerate's, which it refuses on the CPU, although everything it does works there, too."""

    def _validate_accelerator(self, accelerator: Accelerator) -> None:
        if accelerator.device.type != "cpu":
            super()._validate_accelerator(accelerator)
