"""Presets, the paper's parameter counts, and invalid configurations."""

import json

import pytest

from flashmhf.estimates.cost import count_parameters
from flashmhf.models import FlashMHFConfig, preset_names
from flashmhf.models.configuration import PRESETS

# As the paper prints them: millions are 2^20, billions 2^30 (arXiv 2512.06989, appendix).
PAPER_COUNTS = {
    "swiglu-128m": (117.96, 2**20),
    "swiglu-370m": (388.05, 2**20),
    "swiglu-1.3b": (1.323, 2**30),
    "mhffn-128m": (115.70, 2**20),
    "mhffn-370m": (379.79, 2**20),
    "pkv-370m": (386.55, 2**20),
    "flashmhf-128m": (115.77, 2**20),
    "flashmhf-370m": (390.08, 2**20),
    "flashmhf-1.3b": (1.321, 2**30),
}


@pytest.mark.parametrize("preset", PAPER_COUNTS)
def test_parameter_counts_of_the_paper(preset):
    printed, unit = PAPER_COUNTS[preset]
    digits = 3 if unit == 2**30 else 2
    assert round(count_parameters(FlashMHFConfig.from_preset(preset)) / unit, digits) == printed


def test_all_promised_presets_exist():
    names = {f"{kind}-{size}" for kind in ("flashmhf", "mhffn", "swiglu") for size in ("tiny", "128m", "370m", "1.3b")}
    names |= {
        "pkv-370m",
        "reference-128m",
        "reference-370m",
        "reference-1.3b",
        "pkv-tiny",
        "dense_moe-tiny",
        "reference-tiny",
    }
    assert set(preset_names()) == names


@pytest.mark.parametrize("preset", preset_names())
def test_presets_hold_only_known_fields(preset):
    values = json.loads((PRESETS / f"{preset}.json").read_text())
    assert values.keys() <= FlashMHFConfig().to_dict().keys()
    config = FlashMHFConfig.from_preset(preset)
    assert all(config.to_dict()[name] == value for name, value in values.items())


def test_tiny_presets_have_matched_parameters():
    counts = [count_parameters(FlashMHFConfig.from_preset(name)) for name in preset_names() if name.endswith("-tiny")]
    assert max(counts) < 1.01 * min(counts)


def test_overrides():
    config = FlashMHFConfig.from_preset("flashmhf-128m", num_hidden_layers=2, vocab_size=300)
    assert (config.num_hidden_layers, config.vocab_size, config.subnetwork_size) == (2, 300, 256)


def test_subnetwork_size_is_another_way_to_give_intermediate_size(tmp_path):
    config = FlashMHFConfig(hidden_size=64, num_attention_heads=4, num_subnetworks=3, subnetwork_size=20)
    assert (config.intermediate_size, config.subnetwork_size) == (60, 20)
    config.save_pretrained(tmp_path)
    assert "subnetwork_size" not in json.loads((tmp_path / "config.json").read_text())
    assert FlashMHFConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    agreeing = FlashMHFConfig(intermediate_size=60, num_subnetworks=3, subnetwork_size=20)
    assert agreeing.intermediate_size == 60
    config = FlashMHFConfig.from_preset("flashmhf-tiny", subnetwork_size=64)
    assert (config.intermediate_size, config.num_subnetworks) == (192, 3)


def test_defaults_are_resolved_and_saved(tmp_path):
    config = FlashMHFConfig(
        num_attention_heads=8, hidden_size=64, intermediate_size=60, num_subnetworks=3, init="scaled"
    )
    assert (config.num_ffn_heads, config.num_ffn_kv_heads) == (8, 8)
    assert (config.score_scale, config.output_scale) == (8.0, 3.0)
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert (saved["score_scale"], saved["output_scale"]) == (8.0, 3.0)
    assert FlashMHFConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_gate_type_is_read_under_its_former_name(tmp_path):
    config = FlashMHFConfig.from_preset("flashmhf-tiny", gate_type="softmax")
    old = {name: value for name, value in config.to_dict().items() if name != "gate_type"} | {"gate": "softmax"}
    (tmp_path / "config.json").write_text(json.dumps(old))
    read = FlashMHFConfig.from_pretrained(tmp_path)
    assert read.to_dict() == config.to_dict()
    assert FlashMHFConfig(**{k: v for k, v in old.items() if k != "model_type"}).gate_type == "softmax"


BAD = {
    r"subnetwork_size: expected none beside intermediate_size 60, .* num_subnetworks 3, got 21": {
        "intermediate_size": 60,
        "num_subnetworks": 3,
        "subnetwork_size": 21,
    },
    "subnetwork_size: expected a whole number from 1 .*, got 0": {"subnetwork_size": 0},
    "subnetwork_size: expected none, since ffn_type swiglu has no": {"ffn_type": "swiglu", "subnetwork_size": 4},
    "ffn_type: expected one of flashmhf, .*, got 'moe'": {"ffn_type": "moe"},
    "gate_type: expected one of sigmoid, softmax, None, got 'relu'": {"gate_type": "relu"},
    "init: expected one of reference, scaled, got 'zero'": {"init": "zero"},
    "backend: expected one of auto, .*, got 'cuda'": {"backend": "cuda"},
    "intermediate_size: expected a multiple of num_subnetworks 3, got 100": {
        "intermediate_size": 100,
        "num_subnetworks": 3,
    },
    "hidden_size: expected a multiple of num_ffn_heads 5, got 4096": {"num_ffn_heads": 5},
    "num_ffn_heads: expected a multiple of num_ffn_kv_heads 3, got 32": {"num_ffn_kv_heads": 3},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_values(message):
    with pytest.raises(ValueError, match=message):
        FlashMHFConfig(**BAD[message])


def test_unknown_preset():
    with pytest.raises(ValueError, match=r"preset: expected one of .*, got 'flashmhf-2t'"):
        FlashMHFConfig.from_preset("flashmhf-2t")
