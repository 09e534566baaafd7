"""Regional compilation: the same losses, few graphs for many sizes, no graph break, no new names."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import GPT2Config, GPT2LMHeadModel

from flashmhf.data.config import DataConfig
from flashmhf.errors import InputError
from flashmhf.models.weights import WEIGHTS, tensor_names
from flashmhf.training.arguments import parse_arguments
from flashmhf.training.compilation import compile_layers
from flashmhf.training.config import TrainConfig
from flashmhf.training.run import train
from flashmhf.training.run_files import TrainResult
from tiny import tiny_model
from torchrun import torchrun

FLAGS = ["--max-steps", "4", "--learning-rate", "1e-2", "--logging-steps", "1", "--report-to", "none"]
FLAGS += ["--disable-tqdm", "true", "--per-device-train-batch-size", "4", "--save-steps", "2"]


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


@pytest.fixture
def without_code(monkeypatch):
    """Captures and counts graphs as usual but does not compile them, which takes half a minute each."""
    compile_it = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile_it(function, backend="aot_eager"))


def loss_of(model, batch: int, length: int = 16) -> torch.Tensor:
    tokens = torch.arange(batch * length).view(batch, length) * 7 % 320
    return model(tokens, labels=tokens).loss


@pytest.mark.parametrize("options", [{}, {"recompute_q": True}, {"ffn_type": "swiglu"}], ids=str)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_few_graphs_without_a_break_for_all_layers_and_batches(without_code, options, checkpointing):
    model = tiny_model(num_hidden_layers=3, num_subnetworks=3, use_cache=False, **options)
    names = list(model.state_dict())
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    expected = {batch: loss_of(model, batch) for batch in (4, 3, 5, 6)}
    expected_grads = torch.autograd.grad(expected[3], model.parameters())
    compile_layers(model)
    assert list(model.state_dict()) == names
    for batch, loss in expected.items():
        torch.testing.assert_close(loss_of(model, batch), loss)
    torch.testing.assert_close(torch.autograd.grad(loss_of(model, 3), model.parameters()), expected_grads)
    assert counters["stats"]["unique_graphs"] == 2  # one size, then any
    model.eval()
    with torch.no_grad():
        for batch in (8, 3, 5):
            loss_of(model, batch)
    assert counters["stats"]["unique_graphs"] <= 4
    assert not counters["graph_break"]


def start(run: TrainConfig, folder: Path, *flags: str, resume: bool = False, **changes) -> TrainResult:
    return train(replace(run, **changes), parse_arguments([*FLAGS, *flags], str(folder)), resume=resume)


def losses(folder: Path) -> list[float]:
    rows = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [row.get("loss", row.get("eval_loss")) for row in rows if "loss" in row or "eval_loss" in row]


@pytest.fixture
def run(corpus_folder, model_file) -> TrainConfig:
    return TrainConfig(
        model=str(model_file), data=DataConfig(source=str(corpus_folder), context_length=32, validation_tokens=320)
    )


def compare_with_eager(run: TrainConfig, folder: Path) -> None:
    flags = ("--eval-steps", "2", "--per-device-eval-batch-size", "4")  # ten blocks: a last batch of two
    start(run, folder / "eager", *flags)
    start(run, folder / "compiled", *flags, regional_compilation=True)
    assert counters["stats"]["unique_graphs"] > 0
    assert losses(folder / "compiled") == pytest.approx(losses(folder / "eager"), rel=1e-5)
    names, compiled_names = (set(tensor_names(folder / one / WEIGHTS)) for one in ("eager", "compiled"))
    assert names == compiled_names
    shutil.rmtree(folder / "compiled/checkpoint-4")
    start(run, folder / "compiled", *flags, resume=True)  # without compilation
    assert losses(folder / "compiled") == pytest.approx(losses(folder / "eager"), rel=1e-5)


def test_regional_compilation_trains_as_without(run, tmp_path, without_code):
    compare_with_eager(run, tmp_path)


@pytest.mark.slow
def test_code_by_inductor_trains_as_without(run, tmp_path):
    compare_with_eager(run, tmp_path)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_with_regional_compilation(run, tmp_path):
    flags = ("--max-steps", "4", "--report-to", "none")
    for folder, more in (("eager", ()), ("compiled", ("--regional-compilation",))):
        ended = torchrun(run, tmp_path / folder, 2, *flags, *more)
        assert ended.returncode == 0, ended.stderr
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=1e-5)


def test_the_trainers_own_compilation_is_refused(run, tmp_path):
    with pytest.raises(
        InputError, match="regional-compilation: expected no --torch-compile together with it, got both"
    ):
        start(run, tmp_path / "run", "--torch-compile", "true", regional_compilation=True)
    assert not (tmp_path / "run").exists()


def test_a_model_without_layers_is_refused():
    with pytest.raises(InputError, match="regional-compilation: expected a model with a list of layers"):
        compile_layers(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9)))
