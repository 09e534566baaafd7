"""`--config FILE`: options of a command from a YAML or JSON file; the command line takes precedence."""

from pathlib import Path
from typing import Annotated, Any

import typer

CONFIG_FLAGS = "flashmhf.config_flags"  # in the context's `meta`: the file's values for what the command passes on


def _read(context: typer.Context, file: str | None) -> str | None:
    """Makes values for the command's own options their defaults; the others become flags that it passes on."""
    if file is not None:
        own = {parameter.name for parameter in context.command.params}
        values = _mapping(Path(file))
        context.default_map = {**(context.default_map or {}), **{k: v for k, v in values.items() if k in own}}
        passed_on = {name: value for name, value in values.items() if name not in own}
        context.meta[CONFIG_FLAGS] = [word for name, value in passed_on.items() for word in _flag(name, value)]
    return file


Config = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Options as a YAML or JSON file, such as `max_steps: 300`; the command line takes precedence.",
        is_eager=True,
        callback=_read,
    ),
]


def _mapping(file: Path) -> dict[str, Any]:
    import yaml

    from flashmhf.errors import InputError

    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"config: {file}: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise InputError(f"config: expected options and their values in {file}, got a {type(values).__name__}")
    return {name.replace("-", "_"): value for name, value in values.items()}


def _flag(name: str, value: Any) -> list[str]:
    import json

    if value is None:
        return []
    words = value if isinstance(value, list) else [value]
    texts = [json.dumps(word) if isinstance(word, dict) else str(word) for word in words]
    return [f"--{name.replace('_', '-')}", *texts]
