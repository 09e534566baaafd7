"""Checkpoints of the Trainer that are complete or absent: written elsewhere, listed in a manifest, renamed."""

import contextlib
import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from pickle import PickleError

import torch
from accelerate import Accelerator
from transformers import TrainerState, TrainingArguments

from flashmhf.distributed.sharded import SCHEDULER
from flashmhf.errors import InputError
from flashmhf.files import atomic_rename, atomic_write, flush, read_json
from flashmhf.system_errors import system_error
from flashmhf.training.manifest import check, write_manifest

logger = logging.getLogger(__name__)

UNFINISHED = ".unfinished"  # the folder in which checkpoints are written, and the final model
FINAL = "model"  # in it
WEIGHTS = "model*.safetensors*"  # and their index
TRAINER_STATE = "trainer_state.json"
PICKLED_ARGUMENTS = "training_args.bin"
ARGUMENTS = "training_args.json"
CHECKPOINT = re.compile(r"checkpoint-(\d+)")


class CheckpointWriter:
    """Has the Trainer write each checkpoint into another folder, and renames it once all of it is on the disk.

    `save_total_limit` counts complete checkpoints only.
    """

    def __init__(self, arguments: TrainingArguments, accelerator: Accelerator) -> None:
        self._arguments = arguments
        self._accelerator = accelerator
        self._writing = False

    def redirect(self, output_dir: str) -> str:
        """The folder that gets a checkpoint: within `writing` not the run's."""
        return str(Path(output_dir) / UNFINISHED) if self._writing else output_dir

    @contextlib.contextmanager
    def writing(self, output_dir: Path, state: TrainerState, *, displacing: bool) -> Iterator[None]:
        """Within the context the Trainer writes the checkpoint of `state`; it gets its name at the end.

        Args:
            output_dir: the run's folder.
            state: of the Trainer, after the last step.
            displacing: whether older checkpoints beyond `save_total_limit` are deleted then.
        """
        if self._arguments.should_save:
            remove_unfinished(output_dir)
        self._accelerator.wait_for_everyone()
        self._writing = True
        try:
            yield
        finally:
            self._writing = False
        best = state.best_model_checkpoint
        if best is not None and Path(best).parent.name == UNFINISHED:  # the Trainer found it where it was written
            state.best_model_checkpoint = str(output_dir / Path(best).name)
        self._accelerator.wait_for_everyone()
        if self._arguments.should_save:
            self._finish(output_dir, state)
            if displacing:
                kept = state.best_model_checkpoint
                rotate(output_dir, self._arguments.save_total_limit, None if kept is None else Path(kept))
        self._accelerator.wait_for_everyone()

    @contextlib.contextmanager
    def placing(self, folder: Path) -> Iterator[Path]:
        """Where to write a model: a checkpoint's in its folder, the final one elsewhere; it replaces an older one.

        Until all of its files are on the disk the older one stays as it was.
        """
        if not self._arguments.should_save or folder != Path(str(self._arguments.output_dir)):
            yield folder
            return
        remove_unfinished(folder)
        written = folder / UNFINISHED / FINAL
        written.mkdir(parents=True)
        yield written
        replace_model(written, folder)
        remove_unfinished(folder)

    def _finish(self, output_dir: Path, state: TrainerState) -> None:
        name = f"checkpoint-{state.global_step}"
        unfinished = output_dir / UNFINISHED / name
        state.save_to_json(str(unfinished / TRAINER_STATE))
        write_manifest(unfinished)
        give_name(unfinished, output_dir / name)


def replace_model(written: Path, folder: Path) -> None:
    """Moves a model's files into a folder, in place of those of an older one."""
    files = sorted(written.iterdir())
    for file in files:
        flush(file)
    for file in files:
        file.replace(folder / file.name)
    names = {file.name for file in files}
    for old in folder.glob(WEIGHTS):
        if old.name not in names:  # of a model that was split otherwise
            old.unlink()
    flush(folder)


def replace_pickled_arguments(folder: Path, arguments: TrainingArguments) -> None:
    """Writes the training arguments as JSON in place of the pickle that the Trainer wrote next to a model."""
    (folder / PICKLED_ARGUMENTS).unlink(missing_ok=True)
    atomic_write(folder / ARGUMENTS, arguments.to_json_string() + "\n")


