"""Checkpoints of the Trainer that are whole or not there: written beside, listed in a manifest, renamed."""

import logging
import re
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from flashmhf.distributed.trainer import LayoutTrainer
from flashmhf.files import atomic_rename, atomic_write
from flashmhf.training.manifest import check, write_manifest

logger = logging.getLogger(__name__)

UNFINISHED = ".unfinished"  # the folder in which checkpoints grow
TRAINER_STATE = "trainer_state.json"
PICKLED_ARGUMENTS = "training_args.bin"
ARGUMENTS = "training_args.json"
CHECKPOINT = re.compile(r"checkpoint-(\d+)")


class CheckpointTrainer(LayoutTrainer):
    """Writes a checkpoint beside, flushes it, and gives it its name when all of it, with its manifest, is on the disk.

    What `save_total_limit` keeps is counted in whole checkpoints. No pickle holds the training arguments.
    """

    _saving = False

    def _get_output_dir(self, trial: Any) -> str:
        folder = Path(super()._get_output_dir(trial))
        return str(folder / UNFINISHED if self._saving else folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        output_dir = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(output_dir / UNFINISHED, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._saving = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._saving = False
        self._name_best(output_dir)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            unfinished = output_dir / UNFINISHED / name
            self.state.save_to_json(str(unfinished / TRAINER_STATE))
            write_manifest(unfinished)
            give_name(unfinished, output_dir / name)
            best = self.state.best_model_checkpoint
            rotate(output_dir, self.args.save_total_limit, None if best is None else Path(best))
        self.accelerator.wait_for_everyone()

    def _name_best(self, output_dir: Path) -> None:
        """The Trainer looked for the best checkpoint where this one grew."""
        best = self.state.best_model_checkpoint
        if best is not None and Path(best).parent.name == UNFINISHED:
            self.state.best_model_checkpoint = str(output_dir / Path(best).name)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(str(output_dir if output_dir is not None else self.args.output_dir))
            (folder / PICKLED_ARGUMENTS).unlink(missing_ok=True)
            atomic_write(folder / ARGUMENTS, self.args.to_json_string() + "\n")


def checkpoints(output_dir: Path) -> list[Path]:
    """Folders of checkpoints by name, the newest first, whole or not."""
    found = {int(match[1]): path for path in output_dir.iterdir() if (match := CHECKPOINT.fullmatch(path.name))}
    return [found[step] for step in sorted(found, reverse=True) if found[step].is_dir()]


def give_name(unfinished: Path, named: Path) -> None:
    """Puts a whole checkpoint in its place; while an older one of that name goes, the new one is whole beside it."""
    if named.exists():
        shutil.rmtree(named)
    atomic_rename(unfinished, named)
    unfinished.parent.rmdir()


def recover(output_dir: Path) -> None:
    """After a kill: names a checkpoint that was whole already, and removes one that was not."""
    if not (output_dir / UNFINISHED).is_dir():
        return
    for unfinished in checkpoints(output_dir / UNFINISHED):
        if check(unfinished) is None:
            give_name(unfinished, output_dir / unfinished.name)
            return
        logger.warning("%s was not finished when the run ended; removed", unfinished.name)
    shutil.rmtree(output_dir / UNFINISHED)


def rotate(output_dir: Path, limit: int | None, best: Path | None) -> None:
    """Deletes what is older than the newest `limit` checkpoints that are whole, but for `best`.

    Those that are torn do not count, so that they never displace one that is not.
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
