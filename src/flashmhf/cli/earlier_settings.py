"""Options that were not given again: those of the comparison or sweep that the folder holds."""

import shlex
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import typer

from flashmhf.cli.comparison_options import AUTO
from flashmhf.files import read_json

GIVEN = ("COMMANDLINE", "ENVIRONMENT")


def complete(context: typer.Context, settings_file: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A command's options and its flags of TrainingArguments, completed from the folder's settings if it has any.

    So a comparison goes on with `--output-dir` alone. What is given counts, and is refused later if it differs.
    """
    options, flags = dict(context.params), tuple(context.args)
    file = Path(options["output_dir"]) / settings_file
    if not file.is_file():
        return options, flags
    settings = read_json(file)
    for name, value in _options(settings, options).items():
        source = context.get_parameter_source(name)
        if name in options and (source is None or source.name not in GIVEN):
            options[name] = value
    return options, _merged(settings.get("training_flags", ()), flags)


def how_to_continue(context: typer.Context, settings_file: str) -> str:
    """What to type after an interruption."""
    folder = str(context.params["output_dir"])
    if not (Path(folder) / settings_file).is_file():
        return "nothing has been trained yet"
    words = [context.command_path, "--output-dir", shlex.quote(folder)]
    if context.params["jobs"] != AUTO:
        words += ["--jobs", context.params["jobs"]]
    return f"continue with: {' '.join(words)}"


def _options(settings: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The command's options, as they are typed, from a settings file."""
    lists = {name: ",".join(map(str, settings[name])) for name in ("variants", "seeds", "warmups") if name in settings}
    train = dict(settings.get("train", {}))
    data = dict(train.pop("data", {}))
    rates = _rates(settings.get("learning_rates", {}))
    plain = {name: settings[name] for name in ("document_bytes", "match", "depth", "rungs") if name in settings}
    if options.get("budget") is None and "max_steps" in settings:
        plain["max_steps"] = settings["max_steps"]
    return {
        **train,
        **{"data" if name == "source" else name: value for name, value in data.items()},
        **lists,
        **plain,
        **{name.replace("-", "_"): ",".join(values) for name, values in settings.get("ablations", {}).items()},
        "model": ",".join(settings.get("models", ())),
        "learning_rate": rates,
        "learning_rates": rates,
    }


def _rates(rates: Mapping[str, Iterable[float]]) -> str:
    """The same for every variant, or "swiglu=1e-3/2e-3,flashmhf=1e-3"."""
    texts = {name: [repr(rate) for rate in each] for name, each in rates.items()}
    first = next(iter(texts.values()), [])
    if all(each == first for each in texts.values()):
        return ",".join(first)
    return ",".join(f"{name}={'/'.join(each)}" for name, each in texts.items())


def _merged(earlier: Iterable[str], given: Iterable[str]) -> tuple[str, ...]:
    """The earlier flags with the values given now, then the flags that are new."""
    now = dict(_groups(given))
    merged: list[str] = []
    for name, words in _groups(earlier):
        new = now.pop(name, words)
        merged += words if _value(new) == _value(words) else new
    return (*merged, *(word for words in now.values() for word in words))


def _groups(flags: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """Each flag's name and its words."""
    group: list[str] = []
    for word in flags:
        if word.startswith("--") and group:
            yield _name(group), group
            group = []
        group.append(word)
    if group:
        yield _name(group), group


def _name(words: list[str]) -> str:
    return words[0].partition("=")[0].removeprefix("--").replace("_", "-")


def _value(words: list[str]) -> list[str]:
    _, equals, value = words[0].partition("=")
    return [*([value] if equals else []), *words[1:]]
