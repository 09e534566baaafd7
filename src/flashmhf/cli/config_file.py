"""`--config`: options from a YAML or JSON file, or from the record of a run; the command line takes precedence."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from flashmhf.training.config import DIRECTORY, NAMES, RUN_FILE, SETTINGS

CONFIG_FLAGS = "flashmhf.config_flags"  # in the context's `meta`: the file's values for what the command passes on
NO_OPTIONS = ("version", "fingerprints", DIRECTORY, SETTINGS)  # in a run's record


def _read(context: typer.Context, file: str | None) -> str | None:
    """Makes values for the command's own options their defaults; the others become flags that it passes on."""
    if file is not None:
        own = {parameter.name for parameter in context.command.params if parameter.name}
        values = _mapping(Path(file))
        _check_names(values, own, file)
        given = {name: value for name, value in values.items() if name in own and value is not None}
        context.default_map = {**(context.default_map or {}), **given}
        passed_on = {name: value for name, value in values.items() if name not in own}
        context.meta[CONFIG_FLAGS] = [word for name, value in passed_on.items() for word in _flag(name, value)]
    return file


Config = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|DIR",
        help="Options as a YAML or JSON file, such as `max_steps: 300`, or a run's folder, for the same run again; the "
        "command line takes precedence.",
        is_eager=True,
        callback=_read,
    ),
]


def _mapping(path: Path) -> dict[str, Any]:
    import yaml

    from flashmhf.errors import InputError

    file = path / RUN_FILE if path.is_dir() else path
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"config: {file}: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise InputError(f"config: expected options and their values in {file}, got a {type(values).__name__}")
    if isinstance(values.get(SETTINGS), dict):
        values = _of_record(values)
    return {name.replace("-", "_"): value for name, value in values.items()}


def _of_record(record: dict[str, Any]) -> dict[str, Any]:
    """The options in a run's record; relative paths are found from where that run was started, too."""
    values = {name: value for name, value in record.items() if name not in NO_OPTIONS} | record[SETTINGS]
    for name in NAMES:
        there = Path(str(record.get(DIRECTORY, ""))) / str(values.get(name))
        if there.exists() and not Path(str(values[name])).exists():
            values[name] = str(there)
    return values


def _check_names(values: Iterable[str], own: Iterable[str], file: str) -> None:
    from flashmhf.errors import InputError
    from flashmhf.names import did_you_mean
    from flashmhf.training.flags import transformers_defaults

    known = {*own, *transformers_defaults()}
    for name in values:
        if transformers_defaults() and name not in known:
            raise InputError(
                f"config: {file}: expected options of flashmhf train or flags of transformers.TrainingArguments, "
                f"got {name!r}{did_you_mean(name, known)}"
            )


def _flag(name: str, value: Any) -> list[str]:
    import json

    if value is None or value in ("", []):
        return []
    words = value if isinstance(value, list) else [value]
    texts = [json.dumps(word) if isinstance(word, dict) else str(word) for word in words]
    return [f"--{name.replace('_', '-')}", *texts]
