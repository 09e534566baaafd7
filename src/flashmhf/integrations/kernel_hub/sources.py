"""The files of a kernel: those of the operators, with relative imports, and the two in `kernel/`."""

import re
from pathlib import Path

import flashmhf

PACKAGE = Path(flashmhf.__file__).parent
KERNEL = Path(__file__).with_name("kernel")
EXTENSIONS = (".py", ".json")
# Kernels may import only torch and what comes with it: onednn needs numba, and library.py says whether it could run.
# flops.py and roofline.py are for this package's models and benchmarks; namespace.py is written anew.
LEFT_OUT = re.compile(r"ops/onednn/(?!__init__|library)|ops/(flops|roofline|namespace)\.py")
NAMESPACE = '''"""Where the operators are registered: the namespace of this build alone."""

from .._ops import add_op_namespace_prefix

NAMESPACE = add_op_namespace_prefix("")[: -len("::")]
'''
_IMPORT = re.compile(r"^(\s*from )flashmhf\.(integrations\.kernel_hub\.kernel\b\.?)?([\w.]*) import", re.MULTILINE)


def sources() -> dict[str, str]:
    """The text of every file by its path in the kernel's folder; without `_ops.py`, which kernel-builder writes."""
    texts = {"ops/namespace.py": NAMESPACE}
    ours = [PACKAGE / "extras.py", *sorted((PACKAGE / "ops").rglob("*"))]
    for root, files in ((PACKAGE, ours), (KERNEL, sorted(KERNEL.rglob("*")))):
        for file in files:
            path = file.relative_to(root).as_posix()
            if file.suffix in EXTENSIONS and not LEFT_OUT.match(path):
                texts[path] = file.read_text(encoding="utf-8")
    return {path: with_relative_imports(path, text) if path.endswith(".py") else text for path, text in texts.items()}


def with_relative_imports(path: str, text: str) -> str:
    """A module's text, whose `from flashmhf... import` is relative to the module's place in the kernel."""
    to_root = "." * (path.count("/") + 1)
    return _IMPORT.sub(lambda match: f"{match[1]}{to_root}{match[3]} import", text)
