"""The model for vLLM, on stand-ins for vLLM's layers: weights arrive by name, and the heads' parts add up."""

import importlib
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import vllm_stand_ins

from tiny import tiny_model

MODELS = {
    "grouped heads, norms": {"num_ffn_heads": 4, "num_ffn_kv_heads": 2, "q_norm": True, "qk_norm": True},
    "no norm": {"ffn_norm": False, "mlp_bias": True, "attention_bias": True, "tie_word_embeddings": True},
    "mhffn": {"ffn_type": "mhffn"},
    "swiglu": {"ffn_type": "swiglu"},
}
E3 = {"num_subnetworks": 3, "gate_type": "softmax"}


def make(options: dict):
    model = tiny_model(num_hidden_layers=2, **(E3 | options if "ffn_type" not in options else options)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def build(model):
    module = importlib.import_module("flashmhf.integrations.vllm.model")
    return module.FlashMHFForCausalLM(vllm_config=vllm_stand_ins.vllm_config(model.config))


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS.keys())
def test_every_weight_is_loaded_by_its_name(options, monkeypatch):
    vllm_stand_ins.install(monkeypatch)
    model = make(options)
    built = build(model)
    stored = model.state_dict()
    assert built.load_weights(stored.items()) == {name for name, _ in built.named_parameters()} == set(stored)
    x = torch.randn(7, 32)
    for layer, expected in zip(built.model.layers, model.model.layers, strict=True):
        torch.testing.assert_close(layer.mlp(x), expected.mlp(x))


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS.keys())
def test_the_ranks_parts_add_up(options, monkeypatch):
    model, x = make(options), torch.randn(7, 32)
    parts = []
    for rank in (0, 1):
        vllm_stand_ins.install(monkeypatch, rank, 2)
        built = build(model)
        built.load_weights(model.state_dict().items())
        parts.append(torch.stack([layer.mlp(x) for layer in built.model.layers]))
    torch.testing.assert_close(sum(parts), torch.stack([layer.mlp(x) for layer in model.model.layers]))


def test_former_checkpoints_are_loaded(monkeypatch):
    vllm_stand_ins.install(monkeypatch, 1, 2)
    model = make(MODELS["grouped heads, norms"])
    layer = model.model.layers[0].mlp
    former = {
        name: tensor.view(layer.rows_shape) if name.endswith((".mlp.k", ".mlp.u", ".mlp.v")) else tensor
        for name, tensor in model.state_dict().items()
    }
    built = build(model)
    built.load_weights(former.items())
    assert torch.equal(built.model.layers[0].mlp.k, layer.k[3:])


def test_the_projections_are_quantised_as_vllm_says(monkeypatch):
    vllm_stand_ins.install(monkeypatch)
    layer = build(make({})).model.layers[1].mlp
    assert layer.in_proj.quant_config == layer.out_proj.quant_config == "quantised"
    assert layer.in_proj.prefix == "model.layers.1.mlp.in_proj"


def test_without_the_norm_the_residual_is_added(monkeypatch):
    vllm_stand_ins.install(monkeypatch)
    norm = build(make(MODELS["no norm"])).model.layers[0].post_attention_layernorm
    x, residual = torch.randn(2, 7, 32).unbind()
    hidden, total = norm(x, residual)
    assert torch.equal(hidden, x + residual)
    assert torch.equal(total, x + residual)


def test_what_cannot_be_split_is_refused(monkeypatch):
    vllm_stand_ins.install(monkeypatch, 0, 4)
    with pytest.raises(ValueError, match="tensor_parallel_size: expected a divisor of 2 heads, got 4"):
        build(make({}))
    with pytest.raises(ValueError, match="ffn_type: expected flashmhf, mhffn, dense_moe or swiglu for vLLM, got pkv"):
        build(make({"ffn_type": "pkv"}))
    vllm_stand_ins.install(monkeypatch, 0, 2)
    with pytest.raises(ValueError, match="tensor_parallel_size: expected 1 for a layer without projections, got 2"):
        build(make({"ffn_projections": False}))
    with pytest.raises(ValueError, match="attention_bias: expected False with qk_norm for vLLM, got True"):
        build(make({"qk_norm": True, "attention_bias": True}))


def test_it_is_registered_by_name(monkeypatch):
    vllm_stand_ins.install(monkeypatch)
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    module, function = project["entry-points"]["vllm.general_plugins"]["flashmhf"].split(":")
    getattr(importlib.import_module(module), function)()
    assert "flashmhf.integrations.vllm.model" not in sys.modules
    ((name, place),) = vllm_stand_ins.REGISTERED.items()
    module, cls = place.split(":")
    assert name == getattr(importlib.import_module(module), cls).__name__
    assert name == type(make({})).__name__  # what save_pretrained writes into config.json
