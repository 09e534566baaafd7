"""Environments that hold what an extra of the package brings, and nothing else that this one has."""

import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]

# Everything that a layer needs, and what `backends` says of the rest.
LAYER = """
import copy, flashmhf, torch
layer = flashmhf.FlashMHF(64, num_heads=4, num_subnetworks=2, subnetwork_size=32)
x = torch.randn(2, 5, 64, requires_grad=True)
y = layer(x)
y.square().sum().backward()
assert x.grad.isfinite().all() and all(p.grad.isfinite().all() for p in layer.parameters())
other = flashmhf.FlashMHF(64, num_heads=4, num_subnetworks=2, subnetwork_size=32)
other.load_state_dict(layer.state_dict())
assert torch.equal(other(x), y) and torch.equal(copy.deepcopy(layer)(x), y)
q, (k, u, v) = torch.randn(5, 4, 16), torch.randn(3, 4, 2, 32, 16)
assert flashmhf.flash_mhf(q, k, u, v).shape == q.shape
for name, reason in flashmhf.backends().items():
    print(name, reason)
"""


def requirements(extra: str | None) -> list[str]:
    """Of the package with an extra, or without one."""
    return [*PROJECT["dependencies"], *([f"flashmhf[{extra}]"] if extra else [])]


def distributions(needed: list[str]) -> list[metadata.Distribution]:
    """What pip would install for `needed`, as it is installed here, by the extras in the tree."""
    found: dict[str, metadata.Distribution] = {}
    seen: set[tuple[str, str]] = set()
    todo = [(Requirement(text), "") for text in needed]
    while todo:
        requirement, extra = todo.pop()
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": extra})
        if not applies or (str(requirement), extra) in seen:
            continue
        seen.add((str(requirement), extra))
        if requirement.name == "flashmhf":
            todo += [(Requirement(text), "") for own in requirement.extras for text in EXTRAS[own]]
            continue
        distribution = metadata.distribution(requirement.name)
        found[canonicalize_name(requirement.name)] = distribution
        todo += [(Requirement(text), own) for text in distribution.requires or () for own in ("", *requirement.extras)]
    return list(found.values())


def make_site(folder: Path, needed: list[str], package: Path = ROOT / "src" / "flashmhf") -> Path:
    """A folder for PYTHONPATH with links to the files of `distributions`, and to this package."""
    folder.mkdir()
    for distribution in distributions(needed):
        for name in _top_level(distribution):
            if not (folder / name).exists():
                (folder / name).symlink_to(distribution.locate_file(name))
    (folder / "flashmhf").symlink_to(package)
    return folder


def _top_level(distribution: metadata.Distribution) -> Iterator[str]:
    names = {file.parts[0] for file in distribution.files or ()}
    return (name for name in names if name not in ("..", "__pycache__"))


def run(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python, with the standard library and what `site` has."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "TRITON"))}
    return subprocess.run(
        [sys.executable, "-S", *arguments],
        env={**variables, "PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"},
        cwd=site,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