def checkpoints(output_dir: Path) -> list[Path]:
    """Folders of checkpoints by name, newest first, complete or not."""
    found = {step: path for path in output_dir.iterdir() if (step := _step(path)) is not None}
    return [found[step] for step in sorted(found, reverse=True) if found[step].is_dir()]


def _step(folder: Path) -> int | None:
    match = CHECKPOINT.fullmatch(folder.name)
    return None if match is None else int(match[1])


def unreadable_state(checkpoint: Path) -> str | None:
    """What is wrong with the state of the Trainer in a checkpoint, or None."""
    try:
        state = TrainerState(**read_json(checkpoint / TRAINER_STATE))
    except (InputError, TypeError):
        return f"{TRAINER_STATE} is not what the Trainer writes"
    if state.global_step != _step(checkpoint):
        return f"{TRAINER_STATE} is that of step {state.global_step!r:.20}"
    numbers = (state.max_steps, state.num_input_tokens_seen)
    if not all(isinstance(number, int) and number >= 0 for number in numbers):
        return f"{TRAINER_STATE} has no valid number of steps and tokens"
    history = state.log_history
    if not isinstance(history, list) or not all(isinstance(row, dict) and "step" in row for row in history):
        return f"{TRAINER_STATE} has no valid log_history"
    return None


@contextlib.contextmanager
def loading(checkpoint: str | None) -> Iterator[None]:
    """Names the checkpoint if torch or transformers cannot load it, in whatever way they say so.

    Raises:
        InputError: its files hold something else than this run's state.
    """
    try:
        yield
    except InputError:
        raise
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError, EOFError, PickleError) as error:
        if checkpoint is None or isinstance(error, torch.OutOfMemoryError) or system_error(error) is not None:
            raise
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise InputError(
            f"resume: expected the state of this run, got {Path(checkpoint).name}, which cannot be loaded ({reason}); "
            "remove it to resume from the one before"
        ) from error


def check_resumable(checkpoint: Path) -> None:
    """Raises InputError if a checkpoint has no optimizer, since the Trainer would go on with a new one."""
    if not (checkpoint / SCHEDULER).is_file():
        raise InputError(
            f"resume: expected a checkpoint with the optimizer's state, got {checkpoint.name}, "
            "which was written with --save-only-model"
        )


def find_best_checkpoint(state: TrainerState, arguments: TrainingArguments) -> None:
    """Gives the best checkpoint of a resumed run the path that it has now: the folder may have been moved.

    Raises:
        InputError: it is not in the folder, and the run is to end with its weights.
    """
    if state.best_global_step is None:
        return
    best = Path(str(arguments.output_dir)) / f"checkpoint-{state.best_global_step}"
    state.best_model_checkpoint = str(best) if best.is_dir() else None
    if arguments.load_best_model_at_end and not best.is_dir():
        raise InputError(f"load-best-model-at-end: expected {best.name}, the best so far, in {best.parent}, got none")


def give_name(unfinished: Path, named: Path) -> None:
    """Moves a complete checkpoint into its place, after deleting an older one of that name."""
    if named.exists():
        shutil.rmtree(named)
    atomic_rename(unfinished, named)
    unfinished.parent.rmdir()


def recover(output_dir: Path) -> None:
    """After a kill: names a checkpoint that was complete already, and removes what was not."""
    place = output_dir / UNFINISHED
    if not place.is_dir() or place.is_symlink():
        remove_unfinished(output_dir)
        return
    for unfinished in checkpoints(place):
        if check(unfinished) is None:
            give_name(unfinished, output_dir / unfinished.name)
            return
        logger.warning("%s was not finished when the run ended; removed", unfinished.name)
    remove_unfinished(output_dir)


def remove_unfinished(output_dir: Path) -> None:
    """Removes what was being written; of a link, the link."""
    place = output_dir / UNFINISHED
    if place.is_symlink() or place.is_file():
        place.unlink()
    else:
        shutil.rmtree(place, ignore_errors=True)


def rotate(output_dir: Path, limit: int | None, best: Path | None) -> None:
    """Deletes what is older than the newest `limit` complete checkpoints, except `best`.

    Corrupt ones do not count, so that they never displace a good one.
    """
    if limit is None or limit < 1:
        return
    kept = 0
    for folder in checkpoints(output_dir):
        if kept >= limit:
            if best is None or folder.name != best.name:
                shutil.rmtree(folder, ignore_errors=True)
                if folder.exists():
                    logger.warning("%s could not be removed", folder)
        elif check(folder, contents=False) is None:
            kept += 1
