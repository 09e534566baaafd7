"""Imports follow one way, and importing the package is cheap."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import flashmhf

ROOT = Path(flashmhf.__file__).parent
# What each folder or loose module may import of the package, besides itself. From the bottom to the top.
ALLOWED: dict[str, set[str]] = {
    "extras": set(),
    "printable": set(),
    "errors": set(),
    "lifeline": set(),
    "system_errors": set(),
    "names": {"errors"},
    "console": {"printable"},
    "files": {"errors"},
    "ops": {"extras"},
    "layers": {"ops"},
    "untrusted": {"errors", "files"},
    "new_folder": {"errors", "files", "system_errors"},
    "models": {"ops", "layers", "errors", "names", "new_folder", "untrusted"},
    "data": {"errors", "files", "names", "printable", "untrusted"},
    "distributed": {"layers", "models", "errors"},
    "estimates": {"ops", "layers", "models", "errors"},
    "serialization": set(),
    "evaluation": {"ops", "layers", "models", "data", "errors", "serialization"},
    "training": {
        *("ops", "layers", "models", "data", "distributed", "estimates"),
        *("console", "errors", "files", "names", "printable", "serialization", "system_errors"),
    },
    "benchmarking": {"ops", "layers", "models", "estimates", "errors", "files", "serialization"},
    "comparison": {
        *("ops", "models", "data", "estimates", "evaluation", "training"),
        *("errors", "files", "lifeline", "serialization"),
    },
    "sweeping": {"comparison", "estimates", "evaluation", "training", "errors", "files"},
    "reports": {"benchmarking", "comparison", "sweeping", "evaluation", "training", "errors", "files", "printable"},
    "cli": {
        *("ops", "models", "data", "estimates", "evaluation", "training", "benchmarking"),
        *(
            "reports",
            "comparison",
            "sweeping",
            "console",
            "errors",
            "extras",
            "files",
            "lifeline",
            "names",
            "new_folder",
            "printable",
            "system_errors",
        ),
    },
    "integrations": {"ops", "layers", "models", "errors", "new_folder"},
    "auto_classes": set(),
    "__init__": {"ops", "layers", "models", "auto_classes", "extras"},
    "__main__": {"cli", "extras"},
}


def modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def imported(file: Path) -> set[str]:
    """Dotted names of all imports in a file, inside functions, too."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def area(file: Path) -> str:
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


@pytest.mark.parametrize("file", modules(), ids=lambda f: str(f.relative_to(ROOT)))
def test_one_way_flow(file):
    """Imports inside functions count, too, so that they cannot hide a circle."""
    homes = {area(module) for module in modules()}
    own = {name.split(".")[1] for name in imported(file) if name.startswith("flashmhf.")} & homes
    assert own <= ALLOWED[area(file)] | {area(file)}


def test_the_table_names_every_folder_and_allows_only_what_is_used():
    assert {area(file) for file in modules()} == set(ALLOWED)
    for name, allowed in ALLOWED.items():
        used = set().union(
            *({n.split(".")[1] for n in imported(f) if n.count(".")} for f in modules() if area(f) == name)
        )
        assert allowed <= used, f"{name} may import what it does not: {allowed - used}"


def test_no_circle():
    tuple(graphlib.TopologicalSorter(ALLOWED).static_order())


def test_ops_and_layers_require_only_torch():
    heavy = {"transformers", "datasets", "tokenizers", "accelerate", "typer", "rich", "matplotlib", "numpy"}
    for file in modules():
        if area(file) in ("ops", "layers"):
            own = {"numpy"} if "onednn" in file.parts else set()  # numba, its optional dependency, brings it along
            assert not {name.split(".")[0] for name in imported(file)} & (heavy - own), file


def test_no_backend_imports_another():
    backends = ("reference", "blockwise", "onednn", "triton", "hopper")
    for file in (ROOT / "ops").rglob("*.py"):
        own = file.relative_to(ROOT / "ops").parts[0].removesuffix(".py")
        if own in backends:
            builds_on = (
                ("triton",) if own == "hopper" else ()
            )  # Hopper's backend is the portable one with other kernels
            others = {f"flashmhf.ops.{name}" for name in backends if name != own and name not in builds_on}
            assert not {name for name in imported(file) if any(name.startswith(other) for other in others)}, file


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_import_is_lazy():
    code = "import sys, flashmhf; print([m for m in ('torch', 'triton', 'transformers') if m in sys.modules])"
    assert run_python(code).strip() == "[]"
    code = "import sys; from flashmhf import flash_mhf, FlashMHF; print({'transformers', 'triton'} & set(sys.modules))"
    assert run_python(code).strip() == "set()"


def test_public_names():
    assert set(dir(flashmhf)) >= {"FlashMHF", "Problem", "backends", "flash_mhf", "models", "replace_ffn"}
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        flashmhf.nothing  # noqa: B018


def test_only_cli_reads_environment_variables():
    """And `lifeline`, which passes a descriptor to child processes; and variables of Triton's and oneDNN's own."""
    for file in modules():
        if area(file) not in ("cli", "lifeline"):
            text = file.read_text().replace('os.environ.get("TRITON_INTERPRET")', "")
            if file.name == "library.py" and file.parent.name == "onednn":
                text = text.replace('os.environ.get(name, "ALL")', "")
            assert "os.environ" not in text, file
            assert "getenv" not in text, file
