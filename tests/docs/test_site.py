"""The site builds without a warning: every link, anchor and name in it exists. It needs no network."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mkdocs")
pytest.importorskip("mkdocstrings")

ROOT = Path(__file__).parents[2]
PUBLIC = {
    "api/operator.html": ("flashmhf.flash_mhf", "flashmhf.backends", "flashmhf.Problem.of"),
    "api/layers.html": ("flashmhf.FlashMHF.like_swiglu", "flashmhf.layers.SwiGLU"),
    "api/models.html": (
        "flashmhf.models.FlashMHFConfig",
        "flashmhf.models.FlashMHFForCausalLM",
        "flashmhf.replace_ffn",
    ),
}


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=240)
    return folder


@pytest.mark.parametrize("page", PUBLIC)
def test_the_reference_describes_the_public_names(site, page):
    text = (site / page).read_text()
    for name in PUBLIC[page]:
        assert f'id="{name}"' in text


def test_commands_come_from_the_command_line(site):
    from flashmhf.cli import app

    text = (site / "commands.html").read_text()
    for command in app.registered_commands:
        assert command.hidden or f"flashmhf {command.name}</h2>" in re.sub("<a .*?</a>", "", text)
    assert "--per-device-train-batch-size" not in text or "TrainingArguments" in text


def test_links_work_on_the_site_as_on_github(site):
    """They are written for where the file is; files that are no page are shown in the repository."""
    for name in ("CHANGELOG.html", "DESIGN.html"):
        assert 'href="docs/' not in (site / name).read_text()
    assert "/blob/main/tests/gluon/README.md" in (site / "kernels.html").read_text()


def test_links_of_the_readme_lead_to_files():
    """They are absolute, since the README is shown on package indexes, too."""
    readme = (ROOT / "README.md").read_text()
    targets = re.findall(r"https://(?:github\.com|raw\.githubusercontent\.com)/flashmhf/flashmhf/([^)#\s]+)", readme)
    targets = [target.removeprefix("blob/").removeprefix("tree/").removeprefix("main/") for target in targets]
    targets += re.findall(r"\]\((?!http)([^)#]+)", readme)
    assert targets
    assert not [target for target in targets if not (ROOT / target).exists()]


def test_pages_load_nothing_from_elsewhere(site):
    for page in site.rglob("*.html"):
        loaded = re.findall(r'<(?:script|img|iframe)[^>]*\ssrc="(https?:[^"]*)', page.read_text())
        loaded += re.findall(r'<link[^>]*rel="(?:stylesheet|preconnect)"[^>]*href="(https?:[^"]*)', page.read_text())
        assert not loaded, page
