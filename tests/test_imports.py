"""Imports follow one way, and importing the package is cheap."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import flashmhf

ROOT = Path(flashmhf.__file__).parent
# What a layer may import of the package; each may also import its own folder.
ALLOWED = {
    "ops": {"ops"},
    "layers": {"ops", "layers"},
    "models": {"ops", "layers", "errors", "models"},
    "data": {"errors", "tokenization", "data"},
    "evaluation": {"data", "errors", "evaluation"},
    "training": {
        *("ops", "layers", "models", "data", "evaluation", "training"),
        *("accounting", "errors", "parallel", "sharded", "tokenization", "writing"),
    },
}
UPPER = {"cli"}  # nothing but the entry points imports it


def modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def imported(file: Path) -> set[str]:
    """Dotted names of all imports in a file, wherever they stand."""
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
    own = {name.split(".")[1] for name in imported(file) if name.startswith("flashmhf.")}
    if area(file) in ALLOWED:
        assert own <= ALLOWED[area(file)]
    if area(file) not in ("cli", "__main__"):
        assert not own & UPPER


def test_ops_and_layers_need_torch_alone():
    heavy = {"transformers", "datasets", "tokenizers", "accelerate", "typer", "rich", "matplotlib", "numpy"}
    for file in modules():
        if area(file) in ("ops", "layers"):
            assert not {name.split(".")[0] for name in imported(file)} & heavy, file


def test_no_backend_imports_another():
    backends = ("reference", "blockwise", "triton", "hopper")
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


def test_environment_variables_are_read_in_cli_alone():
    for file in modules():
        if area(file) != "cli":
            assert "os.environ" not in file.read_text(), file
            assert "getenv" not in file.read_text(), file
