"""What a package index would hold: an sdist, the wheel that is built from it, and that wheel in a new environment."""

import email
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from sites import EXTRAS, LAYER, PROJECT, ROOT, make_site, requirements, run

import flashmhf

VARIABLES = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
FOLDERS = ("src", "tests", "docs", "benchmarks", "examples", "recipes")
FILES = ("CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "DESIGN.md", "LICENSE", "Makefile", "README.md")
FILES += ("constraints.txt", "mkdocs.yml", "pyproject.toml")
TRAIN = "train --model flashmhf-tiny --max-steps 2 --context-length 32 --per-device-train-batch-size 1 --json"
TRAIN += " --validation-tokens 64 --eval-strategy no --report-to none --disable-tqdm true"


def build(kind: str, source: Path, folder: Path) -> Path:
    """The sdist or wheel of a source tree, as pip builds it without a network."""
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(folder)!r}))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=source,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    (folder / "tree").mkdir()
    for name in (*FILES, "MANIFEST.in"):
        shutil.copy(ROOT / name, folder / "tree")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / "tree" / name, ignore=shutil.ignore_patterns("*.egg-info"))
    return build("sdist", folder / "tree", folder)


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return build("wheel", folder / sdist.name.removesuffix(".tar.gz"), folder)


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """A new virtual environment with the wheel; all other packages are this environment's."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder)
    pip = [
        sys.executable,
        "-m",
        "pip",
        f"--python={folder}/bin/python",
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
    ]
    done = subprocess.run([*pip, str(wheel)], env=VARIABLES, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    (packages,) = (folder / "lib").glob("python*/site-packages")  # from here on it sees the others
    (packages / "others.pth").write_text("\n".join(path for path in sys.path if Path(path).name == "site-packages"))
    return folder


def command(environment: Path, *arguments: str) -> str:
    """What the installed `flashmhf` prints."""
    done = subprocess.run(
        [environment / "bin" / "flashmhf", *arguments],
        env=VARIABLES,
        cwd=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def files_in(folder: Path) -> set[Path]:
    """Of a source tree, without what running and installing it leave there."""
    made = re.compile(r"__pycache__|.*\.egg-info")
    return {file for file in folder.rglob("*") if file.is_file() and not any(map(made.fullmatch, file.parts))}


def test_the_sdist_holds_the_source_tree(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {str(file.relative_to(ROOT)) for folder in FOLDERS for file in files_in(ROOT / folder)} <= names
    assert set(FILES) <= names


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == {str(file.relative_to(ROOT / "src")) for file in files_in(ROOT / "src")}


def test_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        found = email.message_from_bytes(archive.read(name))
    assert (found["Name"], found["Version"]) == ("flashmhf", flashmhf.__version__)
    assert (found["Author"], found["License-Expression"]) == ("FlashMHF contributors", "Apache-2.0")
    assert found["Description-Content-Type"] == "text/markdown"
    assert set(found.get_all("Provides-Extra")) == set(EXTRAS)
    required = [text for text in found.get_all("Requires-Dist") if "extra ==" not in text]
    assert required == PROJECT["dependencies"]
    labels = {text.partition(", ")[0] for text in found.get_all("Project-URL")}
    assert labels == {"Homepage", "Documentation", "Repository", "Changelog", "Issues"}


def test_the_citation_is_of_this_version():
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.findall(r"^version: (.*)$", citation, re.M) == [flashmhf.__version__]


def test_the_layer_of_the_wheel_with_torch_alone(environment, tmp_path):
    (package,) = environment.glob("lib/python*/site-packages/flashmhf")
    done = run(make_site(tmp_path / "site", requirements(None), package), "-c", LAYER)
    assert done.returncode == 0, done.stderr


def test_the_command_of_the_wheel(environment, corpus_folder, tmp_path):
    presets = json.loads(command(environment, "info", "--json"))["presets"]
    assert "flashmhf-tiny" in presets
    assert command(environment, "--version") == f"flashmhf {flashmhf.__version__}\n"
    data = ("--data", str(corpus_folder), "--output-dir", str(tmp_path / "run"))
    assert json.loads(command(environment, *TRAIN.split(), *data))["steps"] == 2
