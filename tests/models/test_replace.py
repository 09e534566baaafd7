"""Replacing the feed-forward layers of existing models."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from flashmhf import FlashMHF, replace_ffn

SIZES = {
    "vocab_size": 90,
    "hidden_size": 64,
    "intermediate_size": 200,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
KINDS = (LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config)


def make(kind=LlamaConfig):
    return AutoModelForCausalLM.from_config(kind(**SIZES))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_all_layers_are_replaced_and_train(kind):
    model = make(kind).to(torch.bfloat16)
    before = sum(p.numel() for p in model.parameters())
    assert replace_ffn(model, num_heads=4, subnetwork_size=24, init="scaled", q_norm=True) is model
    layers = [layer.mlp for layer in model.model.layers]
    assert all(isinstance(layer, FlashMHF) and layer.k.dtype == torch.bfloat16 for layer in layers)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(before, rel=0.1)
    tokens = torch.randint(0, 90, (2, 8))
    model(tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None for p in layers[0].parameters())
    assert model.eval().generate(tokens, max_new_tokens=3, do_sample=False).shape == (2, 11)


def test_selected_layers_are_replaced():
    model = replace_ffn(make().eval(), layers=[1])
    assert [isinstance(layer.mlp, FlashMHF) for layer in model.model.layers] == [False, True, False]
    assert not model.model.layers[1].mlp.training


def test_a_replaced_model_can_be_rebuilt_and_loaded():
    arguments = {"num_heads": 4, "num_subnetworks": 2, "subnetwork_size": 24}
    model = replace_ffn(make(), **arguments).eval()
    other = replace_ffn(make(), **arguments).eval()
    other.load_state_dict(model.state_dict())
    tokens = torch.randint(0, 90, (2, 8))
    assert torch.equal(other(tokens).logits, model(tokens).logits)


def test_errors_leave_the_model_unchanged():
    model = make()
    with pytest.raises(ValueError, match="layers: expected 0 to 2, got 3"):
        replace_ffn(model, layers=[0, 3])
    with pytest.raises(ValueError, match="hidden_size: expected a multiple of num_heads 5, got 64"):
        replace_ffn(model, num_heads=5)
    assert not any(isinstance(module, FlashMHF) for module in model.modules())
    with pytest.raises(
        ValueError, match="model: expected layers with an mlp of gate_proj, up_proj, down_proj, got Linear"
    ):
        replace_ffn(torch.nn.Linear(3, 3))
