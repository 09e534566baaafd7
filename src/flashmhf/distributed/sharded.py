"""Checkpoints that each rank writes its part of, by torch.distributed.checkpoint; they load into any other layout.

They hold tensors alone. torch keeps their table of contents as a pickle, which is read here without calling anything
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
from torch.optim import Optimizer

from flashmhf.errors import InputError

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


def save_sharded(folder: Path, model: nn.Module, optimizer: Optimizer | None = None) -> None:
    """Writes the parameters, and what the optimizer keeps of each, into a folder that all ranks see."""
    dcp.save(_tensors(_state(model, optimizer)), storage_writer=dcp.FileSystemWriter(folder), no_dist=_alone())


def load_sharded(folder: Path, model: nn.Module, optimizer: Optimizer | None = None) -> None:
    """Reads what `save_sharded` wrote, from any number of ranks and any layout, into a model in any other.

    A model that is in no layout takes the whole; its `save_pretrained` then writes safetensors. The learning rate and
    its like are those of `optimizer`.

    Raises:
        InputError: there is no such checkpoint, or its table of contents is none.
    """
    state = _state(model, optimizer)
    tensors = _tensors(state)
    dcp.load(tensors, storage_reader=_Reader(folder), no_dist=_alone())
    state |= tensors
    set_model_state_dict(model, {n.removeprefix("model:"): v for n, v in state.items() if n.startswith("model:")})
    if optimizer is not None:
        kept: Any = {n.removeprefix("optimizer:"): v for n, v in state.items() if n.startswith("optimizer:")}
        set_optimizer_state_dict(model, optimizer, kept, options=_FLAT)


def _state(model: nn.Module, optimizer: Optimizer | None) -> dict[str, Any]:
    state = {f"model:{name}": value for name, value in get_model_state_dict(model).items()}
    if optimizer is not None:
        flat: dict[str, Any] = get_optimizer_state_dict(model, optimizer, options=_FLAT)
        state |= {f"optimizer:{name}": value for name, value in flat.items()}
    return state


def _tensors(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _alone() -> bool:
    return not (dist.is_available() and dist.is_initialized())


class _Table(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in TABLE_CLASSES:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"a pickle that calls {module}.{name}")


class _Reader(dcp.FileSystemReader):
    """Refuses a table that would run code, and entries that are no tensors, which torch would unpickle."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        file = Path(self.path) / TABLE
        try:
            with file.open("rb") as stream:
                table = _Table(stream).load()
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            raise InputError(f"checkpoint: expected a table of contents in {file}, got: {error}") from error
        others = [name for name, entry in table.state_dict_metadata.items() if type(entry) is not TensorStorageMetadata]
        if others:
            raise InputError(f"checkpoint: expected tensors alone in {file}, got {others[0]}")
        table.storage_meta = table.storage_meta or dcp.metadata.StorageMeta()
        table.storage_meta.load_id = self.load_id
        return table
