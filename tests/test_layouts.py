"""Heads split over processes, from the command: what one process computes, from and into checkpoints of any layout."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flashmhf.errors import InputError
from flashmhf.layouts import SHARDS, check_layout, split_heads
from flashmhf.manifest import check
from flashmhf.models.loading import load_model
from flashmhf.training import Run, parse_arguments, train
from parallel_cases import build
from torchrun import torchrun

STEPS = ("--max-steps", "8", "--save-steps", "4", "--max-grad-norm", "0.5")  # the norms are above: every step is clipped
ONE = [*STEPS, "--learning-rate", "1e-2", "--logging-steps", "1", "--per-device-train-batch-size", "4"]
ONE += ["--report-to", "none", "--eval-strategy", "no", "--disable-tqdm", "true"]
LAYOUTS = {"tp": (2, "4"), "tp x fsdp": (4, "2")}  # processes, sequences of each group of two; four sequences a step
distributed = [pytest.mark.slow, pytest.mark.distributed]


@pytest.fixture(scope="module")
def run(corpus_folder, tmp_path_factory) -> Run:
    """Two layers with a norm per head and untied embeddings; 63 validation blocks, not a multiple of any batch."""
    file = tmp_path_factory.mktemp("configs") / "heads.json"
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    file.write_text(json.dumps({**sizes, "num_subnetworks": 3, "q_norm": True, "init": "scaled"}))
    return Run(str(file), str(corpus_folder), "bytes", 32, validation_tokens=63 * 32)


@pytest.fixture(scope="module")
def one(run, tmp_path_factory) -> tuple[Path, dict]:
    """The folder and the result of one process."""
    folder = tmp_path_factory.mktemp("one") / "run"
    return folder, train(run, parse_arguments(ONE, str(folder)))


def split(run: Run, folder: Path, layout: str, *flags: str):
    processes, sequences = LAYOUTS[layout]
    batch = ("--per-device-train-batch-size", sequences, "--per-device-eval-batch-size", str(16 // processes))
    return torchrun(run, folder, processes, *STEPS, *batch, "--tensor-parallel", "2", *flags)


def rows(folder: Path, name: str) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [row[name] for row in history if "loss" in row]


@pytest.fixture(scope="module", params=LAYOUTS)
def trained(request, run, tmp_path_factory) -> tuple[str, Path, dict]:
    """A layout, the folder of its run, and its result."""
    folder = tmp_path_factory.mktemp("split") / "run"
    ended = split(run, folder, request.param)
    assert ended.returncode == 0, ended.stderr
    return request.param, folder, json.loads(ended.stdout)


@pytest.mark.slow
@pytest.mark.distributed
def test_split_heads_train_as_one_process(one, trained):
    (folder, expected), (_, split_folder, result) = one, trained
    assert rows(split_folder, "loss") == pytest.approx(rows(folder, "loss"), rel=1e-5)
    assert rows(split_folder, "grad_norm") == pytest.approx(rows(folder, "grad_norm"), rel=1e-4)
    assert min(rows(folder, "grad_norm")) > 0.5
    assert result["validation_loss"] == pytest.approx(expected["validation_loss"], rel=1e-5)
    for name in ("steps", "tokens", "parameters", "tokens_used"):
        assert result[name] == expected[name], name


@pytest.mark.slow
@pytest.mark.distributed
def test_the_model_and_the_checkpoints_are_plain_models(one, trained):
    expected = load_file(one[0] / "model.safetensors")
    for folder in (trained[1], trained[1] / "checkpoint-8"):
        weights = load_file(folder / "model.safetensors")
        assert {name: value.shape for name, value in weights.items()} == {
            name: value.shape for name, value in expected.items()
        }
        for name, value in weights.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4, msg=name)
        assert load_model(str(folder)).config.num_attention_heads == 2
    assert check(trained[1] / "checkpoint-8") is None
    assert (trained[1] / "checkpoint-8" / SHARDS).is_dir()
    assert not (trained[1] / "checkpoint-8" / "optimizer.pt").exists()


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("second", [*LAYOUTS, "ddp", "one"])
def test_going_on_in_any_layout(run, one, trained, tmp_path, second):
    folder = Path(shutil.copytree(trained[1], tmp_path / "run"))
    shutil.rmtree(folder / "checkpoint-8")
    go_on(run, folder, second)
    assert rows(folder, "loss") == pytest.approx(rows(one[0], "loss"), rel=1e-5)
    assert rows(folder, "learning_rate") == pytest.approx(rows(one[0], "learning_rate"))


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("second", LAYOUTS)
def test_going_on_with_split_heads_from_one_process(run, one, tmp_path, second):
    folder = Path(shutil.copytree(one[0], tmp_path / "run"))
    shutil.rmtree(folder / "checkpoint-8")
    go_on(run, folder, second)
    assert rows(folder, "loss") == pytest.approx(rows(one[0], "loss"), rel=1e-5)


def go_on(run: Run, folder: Path, layout: str) -> None:
    if layout == "one":
        train(run, parse_arguments(ONE, str(folder)), resume=True)
        return
    ended = torchrun(run, folder, 2, *STEPS, "--resume") if layout == "ddp" else split(run, folder, layout, "--resume")
    assert ended.returncode == 0, ended.stderr
    assert "going on from checkpoint-4" in ended.stderr
