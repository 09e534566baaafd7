"""Quantised K, U, V and projections: what the libraries' own functions do to them is what the layer computes with."""

import pytest
import torch
from torchao.quantization import FqnToConfig, Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from flashmhf.evaluation.onednn import onednn_linear
from flashmhf.layers.multi_head import local
from flashmhf.models.loading import load_model, non_finite_weight
from tiny import tiny_model

ROWS, PROJECTIONS = r"re:.*mlp\.(k|u|v)", r"re:.*_proj"
INT8, INT8_DYNAMIC = Int8WeightOnlyConfig(), Int8DynamicActivationInt8WeightConfig()
CONFIGS = {
    "K, U, V": FqnToConfig({ROWS: INT8}),
    "projections": FqnToConfig({PROJECTIONS: INT8}),
    "both": FqnToConfig({ROWS: INT8, PROJECTIONS: INT8}),
    "dynamic": FqnToConfig({ROWS: INT8_DYNAMIC, PROJECTIONS: INT8_DYNAMIC}),
}


def make(**options):
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_subnetworks": 3, "intermediate_size": 192}
    return tiny_model(**(sizes | {"q_norm": True, "tie_word_embeddings": True} | options)).eval()


@pytest.fixture
def folder(tmp_path):
    make().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def ids():
    return torch.randint(320, (2, 17))


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@torch.no_grad()
def test_int8_by_torchao_is_saved_and_loaded(config, folder, ids, tmp_path):
    expected = make()(ids).logits
    quantised = AutoModelForCausalLM.from_pretrained(folder, quantization_config=TorchAoConfig(config))
    logits = quantised(ids).logits
    assert 0 < error(logits, expected) < 0.03
    quantised.save_pretrained(tmp_path / "quantised")
    weights = "model.safetensors"
    assert (tmp_path / "quantised" / weights).stat().st_size < 0.85 * (folder / weights).stat().st_size
    loaded = load_model(str(tmp_path / "quantised"))  # as the commands do
    assert torch.equal(loaded(ids).logits, logits)
    with onednn_linear(loaded):
        torch.testing.assert_close(loaded(ids).logits, logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("gate_type", ["sigmoid", None], ids=["gate", "no gate"])
@torch.no_grad()
def test_the_layer_computes_with_the_quantised_values(gate_type, dtype):
    layer = make(gate_type=gate_type).to(dtype).model.layers[0]
    quantize_(layer, CONFIGS["K, U, V"], filter_fn=None)
    x = torch.randn(7, 64, dtype=dtype)
    out = layer.mlp(x)
    for name in ("k", "u", "v"):
        values = local(getattr(layer.mlp, name))
        assert type(values) is torch.Tensor
        setattr(layer.mlp, name, torch.nn.Parameter(values))
    assert torch.equal(layer.mlp(x), out)


def test_a_quantised_weight_that_is_not_finite_is_found():
    model = make()
    quantize_(model, CONFIGS["K, U, V"], filter_fn=None)
    assert non_finite_weight(model) is None
    model.model.layers[1].mlp.u.scale.fill_(float("nan"))
    assert non_finite_weight(model) == "model.layers.1.mlp.u"


@pytest.mark.parametrize("projections", [False, True], ids=["K, U, V", "both"])
@torch.no_grad()
def test_four_bits_by_bitsandbytes(projections, folder, ids):
    parametrize = pytest.importorskip("bitsandbytes.nn.parametrize", reason="bitsandbytes takes 125 MB")
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    options = {"quantization_config": nf4} if projections else {}
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    before = model(ids).logits
    for layer in model.model.layers:
        for name in ("k", "u", "v"):
            values = getattr(layer.mlp, name).detach().clone()
            # On a CPU bitsandbytes 0.50 dequantises wrongly unless the block size divides the head dim.
            parametrize.replace_parameter_4bit(layer.mlp, name, blocksize=layer.mlp.head_dim)
            assert 0 < error(getattr(layer.mlp, name), values) < 0.1
            assert layer.mlp.parametrizations[name].original.numel() * 2 == values.numel()
    assert 0 < error(model(ids).logits, before) < 0.5


@torch.no_grad()
def test_eight_bits_by_bitsandbytes_for_the_projections(folder, ids):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes takes 125 MB")
    options = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    assert model.model.layers[0].mlp.in_proj.weight.dtype == torch.int8
    assert 0 < error(model(ids).logits, make()(ids).logits) < 0.03
