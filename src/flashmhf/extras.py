"""Optional dependencies: which extra of the package brings which library, and one line for a library that is missing.

The package itself requires torch alone. A module that needs more imports it as usual; where that fails, the error says
what to install: "flashmhf.models needs transformers: pip install 'flashmhf[models]'".
"""

import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import FrameType, ModuleType
from typing import Any

# As in pyproject.toml: each extra's own libraries, and the extra that it includes.
LIBRARIES = {
    "models": ("transformers", "tokenizers", "safetensors", "huggingface-hub", "numpy", "regex", "typer", "rich"),
    "train": ("datasets", "accelerate", "pyarrow", "fsspec", "psutil", "pyyaml", "tensorboard"),
    "report": ("matplotlib", "pillow", "jinja2", "markupsafe"),
    "tasks": ("lm-eval",),
    "cpu": ("numba",),
    "lora": ("peft",),
    "triton": ("triton",),
}
INCLUDED = {"train": "models", "report": "train", "tasks": "train", "lora": "models"}

# What a folder of this package or a command needs in all, whichever library it misses first.
NEEDED = {
    **dict.fromkeys(("flashmhf.data", "flashmhf.distributed", "flashmhf.evaluation", "flashmhf.training"), "train"),
    **dict.fromkeys(("flashmhf.comparison", "flashmhf.reports", "flashmhf.sweeping"), "report"),
    **dict.fromkeys(("flashmhf eval", "flashmhf tokenizer", "flashmhf train"), "train"),
    **dict.fromkeys(("flashmhf compare", "flashmhf inspect", "flashmhf report", "flashmhf sweep"), "report"),
}
COMMANDS = {"flashmhf.cli.evaluate": "flashmhf eval"}  # where the module's name is another

IMPORTED_AS = {"huggingface-hub": "huggingface_hub", "lm-eval": "lm_eval", "pillow": "PIL", "pyyaml": "yaml"}
EXTRA_OF = {library: extra for extra, libraries in LIBRARIES.items() for library in libraries}
LIBRARY_OF = {IMPORTED_AS.get(library, library): library for library in EXTRA_OF}


class MissingLibraryError(ModuleNotFoundError):
    """A library of an extra is not installed. The message is one line that names both."""

    def __init__(self, needed_by: str, library: str) -> None:
        hint = _hint(library, _extra(needed_by, library))
        super().__init__(f"{needed_by} {hint}", name=IMPORTED_AS.get(library, library))


def missing(library: str) -> str | None:
    """None if `library` is installed, otherwise "needs LIBRARY: pip install ..."."""
    return None if _is_installed(IMPORTED_AS.get(library, library)) else _hint(library, EXTRA_OF[library])


def check(needed_by: str, library: str) -> None:
    """Raises MissingLibraryError unless `library` is installed, before work that would be lost."""
    if missing(library):
        raise MissingLibraryError(needed_by, library)


def explain_failed_imports() -> None:
    """From here on, an import in this package of a library that is missing raises MissingLibraryError."""
    sys.meta_path.append(_LastFinder())


class _LastFinder:
    """Asked only for what no other finder has found. Imports in other packages fail as usual."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name in LIBRARY_OF and (needed_by := _importer(sys._getframe(1))):
            raise MissingLibraryError(needed_by, LIBRARY_OF[name])
        return None


def _is_installed(module: str) -> bool:
    if sys.modules.get(module) is not None:
        return True
    spec = find_spec(module)
    return spec is not None and spec.origin is not None  # a folder of that name without __init__.py has no origin


def _hint(library: str, extra: str) -> str:
    return f"needs {library}: pip install 'flashmhf[{extra}]'"


def _extra(needed_by: str, library: str) -> str:
    """The extra with everything for `needed_by`, or that of the library if it is not among these."""
    own = EXTRA_OF[library]
    included = needed = NEEDED.get(needed_by, own)
    while included != own and included in INCLUDED:
        included = INCLUDED[included]
    return needed if included == own else own


def _importer(frame: FrameType | None) -> str | None:
    """For an import in this package: the folder or command that was first imported or called. Otherwise None."""
    modules = list(_modules_on_stack(frame))
    if not modules or not modules[0].startswith("flashmhf.") or modules[0] == __name__:
        return None
    entries = ("flashmhf.__main__", "flashmhf.cli")
    first = [name for name in modules if name.startswith("flashmhf.") and name not in entries][-1:]
    if not first or first[0].startswith("flashmhf.cli."):
        command = "".join(COMMANDS.get(name, name.replace(".cli.", " ")) for name in first)
        return command if command in NEEDED else "flashmhf"
    return ".".join(first[0].split(".")[:2])


def _modules_on_stack(frame: FrameType | None) -> Iterator[str]:
    """Names of the modules whose code is running, the innermost first, without the import system's."""
    while frame is not None:
        name = str(frame.f_globals.get("__name__"))
        if not name.startswith(("importlib", "_frozen_importlib")):
            yield name
        frame = frame.f_back
