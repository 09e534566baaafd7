"""Datasets in a cache that may be damaged, killed, full or shared: what is read from it is as it was written.

Each entry is a folder in the cache of `datasets`, named by a hash of everything that determines its content. It is
built under another name, sealed with the size and the hash of each of its files, and renamed. An entry that does not
match its seal is built again.
"""

import contextlib
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import datasets
from datasets import Dataset
from datasets.exceptions import DatasetGenerationError

from flashmhf.data.corrupt_records import reason
from flashmhf.errors import InputError, RunError
from flashmhf.files import exclusive_lock

logger = logging.getLogger(__name__)

FOLDER = "flashmhf"
SEAL = "seal.json"
BUILDING = ".building"  # ends the names of folders that are not sealed yet
LOCK = ".lock"
WAIT_S = 0.2


def cached(key: str, build: Callable[[Path], Dataset]) -> Dataset:
    """The entry of this key; `build` makes it, with memory-mapped files in the folder that it is given.

    Processes that need the same entry at the same time build it once.

    Raises:
        RunError: it cannot be written; names the folder.
    """
    folder = Path(datasets.config.HF_DATASETS_CACHE) / FOLDER / key
    if (dataset := _open(folder)) is not None:
        return dataset
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _waiting_for(folder.with_suffix(LOCK)):
            _remove_leftovers(folder)
            dataset = _open(folder)  # another process may have built it meanwhile
            return _build(folder, build) if dataset is None else dataset
    except (OSError, RuntimeError, DatasetGenerationError) as error:
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) else error
        if isinstance(cause, RunError | InputError):
            raise cause from error
        raise RunError(
            f"data: could not write the cache in {folder.parent}: {reason(cause or error)}; "
            "HF_DATASETS_CACHE selects another folder"
        ) from error


def forget(dataset: Dataset) -> None:
    """Removes a dataset that `cached` returned from the cache."""
    shutil.rmtree(Path(datasets.config.HF_DATASETS_CACHE) / FOLDER / dataset._fingerprint, ignore_errors=True)


def _build(folder: Path, build: Callable[[Path], Dataset]) -> Dataset:
    building = folder.with_suffix(BUILDING)
    building.mkdir()
    try:
        dataset = build(building)
        files = [Path(file["filename"]) for file in dataset.cache_files]
        if not files:  # an empty dataset is kept in memory
            return dataset
        del dataset
        seal = {str(file.relative_to(building)): [file.stat().st_size, _digest(file)] for file in files}
        (building / SEAL).write_text(json.dumps(seal))
        _remove(folder)  # a damaged one
        building.rename(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    dataset = _open(folder)
    if dataset is None:
        raise OSError(f"{folder} changes while it is used")
    return dataset


def _open(folder: Path) -> Dataset | None:
    """None if there is no entry, or a damaged one."""
    try:
        seal = json.loads((folder / SEAL).read_text())
        for name, (size, digest) in seal.items():
            if (folder / name).stat().st_size != size or _digest(folder / name) != digest:
                raise ValueError(f"{name} is not as it was written")
        parts = [Dataset.from_file(str(folder / name)) for name in seal]
    except FileNotFoundError as error:
        if folder.exists():
            logger.warning("%s is incomplete without %s, and is built again", folder, Path(error.filename).name)
        return None
    except Exception as error:  # a damaged file can raise anything
        logger.warning("%s is built again: %s", folder, reason(error))
        return None
    dataset = parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
    dataset._fingerprint = folder.name
    return dataset


def _remove(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    else:
        entry.unlink(missing_ok=True)


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "blake2b").hexdigest()


def _remove_leftovers(folder: Path) -> None:
    """Removes what killed processes were building: folders whose key is not locked, and that of `folder`."""
    for left in folder.parent.glob(f"*{BUILDING}"):
        if left.stem == folder.name:
            shutil.rmtree(left)
            continue
        with contextlib.suppress(OSError, InputError), exclusive_lock(left.with_suffix(LOCK)):
            shutil.rmtree(left)


@contextlib.contextmanager
def _waiting_for(lock: Path) -> Iterator[None]:
    """`exclusive_lock` once other processes have released it."""
    with contextlib.ExitStack() as stack:
        for attempt in count():
            try:
                stack.enter_context(exclusive_lock(lock))
                break
            except BlockingIOError:
                if attempt == 0:
                    logger.info("data: waiting for another process that writes the cache in %s", lock.parent)
                time.sleep(WAIT_S)
        yield
