"""The output folder of a run: new, or one to resume in, and from which of its checkpoints."""

import contextlib
import logging
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from flashmhf.errors import InputError
from flashmhf.files import exclusive_lock, remove_leftovers
from flashmhf.system_errors import is_disk_full
from flashmhf.training.checkpoints import checkpoints, recover, remove_unfinished, unreadable_state
from flashmhf.training.config import NAMES, RUN_FILE, TrainConfig
from flashmhf.training.fingerprints import Fingerprints, changes, refused_difference
from flashmhf.training.manifest import check
from flashmhf.training.pickles import unsafe_reason
from flashmhf.training.run_files import read_fingerprints, read_run
from flashmhf.training.run_log import LOG_FILE, read_log

if sys.platform != "win32":
    from flashmhf.files import fcntl as fcntl  # the lock of `only_writer`

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"
CURVES = "runs"  # TensorBoard's
DISK_FULL_BYTES = 2**20


@contextlib.contextmanager
def only_writer(output_dir: Path) -> Iterator[None]:
    """Within the context, no other process of this machine can enter it; the lock ends with the process.

    Raises:
        InputError: another process trains into the folder.
    """
    if output_dir.exists() and not output_dir.is_dir():
        yield  # a file is refused later
        return
    missing = [folder for folder in (output_dir, *output_dir.parents) if not folder.exists()]
    output_dir.mkdir(parents=True, exist_ok=True)
    try:
        with exclusive_lock(output_dir / LOCK_FILE):
            remove_leftovers(output_dir)
            yield
    except BlockingIOError as error:
        if error.filename != str(output_dir / LOCK_FILE):
            raise
        raise InputError(f"output-dir: expected a folder that no other process trains into, got {output_dir}") from None
    finally:
        with contextlib.suppress(OSError):  # a refused run leaves nothing behind
            for folder in missing:
                folder.rmdir()


def prepare_output_dir(output_dir: Path, config: TrainConfig, resume: bool) -> Path | None:
    """The checkpoint to resume from, or None if the run starts at its first step.

    Args:
        output_dir: new or empty, or the folder of a run to resume, or of one that ended before its first step.
        config: its `identity` must equal that of the run in the folder.
        resume: whether to resume.

    Raises:
        InputError: the folder holds something else, another run, or only incomplete checkpoints.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise InputError(f"output-dir: expected a folder, got the file {output_dir}")
    content = _content(output_dir)
    if _failed_at_its_start(output_dir, content):
        return None
    if not resume:
        if content:
            held = ", ".join(content[:3])
            raise InputError(f"output-dir: expected a new or empty folder, or --resume, got {output_dir} with {held}")
        return None
    if RUN_FILE not in content:
        raise InputError(f"resume: expected a run's folder with {RUN_FILE}, got {output_dir} without")
    earlier = read_run(output_dir).identity()
    by_content = NAMES if read_fingerprints(output_dir) is not None else ()
    for name, value in config.identity().items():
        if earlier[name] != value and name not in by_content:
            raise InputError(f"resume: expected the {name} of the earlier run, {earlier[name]!r}, got {value!r}")
    recover(output_dir)
    return last_good_checkpoint(output_dir)


def check_same_inputs(output_dir: Path, now: Fingerprints) -> None:
    """Compares the inputs of a run to resume with those of its earlier process, wherever they are.

    Raises:
        InputError: the run would not be the same one; names the difference.
    """
    if _failed_at_its_start(output_dir, _content(output_dir)):
        return
    earlier = read_fingerprints(output_dir)
    if earlier is None:
        logger.warning("%s is of an older version: make sure that data and seed are those of then", RUN_FILE)
        return
    if difference := refused_difference(earlier, now):
        raise InputError(f"resume: {difference}")
    for name, before, after in changes(earlier.arguments, now.arguments):
        logger.warning("%s was %r before, and is %r from here on", name, before, after)


def _content(output_dir: Path) -> list[str]:
    if not output_dir.exists():
        return []
    return sorted(path.name for path in output_dir.iterdir() if path.name != LOCK_FILE)


def _failed_at_its_start(output_dir: Path, content: list[str]) -> bool:
    """Whether the folder holds a run that ended before its first step: nothing of it is worth a refusal."""
    if RUN_FILE not in content or not set(content) <= {RUN_FILE, LOG_FILE, CURVES}:
        return False
    return all(row["step"] == 0 for row in read_log(output_dir).rows)


def last_good_checkpoint(output_dir: Path) -> Path | None:
    """The newest complete checkpoint; logs each that is passed over. None if there are no checkpoints.

    Raises:
        InputError: there are checkpoints, and none is complete.
    """
    passed_over = []
    for folder in checkpoints(output_dir):
        reason = check(folder) or unsafe_reason(folder) or unreadable_state(folder)
        if reason is None:
            logger.info("resuming from %s", folder.name)
            return folder
        logger.warning("%s passed over: %s", folder.name, reason)
        passed_over.append(f"{folder.name} ({reason})")
    if passed_over:
        raise InputError(
            f"resume: expected a complete checkpoint in {output_dir}, got {len(passed_over)} that are not: "
            + ", ".join(passed_over[:3])
        )
    return None


@contextlib.contextmanager
def explain_full_disk(output_dir: Path) -> Iterator[None]:
    """If writing fails because the disk is full: removes what is incomplete and says so in one line."""
    try:
        yield
    except Exception as error:  # torch, safetensors and the operating system raise different types
        here = _free_bytes(output_dir) <= DISK_FULL_BYTES
        if not here and not is_disk_full(error):
            raise
        remove_unfinished(output_dir)
        kept = next((folder for folder in checkpoints(output_dir) if check(folder) is None), None)
        then = f"--resume continues from {kept.name}" if kept else "no checkpoint has been written yet"
        if here:
            raise OSError(f"output-dir: the disk that holds {output_dir} is full; {then}") from error
        raise OSError(f"a disk or a quota is full ({' '.join(str(error).split())}); {then}") from error


def _free_bytes(output_dir: Path) -> int:
    """On the disk of a folder, which somebody may have removed."""
    existing = next(folder for folder in (output_dir.absolute(), *output_dir.absolute().parents) if folder.exists())
    return shutil.disk_usage(existing).free
