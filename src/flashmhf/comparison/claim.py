"""The folder of a comparison, or of a sweep: new, or with the same settings and inputs as before."""

import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from flashmhf.comparison.settings import Comparison
from flashmhf.data.tokenizer import tokenizer_key
from flashmhf.errors import InputError
from flashmhf.files import read_json, write_json
from flashmhf.serialization import as_plain, from_plain
from flashmhf.training.fingerprints import changes, config_values
from flashmhf.training.resuming import LOCK_FILE
from flashmhf.training.run_files import FORMER_DEFAULTS

logger = logging.getLogger(__name__)

INPUTS = "inputs"  # in the file
VERSION = 1  # of its format; folders from before it had one are refused
GROWING = ("seeds", "variants", "ablations")  # settings that may be extended
GRIDS = ("learning_rates", "warmups")  # settings that may be extended, in any order
NAMES = ("models", "train.data.source", "train.data.tokenizer")  # of what may be found under another path


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a comparison reads, by content rather than by path.

    Attributes:
        data: the hash of the source, see `data.corpus.Corpus`.
        tokenizer: a hash of what determines the ids of a text.
        models: the configurations of the backbones.
    """

    data: str
    tokenizer: str
    models: tuple[dict[str, Any], ...]

    @classmethod
    def of(cls, settings: Comparison, data: str, tokenizer: PreTrainedTokenizerBase) -> "Inputs":
        return cls(
            data=data,
            tokenizer=tokenizer_key(tokenizer),
            models=tuple(config_values(model, tokenizer) for model in settings.models),
        )


def claim(output_dir: Path, settings: Comparison, inputs: Inputs) -> None:
    """Writes the settings' file, if the folder is free or holds the same comparison.

    Raises:
        InputError: it holds something else; names the difference.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise InputError(f"output-dir: expected a folder, got the file {output_dir}")
    content = sorted(path.name for path in output_dir.iterdir() if path.name != LOCK_FILE)
    if content and settings.settings_file not in content:
        raise InputError(f"output-dir: expected a new or empty folder, got {output_dir} with {', '.join(content[:3])}")
    mine = as_plain(asdict(settings))
    if content:
        file = output_dir / settings.settings_file
        earlier = read_json(file)
        if earlier.get("version") != VERSION:
            raise InputError(
                f"output-dir: expected version {VERSION} of {file}, got {earlier.get('version', 'none')}; "
                f"a {settings.noun} by another version of flashmhf cannot be continued"
            )
        try:
            before = from_plain(Inputs, earlier[INPUTS]) if INPUTS in earlier else None
            if isinstance(earlier.get("train"), dict):
                earlier["train"] = FORMER_DEFAULTS | earlier["train"]
            then = as_plain(asdict(from_plain(type(settings), earlier)))
        except ValueError as error:
            raise InputError(f"{file}: {error}") from error
        if found := _changed(then, mine, NAMES if before is not None else ()):
            raise InputError(f"output-dir: {output_dir} holds a {settings.noun} {found}")
        if before is None:
            logger.warning("%s is of an older version: make sure that data and models are those of then", file)
        elif difference := _difference(before, inputs):
            raise InputError(f"output-dir: {output_dir} holds a {settings.noun} {difference}")
    write_json(output_dir / settings.settings_file, {"version": VERSION, **mine, INPUTS: asdict(inputs)})


def _difference(before: Inputs, now: Inputs) -> str | None:
    if before.data != now.data:
        return f"of other text: data {before.data[:8]}; got {now.data[:8]}"
    if before.tokenizer != now.tokenizer:
        return f"with another tokenizer, {before.tokenizer[:8]}; got {now.tokenizer[:8]}"
    for earlier, mine in zip(before.models, now.models, strict=False):  # their number is that of the settings' models
        for name, value, other in changes(earlier, mine):
            return f"of a model with {name} {value!r}; got {other!r}"
    return None


def _changed(earlier: dict[str, Any], mine: dict[str, Any], by_content: tuple) -> str | None:
    before = dict(_flat(earlier))
    for name, value in _flat(mine):
        found = before[name]
        if name in by_content and (name != "models" or len(value) == len(found)):
            continue
        grown = (name in GROWING and _extends(found, value)) or (name in GRIDS and _includes(found, value))
        if found != value and not grown:
            return f"with {name} {found!r}; got {value!r}"
    return None


def _flat(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Names and values, "train.data.context_length" for those of a table; what may grow stays one value."""
    for name, value in settings.items():
        if isinstance(value, dict) and name not in (*GROWING, *GRIDS):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _extends(earlier: Any, now: Any) -> bool:
    """Whether a list begins with the earlier one, or a table has all of the earlier one's rows, or extends them."""
    if isinstance(earlier, list) and isinstance(now, list):
        return now[: len(earlier)] == earlier
    if isinstance(earlier, dict) and isinstance(now, dict):
        return all(name in now and (now[name] == rows or _extends(rows, now[name])) for name, rows in earlier.items())
    return False


def _includes(earlier: Any, now: Any) -> bool:
    """Whether a list has all of the earlier one's values, or a table's rows have, in any order."""
    if isinstance(earlier, list) and isinstance(now, list):
        return set(earlier) <= set(now)
    return all(name in now and _includes(values, now[name]) for name, values in earlier.items())
