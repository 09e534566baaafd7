"""The safetensors files of a checkpoint: which there are, and whether they hold what they should."""

import json
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePath

from safetensors import safe_open

from flashmhf.errors import InputError
from flashmhf.untrusted import check_regular, read_settings, reading

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000  # of the safetensors library
FLOATING_POINT = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is, its shape, and its dtype in the format's own words ("BF16")."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def check_safetensors(folder: Path) -> dict[str, Path]:
    """Every tensor of a checkpoint with its file, after checking each file's header and length.

    Raises:
        InputError: a file is missing or truncated, or its tensors are not those listed in the index.
    """
    if (folder / WEIGHTS).exists():  # the one that transformers prefers
        return dict.fromkeys(tensor_names(folder / WEIGHTS), folder / WEIGHTS)
    if not (folder / INDEX).exists():
        raise InputError(f"checkpoint: expected {WEIGHTS} or {INDEX} in {folder}, got neither{_pickles(folder)}")
    tensors = _indexed(folder)
    for file in sorted(set(tensors.values())):
        present = set(tensor_names(file))
        listed = {name for name, place in tensors.items() if place == file}
        if listed - present:
            raise InputError(f"checkpoint: expected tensor {min(listed - present)} in {file}, got none")
        if present - listed:
            raise InputError(f"checkpoint: expected only tensors of {INDEX}, got {min(present - listed)} in {file}")
    return tensors


def _pickles(folder: Path) -> str:
    found = sorted(folder.glob("pytorch_model*.bin"))
    return f", but {found[0].name}; pickled weights can run code and are not read" if found else ""


def _indexed(folder: Path) -> dict[str, Path]:
    """The index: each tensor's file, which is in the folder itself."""
    index = read_settings(folder / INDEX).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise InputError(f"checkpoint: expected a weight_map in {folder / INDEX}, got none")
    for name, file in index.items():
        if not isinstance(file, str) or PurePath(file).name != file or not file.endswith(".safetensors"):
            raise InputError(
                f"checkpoint: expected the name of a safetensors file in the folder for {name} in {folder / INDEX}, "
                f"got {file!r:.80}"
            )
    return {name: folder / file for name, file in index.items()}


def tensor_names(file: Path) -> list[str]:
    """The names of the tensors in a safetensors file.

    Raises:
        InputError: the file is missing, truncated or corrupt.
    """
    if not file.exists():
        raise InputError(f"checkpoint: expected the file {file}, got none")
    check_regular(file)
    try:
        with reading(f"checkpoint: {file} is corrupt"), safe_open(file, framework="pt") as tensors:
            return list(tensors.keys())
    except InputError as error:
        if (reason := _length_error(file)) is None:
            raise
        raise InputError(f"checkpoint: {file} is corrupt: {reason}") from error


def stored_tensors(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """The tensors of safetensors files, by name; none is loaded.

    Raises:
        InputError: a file is corrupt.
    """
    found = {}
    for file in sorted(set(files)):
        with reading(f"checkpoint: {file} is corrupt"), safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                part = tensors.get_slice(name)
                found[name] = StoredTensor(file, tuple(part.get_shape()), str(part.get_dtype()))
    return found


def check_floating_point(tensors: dict[str, StoredTensor]) -> None:
    """Raises InputError for a tensor that holds no floating-point numbers, whose bits would be read as other values."""
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATING_POINT:
            raise InputError(f"checkpoint: expected floating point in {name}, got {tensor.dtype} in {tensor.file}")


def check_number_of_layers(tensors: Iterable[str], layers: int) -> None:
    """Raises InputError if the tensors are of another number of layers, before so many layers are built."""
    stored = {int(match[1]) for name in tensors if (match := re.match(r"model\.layers\.(\d{1,9})\.", name))}
    if stored and max(stored) + 1 != layers:
        raise InputError(f"num_hidden_layers: expected {max(stored) + 1}, as the checkpoint has, got {layers}")


def _length_error(file: Path) -> str | None:
    """Expected and actual length of a safetensors file, by its header; None if the header cannot be read."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        if len(prefix) < 8:
            return f"expected a header, got {size} bytes in total"
        header_size = struct.unpack("<Q", prefix)[0]
        if header_size > size - 8:
            return f"expected a header of {header_size} bytes, got {size} bytes in total"
        if header_size > MAX_HEADER_BYTES:
            return f"expected a header of at most {MAX_HEADER_BYTES} bytes, got {header_size}"
        try:
            header = json.loads(stream.read(header_size))
            data = max(int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            return None
    return f"expected {8 + header_size + data} bytes, got {size}" if 8 + header_size + data != size else None
