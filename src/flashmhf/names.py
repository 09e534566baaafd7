"""What users call models, data and tokenizers: presets, paths, ids on the Hub; and what they may have meant.

Imports nothing heavy, so that a misspelt name is refused before torch and transformers are imported.
"""

import difflib
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path

from flashmhf.errors import InputError

PRESETS = files("flashmhf") / "models" / "presets"
CONFIG = "config.json"  # in a model's folder
FILE_SUFFIXES = (
    *(".txt", ".json", ".jsonl", ".parquet", ".gz", ".bz2", ".xz", ".zst"),
    *(".csv", ".md", ".yaml", ".yml", ".safetensors", ".model", ".bin", ".pt"),
)


def preset_names() -> list[str]:
    """The names that `FlashMHFConfig.from_preset` accepts."""
    return sorted(Path(preset.name).stem for preset in PRESETS.iterdir() if preset.name.endswith(".json"))


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """The end of a message, "; did you mean X?", or nothing if no known name is similar."""
    close = difflib.get_close_matches(given, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def looks_like_path(name: str) -> bool:
    """Whether a name can only be a path: no id on the Hub begins with `.`, `~` or `/`, has two `/` or ends as files do.

    The subset of a dataset, `owner/name:subset`, is not part of its id.
    """
    return (
        name.startswith((".", "~", "/"))
        or name.endswith("/")
        or "\\" in name
        or name.partition(":")[0].count("/") > 1
        or name.lower().endswith(FILE_SUFFIXES)
    )


def check_exists(option: str, name: str) -> None:
    """Raises InputError for a path to nothing; anything that may be an id on the Hub passes."""
    if looks_like_path(name) and not Path(name).exists():
        raise InputError(f"{option}: no such file or folder: {name}{_similar_path(Path(name))}")


def check_model(name: str) -> None:
    """Raises InputError unless `name` is a preset, or a file or folder that exists."""
    if name in preset_names() or Path(name).exists():
        return
    if looks_like_path(name):
        check_exists("model", name)
    meant = did_you_mean(name, preset_names()) or _similar_path(Path(name))
    presets = "" if meant else f" ({', '.join(preset_names())})"
    raise InputError(f"model: expected a preset{presets}, a JSON file or a folder, got {name!r}{meant}")


def check_model_folder(folder: str) -> Path:
    """The path of a trained model; raises InputError if there is none."""
    path = Path(folder)
    if not (path / CONFIG).is_file():
        meant = "" if path.exists() else _similar_path(path)
        raise InputError(f"model: expected a folder with {CONFIG}, got {folder!r}{meant}")
    return path


def _similar_path(path: Path) -> str:
    """A suggestion of what lies in the folder that a missing path names."""
    try:
        names = [entry.name for entry in path.parent.iterdir() if not entry.name.startswith(".")]
    except OSError:
        return ""
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / close[0]}?" if close else ""
