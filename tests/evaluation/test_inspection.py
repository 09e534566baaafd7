"""What `flashmhf inspect` reports, on a model whose insides are known."""

import json
import math

import pytest
import torch
from datasets import Dataset

from flashmhf.cli import app
from flashmhf.data.tokenizer import load_tokenizer
from flashmhf.errors import InputError
from flashmhf.evaluation.inspection import FIGURES, inspect
from flashmhf.models import FlashMHFForCausalLM
from tiny import tiny_model

DOCUMENTS = Dataset.from_dict({"text": ["the quick brown fox jumps over the lazy dog. " * 9, "and again, " * 40]})


def small(**options) -> FlashMHFForCausalLM:
    sizes = {"num_hidden_layers": 2, "intermediate_size": 60, "num_subnetworks": 3, "max_position_embeddings": 64}
    return tiny_model(**(sizes | options)).eval()


def test_figures_are_those_of_the_layer():
    """Against the layer's own output and the operator's reference, on the same tokens."""
    model, tokenizer = small(q_norm=True), load_tokenizer("bytes")
    outputs = []
    layer = model.model.layers[1].mlp
    layer.register_forward_hook(lambda module, args, out: outputs.append(out))
    layer.out_proj = torch.nn.Identity()
    reports = inspect(model, tokenizer, DOCUMENTS, tokens=100)
    assert [(r.layer, r.head) for r in reports] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    out_THD = torch.cat([out.flatten(0, -2) for out in outputs]).unflatten(-1, (2, -1))
    assert len(out_THD) == 100
    for report, rms in zip(reports[2:], out_THD.square().mean((0, 2)).sqrt(), strict=True):
        assert report.output_rms == pytest.approx(float(rms), rel=1e-4)
        assert 0 < report.gate_entropy <= report.load_entropy <= 1 + 1e-6
        assert 0 < report.k_rank <= 1
        assert report.dead_rows == 0


def test_a_gate_that_chooses_one_and_a_row_that_is_dead():
    model = small()
    layer = model.model.layers[0].mlp
    with torch.no_grad():
        layer.k[0, :5] = 0  # SiLU(0) = 0
        layer.v[3:] = layer.v[3, 0]  # of the second head: rank one
        layer.in_proj.weight.fill_(0.0)
        layer.in_proj.weight += 0.1 * torch.randn(32, 32)
        layer.gate_weight.zero_()
    first, second = inspect(model, load_tokenizer("bytes"), DOCUMENTS, tokens=64)[:2]
    assert first.gate_entropy == pytest.approx(1)  # logits of zero
    assert first.dead_rows == pytest.approx(5 / (3 * layer.subnetwork_size))
    assert second.dead_rows == 0
    assert second.v_rank == pytest.approx(1 / 16, rel=1e-3)


def test_without_a_gate():
    reports = inspect(small(ffn_type="mhffn"), load_tokenizer("bytes"), DOCUMENTS, tokens=64)
    assert all(report.gate_entropy is None and report.load_entropy is None for report in reports)
    assert all(math.isfinite(getattr(report, name)) for report in reports for name in FIGURES[2:])


def test_a_model_without_such_layers_is_refused():
    model = small(ffn_type="swiglu")
    with pytest.raises(InputError, match="model: expected FlashMHF, MH-FFN or Dense-MoE layers"):
        inspect(model, load_tokenizer("bytes"), DOCUMENTS)
    with pytest.raises(InputError, match="tokens: expected 1 or more, got 0"):
        inspect(small(), load_tokenizer("bytes"), DOCUMENTS, tokens=0)


def test_command(tmp_path, corpus_folder, capsys):
    small().save_pretrained(tmp_path / "model")
    load_tokenizer("bytes").save_pretrained(tmp_path / "model")
    picture = tmp_path / "heads.png"
    arguments = ["inspect", str(tmp_path / "model"), "--data", str(corpus_folder), "--tokens", "200"]
    app([*arguments, "--output", str(picture), "--json"], standalone_mode=False)
    assert len(json.loads(capsys.readouterr().out)["heads"]) == 4
    assert picture.read_bytes().startswith(b"\x89PNG")
    app(arguments, standalone_mode=False)
    assert len(capsys.readouterr().out.splitlines()) == 2 + 4
    with pytest.raises(InputError, match=r"output: expected a file that ends in .png, got 'x.txt'"):
        app([*arguments, "--output", "x.txt"], standalone_mode=False)
