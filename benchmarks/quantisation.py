"""Error and size of quantised models and layers: `python benchmarks/quantisation.py DIR`, on a CPU.

DIR is a trained model with its tokenizer, such as demo/runs/flashmhf-seed0 of `make demo`. Requires torchao and
bitsandbytes. "K, U, V" are this package's parameters, "projections" every linear layer of a block.
"""

import sys
from collections.abc import Iterator
from typing import Any

import torch
from bitsandbytes.nn.parametrize import replace_parameter_4bit
from torch import Tensor, nn
from torchao.quantization import FqnToConfig, Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from flashmhf.data.splits import load_documents, truncate_documents
from flashmhf.data.tokenizer import load_tokenizer
from flashmhf.evaluation import evaluate
from flashmhf.layers import FlashMHF
from flashmhf.models import FlashMHFConfig
from flashmhf.models.modeling import build_ffn
from flashmhf.reports.table import Table

ROWS, PROJECTIONS = r"re:.*mlp\.(k|u|v)", r"re:.*_proj"
INT8, INT8_DYNAMIC = Int8WeightOnlyConfig(), Int8DynamicActivationInt8WeightConfig()
NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
TORCHAO = {
    "int8, K, U, V": FqnToConfig({ROWS: INT8}),
    "int8, projections": FqnToConfig({PROJECTIONS: INT8}),
    "int8, both": FqnToConfig({ROWS: INT8, PROJECTIONS: INT8}),
    "int8 dynamic, projections": FqnToConfig({PROJECTIONS: INT8_DYNAMIC}),
    "int8, K, U, V; dynamic, projections": FqnToConfig({ROWS: INT8, PROJECTIONS: INT8_DYNAMIC}),
}
DOCUMENT_BYTES = 1024
BLOCK = 64


def quantise_rows_4bit(model: nn.Module) -> None:
    """In blocks of 64, which divides the head dim; on a CPU bitsandbytes 0.50 dequantises wrongly otherwise."""
    for layer in model.modules():
        if isinstance(layer, FlashMHF):
            assert layer.head_dim % BLOCK == 0
            for name in ("k", "u", "v"):
                replace_parameter_4bit(layer, name, blocksize=BLOCK)


def models(folder: str) -> Iterator[tuple[str, Any]]:
    """The model, quantised in every way."""

    def load(**options: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()

    yield "float32", load()
    for name, config in TORCHAO.items():
        yield f"torchao {name}", load(quantization_config=TorchAoConfig(config))
    yield "bitsandbytes int8, projections", load(quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    yield "bitsandbytes nf4, projections", load(quantization_config=NF4)
    for name, options in (("K, U, V", {}), ("both", {"quantization_config": NF4})):
        model = load(**options)
        quantise_rows_4bit(model)
        yield f"bitsandbytes nf4, {name}", model


def mebibytes(module: nn.Module) -> float:
    """Of parameters and buffers, with the scales that belong to them."""
    tensors = {id(x): x for x in [*module.parameters(), *module.buffers()]}
    owners = [*tensors.values(), *module.modules()]
    states = {id(state): state for owner in owners if (state := getattr(owner, "quant_state", None))}
    scales = [*(state.absmax for state in states.values()), *(getattr(x, "SCB", None) for x in tensors.values())]
    return sum(_bytes(x) for x in [*tensors.values(), *scales] if x is not None) / 2**20


def _bytes(x: Any) -> int:
    if hasattr(x, "__tensor_flatten__"):
        return sum(_bytes(getattr(x, name)) for name in x.__tensor_flatten__()[0])
    return x.numel() * x.element_size()


def error(got: Tensor, expected: Tensor) -> str:
    return f"{float((got - expected).norm() / expected.norm()):.4f}"


def model_table(folder: str) -> Table:
    tokenizer = load_tokenizer(folder)
    documents = truncate_documents(load_documents("stdlib", split="validation"), DOCUMENT_BYTES)
    ids = torch.randint(tokenizer.vocab_size, (4, 256), generator=torch.Generator().manual_seed(0))
    rows, expected = [], torch.empty(0)
    for name, model in models(folder):
        logits = model(ids).logits
        expected = logits if name == "float32" else expected
        nats = evaluate(model, tokenizer, documents).nats_per_token
        rows.append((name, f"{mebibytes(model):.2f}", error(logits, expected), f"{nats:.4f}"))
    return Table(("model", "MiB", "error of logits", "nats/token"), rows)


def layer_table() -> Table:
    """The layer of flashmhf-128m with random weights."""
    x = torch.randn(512, 768, generator=torch.Generator().manual_seed(0))
    rows, expected = [], torch.empty(0)
    torchao = {f"torchao {name}": config for name, config in TORCHAO.items()}
    for name, config in ({"float32": None} | torchao | {"bitsandbytes nf4, K, U, V": None}).items():
        torch.manual_seed(0)
        layer = nn.Module()
        layer.mlp = build_ffn(FlashMHFConfig.from_preset("flashmhf-128m", init="scaled"))
        if config is not None:
            quantize_(layer, config, filter_fn=None)
        elif name != "float32":
            quantise_rows_4bit(layer)
        out = layer.mlp(x)
        expected = out if name == "float32" else expected
        rows.append((name, f"{mebibytes(layer):.2f}", error(out, expected)))
    return Table(("layer, 768 wide", "MiB", "error of output"), rows)


if __name__ == "__main__":
    with torch.no_grad():
        print(layer_table().markdown(), "\n")
        print(model_table(sys.argv[1]).markdown())
