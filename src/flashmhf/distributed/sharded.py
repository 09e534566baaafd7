"""Checkpoints with torch.distributed.checkpoint: each rank writes its shards, and any other sharding can load them.

They hold tensors only. torch stores their table of contents as a pickle, which is read here without calling anything
but the classes of that table.
"""

import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from flashmhf.errors import InputError
from flashmhf.layers.former_shapes import former_shapes, in_present_shapes
from flashmhf.models.loading import load_model

SHARDS = "sharded"  # the folder in a Trainer's checkpoint to which every process adds its shards
OPTIMIZER = "optimizer.pt"
SCHEDULER = "scheduler.pt"
TABLE = ".metadata"
_METADATA = "torch.distributed.checkpoint.metadata"
TABLE_CLASSES = {
    *((_METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
    *((_METADATA, f"{name}StorageMetadata") for name in ("Bytes", "Chunk", "Tensor")),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
}
_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
_FULL = StateDictOptions(full_state_dict=True)


def save_sharded(folder: Path, model: nn.Module, optimizer: Optimizer | None = None) -> None:
    """Writes the parameters, and what the optimizer keeps of each, into a folder that all ranks see.

    A collective operation: every rank calls it and writes its own shards. Tensors only, no pickled objects.

    Args:
        folder: for torch.distributed.checkpoint's files.
        model: sharded or not.
        optimizer: of the model's parameters; None leaves its moments out.
    """
    dcp.save(_tensors(_state(model, optimizer)), storage_writer=dcp.FileSystemWriter(folder), no_dist=_single())


def load_sharded(folder: Path, model: nn.Module, optimizer: Optimizer | None = None) -> None:
    """Reads what `save_sharded` wrote, from any number of ranks and any sharding, into a model with any other.

    A model that is not sharded gets everything; its `save_pretrained` then writes safetensors.

    Args:
        folder: of `save_sharded`.
        model: of the same configuration; its parameters are overwritten in place.
        optimizer: gets the moments that were saved; its learning rate and other options stay.

    Raises:
        InputError: there is no such checkpoint, or its table of contents cannot be read.
    """
    state = _state(model, optimizer)
    tensors = _tensors(state)
    former = _in_former_shape(_Reader(folder).read_metadata(), model, tensors)
    dcp.load(tensors | former, storage_reader=_Reader(folder), no_dist=_single())
    for name, tensor in former.items():
        _copy(tensor.flatten(0, 1), tensors[name])
    state |= tensors
    set_model_state_dict(model, {n.removeprefix("model:"): v for n, v in state.items() if n.startswith("model:")})
    if optimizer is not None:
        kept: Any = {n.removeprefix("optimizer:"): v for n, v in state.items() if n.startswith("optimizer:")}
        set_optimizer_state_dict(model, optimizer, kept, options=_FLAT)


def full_state_dict(model: nn.Module) -> dict[str, Any]:
    """Parameters of a sharded model, gathered on the first rank's CPU; empty on the others. A collective operation."""
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if state:
        first: dict[int, str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):  # tied ones are gathered separately
            state[name] = state[first.setdefault(id(parameter), name)]
    return state


def is_sharded(checkpoint: Path) -> bool:
    """Whether a Trainer's checkpoint holds the shards of a tensor-parallel run."""
    return (checkpoint / SHARDS).is_dir()


def load_weights(checkpoint: Path, model: nn.Module) -> None:
    """Reads a Trainer's checkpoint, sharded or not, into a sharded model."""
    if is_sharded(checkpoint):
        load_sharded(checkpoint / SHARDS, model)
    else:
        weights = load_model(str(checkpoint), dtype=torch.float32).state_dict()
        set_model_state_dict(model, weights, options=_FULL)


def load_training_state(checkpoint: Path, model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler) -> None:
    """Reads optimizer and scheduler from a Trainer's checkpoint, where at least one of model and checkpoint is sharded.

    A checkpoint without them, from --save-only-model, changes nothing.
    """
    if is_sharded(checkpoint):
        load_sharded(checkpoint / SHARDS, model, optimizer)
    elif (checkpoint / OPTIMIZER).is_file():
        load_full_optimizer(checkpoint / OPTIMIZER, model, optimizer)
    else:
        return
    scheduler.load_state_dict(torch.load(checkpoint / SCHEDULER, weights_only=True))
    for group, rate in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
        group["lr"] = rate


def load_full_optimizer(file: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Reads what one process saved, by parameter number, into an optimizer of the same model with any sharding."""
    kept = torch.load(file, map_location="cpu", weights_only=True)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    order = [names[id(parameter)] for parameter in parameters]
    moments = in_present_shapes(kept["state"], parameters, model)
    state: dict[str, Any] = {
        "state": {order[number]: values for number, values in moments.items()},
        "param_groups": [{**group, "params": [order[i] for i in group["params"]]} for group in kept["param_groups"]],
    }
    set_optimizer_state_dict(model, optimizer, state, options=_FULL)


def _state(model: nn.Module, optimizer: Optimizer | None) -> dict[str, Any]:
    state = {f"model:{name}": value for name, value in get_model_state_dict(model).items()}
    if optimizer is not None:
        flat: dict[str, Any] = get_optimizer_state_dict(model, optimizer, options=_FLAT)
        state |= {f"optimizer:{name}": value for name, value in flat.items()}
    return state


def _in_former_shape(table: Metadata, model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Room for those of `tensors` that the checkpoint has in their former shape, which differs in how it is sharded."""
    room = {}
    for name, shape in former_shapes(model).items():
        for key in tensors:
            if key == f"model:{name}" or key.startswith(f"optimizer:state.{name}."):
                entry = table.state_dict_metadata.get(key)
                if isinstance(entry, TensorStorageMetadata) and entry.size == shape:
                    room[key] = torch.empty(shape, dtype=tensors[key].dtype)
    return room


def _copy(source: Tensor, destination: Tensor) -> None:
    """Copies a tensor into another with the same shape, of which this rank may have only a shard."""
    if isinstance(destination, DTensor):
        shape, offsets = compute_local_shape_and_global_offset(
            destination.shape, destination.device_mesh, destination.placements
        )
        source = source[tuple(slice(first, first + size) for first, size in zip(offsets, shape, strict=True))]
        destination = destination.to_local()
    destination.copy_(source)


def _tensors(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _single() -> bool:
    return not (dist.is_available() and dist.is_initialized())


class _Table(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in TABLE_CLASSES:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"a pickle that calls {module}.{name}")


class _Reader(dcp.FileSystemReader):
    """Refuses a table that would run code, and entries other than tensors, which torch would unpickle."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        file = Path(self.path) / TABLE
        try:
            with file.open("rb") as stream:
                table = _Table(stream).load()
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            raise InputError(f"checkpoint: expected a table of contents in {file}, got: {error}") from error
        others = [name for name, entry in table.state_dict_metadata.items() if type(entry) is not TensorStorageMetadata]
        if others:
            raise InputError(f"checkpoint: expected only tensors in {file}, got {others[0]}")
        table.storage_meta = table.storage_meta or dcp.metadata.StorageMeta()
        table.storage_meta.load_id = self.load_id
        return table
