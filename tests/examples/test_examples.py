"""Every example runs, with few steps, and prints what it promises."""

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
MAX_LINES = 100


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs an example in a folder of its own; returns what it prints."""

    def run_example(name: str, *words: object) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run_example


@pytest.mark.parametrize("ffn", ["flashmhf", "swiglu"])
def test_gpt_learns(ffn, run):
    output = run("gpt.py", "--ffn", ffn, "--steps", 20, "--width", 64, "--context", 32)
    assert f"{ffn}: " in output
    assert float(output.partition("validation: ")[2].split()[0]) < 4.5  # ln 256 is 5.5


def test_replace_ffn_saves_and_loads(run, tmp_path):
    output = run("replace_ffn.py", "--output-dir", tmp_path / "replaced", "--steps", 2)
    assert "logits differ by 0\n" in output
    assert (tmp_path / "replaced" / "model.safetensors").is_file()


def test_trainer(run, tmp_path):
    output = run("trainer.py", "--output-dir", tmp_path / "run", "--steps", 3)
    assert "validation: " in output
    assert (tmp_path / "run" / "config.json").is_file()


def test_lora(run, tmp_path):
    pytest.importorskip("peft")
    output = run("lora.py", "--output-dir", tmp_path / "adapters", "--steps", 2)
    assert (tmp_path / "adapters" / "adapter_config.json").is_file()
    loaded, merged = (float(word) for word in output.replace(",", "").split() if "e-" in word or "e+" in word)
    assert loaded < 1e-6
    assert merged < 1e-4


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_generation_with_a_static_cache(backend, run):
    output = run("generate_static_cache.py", "--max-new-tokens", 4, "--compile-backend", backend)
    assert "the first 4 of 4 new tokens agree" in output


def test_every_example_is_short_and_listed():
    listed = (EXAMPLES / "README.md").read_text()
    for file in EXAMPLES.iterdir():
        if file.suffix in (".py", ".ipynb"):
            assert f"[{file.name}]({file.name})" in listed
        if file.suffix == ".py":
            assert len(file.read_text().splitlines()) <= MAX_LINES, file.name
