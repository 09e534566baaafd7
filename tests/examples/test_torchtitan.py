"""torchtitan's registration: against the package where it is installed, otherwise its layer with a stand-in.

torchtitan 0.3 pins a version of datasets below ours, so that it is in no extra: `pip install --no-deps torchtitan` and
what it imports.
"""

import importlib
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

EXAMPLES = Path(__file__).parents[2] / "examples"
real = pytest.mark.skipif(find_spec("torchtitan") is None, reason="the package torchtitan is not installed")


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield lambda: importlib.import_module("torchtitan_model")
    sys.modules.pop("torchtitan_model", None)


@real
def test_torchtitan_finds_the_configuration(example):
    manager = importlib.import_module("torchtitan.config.manager").ConfigManager()
    words = ["--module", "torchtitan_model", "--config", "flashmhf_debugmodel", "--training.steps", "3"]
    config = manager.parse_args(words)
    assert type(config.model_spec.model) is example().FlashMHFLlama.Config
    assert config.training.steps == 3


@real
def test_torchtitan_builds_a_model_that_trains(example, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["torchtitan_model.py", "--steps", "3"])
    example().main()
    losses = [float(line.split(": ")[1]) for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert losses[-1] < losses[0]


@real
def test_tensor_parallelism_is_refused(example):
    config = example().flashmhf_debugmodel()
    config.parallelism.tensor_parallel_degree = 2
    with pytest.raises(NotImplementedError, match="tensor_parallel_degree"):
        config.model_spec.model.update_from_config(config=config)


class StandInModule(nn.Module):
    @dataclass(kw_only=True, slots=True)
    class Config:
        pass


@dataclass(kw_only=True)
class StandInModelConfig:
    layers: list = field(default_factory=list)


def stand_in_registry(flavor: str, attn_backend: str) -> SimpleNamespace:
    """Two layers with a SwiGLU of 64 x 192."""
    ffn = [SimpleNamespace(w1=SimpleNamespace(in_features=64, out_features=192)) for _ in range(2)]
    model = StandInModelConfig(layers=[SimpleNamespace(feed_forward=layer) for layer in ffn])
    return SimpleNamespace(name="llama3", flavor=flavor, model=model, state_dict_adapter=object)


@pytest.fixture
def torchtitan_stand_in(monkeypatch):
    """Modules with the names that the example imports; those that its layer and registry use do something."""
    names = {
        "torchtitan.components.loss": {"ChunkedLossWrapper": object, "CrossEntropyLoss": object},
        "torchtitan.config": {"ParallelismConfig": object},
        "torchtitan.models.common.attention": {"ScaledDotProductAttention": object},
        "torchtitan.models.common.decoder": {"Decoder": object},
        "torchtitan.models.llama3": {"config_registry": object, "model_registry": stand_in_registry},
        "torchtitan.models.llama3.model": {"Llama3Model": type("Llama3Model", (), {"Config": StandInModelConfig})},
        "torchtitan.protocols.model_spec": {"ModelSpec": object},
        "torchtitan.protocols.module": {"Module": StandInModule},
        "torchtitan.trainer": {"Trainer": type("Trainer", (), {"Config": object})},
    }
    for name in names:
        parents = name.split(".")
        for depth in range(1, len(parents)):
            monkeypatch.setitem(sys.modules, ".".join(parents[:depth]), ModuleType(".".join(parents[:depth])))
    for name, contents in names.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)


def test_the_layer_replaces_a_swiglu_with_a_stand_in_for_torchtitan(torchtitan_stand_in, example):
    spec = example().flashmhf_registry("debugmodel")
    assert spec.name == "flashmhf"
    configuration = spec.model.layers[1].feed_forward
    with torch.device("meta"):
        layer = example().FlashMHFFeedForward(configuration)
    layer.to_empty(device="cpu").reset_parameters()
    parameters = sum(parameter.numel() for parameter in layer.parameters())
    assert abs(parameters / (3 * 64 * 192) - 1) < 0.05
    assert layer(torch.randn(2, 3, 64)).isfinite().all()
