"""LoRA by PEFT on every weight of the layer: it learns, is saved and loaded, and can be merged."""

import pytest
import torch
from torch import nn

from tiny import tiny_model

peft = pytest.importorskip("peft")

TOKENS = torch.arange(18).view(2, 9) * 7 % 320
ROWS = ["mlp.k", "mlp.u", "mlp.v"]
TARGETS = {
    "all linear": {"target_modules": "all-linear"},
    "projections": {"target_modules": ["in_proj", "out_proj"]},
    "rows": {"target_parameters": ROWS},
    "gate": {"target_parameters": ["mlp.gate_weight"]},
    "norm": {"target_parameters": ["q_norm.weight"]},
    "all": {"target_modules": "all-linear", "target_parameters": [*ROWS, "mlp.gate_weight"]},
}
MODELS = {
    "norm": {"q_norm": True},
    "recomputed": {"q_norm": True, "recompute_q": True},
    "grouped, unscaled": {"q_norm": True, "num_ffn_kv_heads": 1, "init": "reference"},
}


def make(**options: object) -> nn.Module:
    return tiny_model(**{"num_subnetworks": 3, "num_hidden_layers": 2} | options)


def with_adapter(model: nn.Module, targets: dict) -> nn.Module:
    config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", **{"target_modules": []} | targets)
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return adapted


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
def test_the_merged_and_the_loaded_model_compute_what_the_adapted_one_does(tmp_path, targets, options):
    adapted = with_adapter(make(**options), targets).eval()
    expected = adapted(TOKENS).logits
    assert not torch.allclose(expected, make(**options).eval()(TOKENS).logits, atol=1e-5)
    adapted.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(make(**options), tmp_path).eval()
    assert torch.equal(loaded(TOKENS).logits, expected)
    torch.testing.assert_close(adapted.merge_and_unload()(TOKENS).logits, expected, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
def test_gradients_do_not_depend_on_recomputing(targets):
    """PEFT's changes to a parameter last as long as the forward; the backward recomputes later."""
    gradients = []
    for recompute_q in (False, True):
        adapted = with_adapter(make(q_norm=True, recompute_q=recompute_q), targets)
        adapted(TOKENS, labels=TOKENS).loss.backward()
        gradients.append({n: p.grad for n, p in adapted.named_parameters() if p.requires_grad})
    assert all(gradient.abs().sum() > 0 for gradient in gradients[0].values())
    torch.testing.assert_close(gradients[1], gradients[0])
