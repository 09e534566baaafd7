"""The two files that describe a run in its folder: run.json (its configuration) and result.json (what it achieved)."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flashmhf.errors import InputError
from flashmhf.files import read_json, write_json
from flashmhf.serialization import from_plain
from flashmhf.training.config import DIRECTORY, RUN_FILE, SETTINGS, TrainConfig
from flashmhf.training.fingerprints import Fingerprints
from flashmhf.training.instability import Instability

RESULT_FILE = "result.json"  # written when the run has finished, not when it was interrupted
FINGERPRINTS = "fingerprints"  # in run.json
VERSION = 1  # of both formats; files from before they had one are read as version 0
FORMER_NAMES = {"width_scaled_learning_rate": "mup_base_width"}  # of options in version 0
FORMER_DEFAULTS = {"optimizer": "adamw"}  # of options that a run of an earlier version did not have


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a training run achieved.

    Attributes:
        steps: optimizer steps since the first start of the run.
        tokens: read in these steps.
        parameters: of the model.
        train_loss: nats/token, the last one logged; None if none was.
        validation_loss: nats/token of the final model; None of an interrupted run.
        bits_per_byte: the same per byte of text.
        tokens_per_second: median of the log.
        peak_memory_mib: of this process.
        elapsed_s: of this process.
        skipped_steps: without a finite loss and gradient, since the first start.
        tokens_used: from each source.
        data_read: one line on the files that were read and those that were passed over.
        bad_data: one line on corrupt records that were skipped, or empty.
        interrupted_by: number of the signal that ended the run early, or None.
        output_dir: the run's folder.
        spikes: losses far above the mean of the steps before them, since the first start.
        instabilities: signs of divergence, at most one of each kind.
    """

    steps: int
    tokens: int
    parameters: int
    train_loss: float | None
    validation_loss: float | None
    bits_per_byte: float | None
    tokens_per_second: float | None
    peak_memory_mib: float
    elapsed_s: float
    skipped_steps: int
    tokens_used: dict[str, int]
    bad_data: str
    interrupted_by: int | None
    output_dir: str
    data_read: str = ""
    spikes: int = 0
    instabilities: tuple[Instability, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """As result.json and `flashmhf train --json` show it."""
        return {"version": VERSION, **asdict(self)}


def was_begun(output_dir: Path) -> bool:
    """Whether the folder holds a run that can be resumed."""
    return (output_dir / RUN_FILE).exists()


def optimizer_of(given: str | None, output_dir: Path, *, resume: bool) -> str:
    """The optimizer of a run: the given one, else that of the run in the folder if it is resumed, else the default."""
    if given is None and resume and was_begun(output_dir):
        return read_run(output_dir).optimizer
    return TrainConfig.optimizer if given is None else given


def write_run(
    output_dir: Path, config: TrainConfig, prints: Fingerprints, settings: Mapping[str, Any] | None = None
) -> None:
    """Writes run.json, and removes the result of an earlier process, which no longer holds.

    Args:
        output_dir: the run's folder.
        config: what is trained; with `settings`, all that `flashmhf train --config` needs for the same run.
        prints: of its inputs.
        settings: every flag of transformers.TrainingArguments, see `arguments.settings_of`.
    """
    inputs = {DIRECTORY: str(Path.cwd()), SETTINGS: dict(settings or {}), FINGERPRINTS: asdict(prints)}
    write_json(output_dir / RUN_FILE, {"version": VERSION, **config.options(), **inputs})
    (output_dir / RESULT_FILE).unlink(missing_ok=True)


def record_warmup(output_dir: Path, steps: int) -> None:
    """Completes run.json with the steps of warm-up, once they are known; a resumed run keeps them."""
    content = read_json(output_dir / RUN_FILE, version=VERSION)
    content[FINGERPRINTS]["arguments"]["warmup_steps"] = steps
    write_json(output_dir / RUN_FILE, content)


def read_run(output_dir: Path) -> TrainConfig:
    """The configuration in run.json; options that an old file does not have get their defaults.

    Raises:
        InputError: the file is damaged, or newer than this version of flashmhf; names it.
    """
    file = output_dir / RUN_FILE
    content = read_json(file, version=VERSION)
    options = FORMER_DEFAULTS | {FORMER_NAMES.get(name, name): value for name, value in content.items()}
    if not isinstance(options.get("model"), str):
        raise InputError(f"{file}: expected the model of a training run, got {options.get('model')!r}")
    try:
        return from_plain(TrainConfig, asdict(TrainConfig.from_options(options)))
    except ValueError as error:
        raise InputError(f"{file}: {error}") from error


def read_fingerprints(output_dir: Path) -> Fingerprints | None:
    """Those in run.json; None of a run by a version that did not record them.

    Raises:
        InputError: the file is damaged; names it.
    """
    file = output_dir / RUN_FILE
    content = read_json(file, version=VERSION).get(FINGERPRINTS)
    try:
        return None if content is None else from_plain(Fingerprints, content)
    except ValueError as error:
        raise InputError(f"{file}: {error}") from error


def write_result(result: TrainResult) -> None:
    """Writes result.json into the run's folder."""
    write_json(Path(result.output_dir) / RESULT_FILE, result.as_dict())


def read_result(output_dir: Path) -> TrainResult | None:
    """What `train` returned, or None if the run has not finished.

    Raises:
        InputError: the file is damaged, or newer than this version of flashmhf; names it.
    """
    file = output_dir / RESULT_FILE
    if not file.exists():
        return None
    content = read_json(file, version=VERSION)
    try:
        return from_plain(TrainResult, content)
    except ValueError as error:
        raise InputError(f"{file}: {error}; remove the file and resume the run") from error
