"""Conversion from the reference code's format and back, against an independent implementation of it."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flashmhf.errors import InputError
from flashmhf.models import FlashMHFConfig, FlashMHFForCausalLM
from flashmhf.models.loading import load_model
from flashmhf.models.reference.conversion import UNUSED, convert
from reference_model import reference_config, reference_model, save_reference

CASES = {
    "plain": {},
    "norm": {"apply_rmsnorm": True},
    "grouped": {"num_kuv_heads": 2},
    "one parameter head": {"num_kuv_heads": 1, "apply_rmsnorm": True},
    "heads by default": {"num_kuv_heads": None},
    "one expert": {"num_experts": 1},
    "dot scaling": {"apply_dot_scaling": True},
    "dot scaling by theory": {"apply_dot_scaling": True, "apply_dot_scaling_theory": True, "apply_rmsnorm": True},
    "theory alone does nothing": {"apply_dot_scaling_theory": True},
    "final scaling": {"apply_final_scaling": True},
    "no projections": {"skip_linear": True},
    "no norm before": {"disable_original_mlp_rmsnorm": True},
    "bias": {"mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    "other flags": {"use_flash": False, "use_legacy_flash": True, "init_wself_identity": True, "init_router_gain": 2.0},
    "everything": {
        "apply_rmsnorm": True,
        "num_kuv_heads": 2,
        "apply_dot_scaling": True,
        "apply_final_scaling": True,
        "disable_original_mlp_rmsnorm": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
        "attention_bias": True,
    },
}


def make(folder: Path, family: str = "mhffnmoe", shards: int = 1, **flags):
    torch.manual_seed(1)
    config = reference_config(family, **flags)
    model = reference_model(config)
    save_reference(model, config, folder, shards)
    return model


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("model*.safetensors")) for name, t in load_file(file).items()}


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("family", ["mhffnmoe", "mhffn"])
@pytest.mark.parametrize("flags", CASES.values(), ids=CASES.keys())
def test_round_trip_is_exact(tmp_path, flags, family, shards):
    if family == "mhffn":
        flags = {key: value for key, value in flags.items() if key not in ("num_experts", "init_router_gain")}
    oracle = make(tmp_path / "theirs", family, shards, **flags)
    convert(tmp_path / "theirs", tmp_path / "ours")
    tokens = torch.randint(0, 90, (2, 20))
    with torch.no_grad():
        expected = oracle(tokens).logits
        logits = load_model(str(tmp_path / "ours"))(tokens).logits
    assert ((logits - expected).norm() / expected.norm()).item() < 1e-5
    convert(tmp_path / "ours", tmp_path / "back", to="reference")
    assert json.loads((tmp_path / "back/config.json").read_text()) == json.loads(
        (tmp_path / "theirs/config.json").read_text()
    )
    before, after = snapshot(tmp_path / "theirs"), snapshot(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(after[file] == before[file] for file in before if file.endswith(".safetensors"))


def test_bfloat16_survives_bit_for_bit(tmp_path):
    make(tmp_path / "float32")
    (tmp_path / "theirs").mkdir()
    shutil.copy(tmp_path / "float32/config.json", tmp_path / "theirs")
    rounded = {name: tensor.bfloat16() for name, tensor in tensors_of(tmp_path / "float32").items()}
    save_file(rounded, tmp_path / "theirs/model.safetensors", metadata={"format": "pt"})
    convert(tmp_path / "theirs", tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back", to="reference")
    assert (tmp_path / "back/model.safetensors").read_bytes() == (tmp_path / "theirs/model.safetensors").read_bytes()


def test_unused_tensors_are_kept_for_the_way_back(tmp_path):
    make(tmp_path / "theirs", tie_word_embeddings=True)
    file = tmp_path / "theirs/model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": torch.randn(90, 32)}, file, metadata={"format": "pt"})
    convert(tmp_path / "theirs", tmp_path / "ours")
    names = {f"model.layers.{i}.mlp.q_norm.weight" for i in range(2)} | {"lm_head.weight"}
    assert load_file(tmp_path / "ours" / UNUSED).keys() == names
    assert not names & tensors_of(tmp_path / "ours").keys()
    convert(tmp_path / "ours", tmp_path / "back", to="reference")
    assert (tmp_path / "back/model.safetensors").read_bytes() == file.read_bytes()


def test_only_tokenizer_files_are_copied(tmp_path):
    make(tmp_path / "theirs")
    (tmp_path / "theirs/tokenizer.json").write_text("{}")
    (tmp_path / "theirs/modeling_mhffnmoe.py").write_text("raise SystemExit")
    (tmp_path / "theirs/training_args.bin").write_bytes(b"pickle")
    convert(tmp_path / "theirs", tmp_path / "ours")
    assert sorted(p.name for p in (tmp_path / "ours").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        UNUSED,
    ]


def test_our_model_converts_to_the_reference(tmp_path):
    """A model that never came from the reference: the reference's model computes the same."""
    config = FlashMHFConfig(
        vocab_size=90,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_ffn_heads=4,
        num_ffn_kv_heads=2,
        intermediate_size=48,
        num_subnetworks=3,
        max_position_embeddings=64,
        score_scale=2.0,
        output_scale=math.sqrt(3 / 8),
        rms_norm_eps=1e-5,
    )
    model = FlashMHFForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "theirs", to="reference")
    their_config = json.loads((tmp_path / "theirs/config.json").read_text())
    assert their_config["mhffnmoe_apply_dot_scaling"] is True
    assert their_config["mhffnmoe_apply_dot_scaling_theory"] is False
    oracle = reference_model(their_config)
    oracle.load_state_dict(tensors_of(tmp_path / "theirs"))
    tokens = torch.randint(0, 90, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(oracle(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-5)


def test_the_tiny_preset_converts_there_and_back(tmp_path):
    model = FlashMHFForCausalLM(FlashMHFConfig.from_preset("reference-tiny"))
    model.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "theirs", to="reference")
    convert(tmp_path / "theirs", tmp_path / "back")
    before, after = tensors_of(tmp_path / "ours"), tensors_of(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_changes_after_conversion_are_converted_back(tmp_path):
    make(tmp_path / "theirs", apply_rmsnorm=True)
    convert(tmp_path / "theirs", tmp_path / "ours")
    model = load_model(str(tmp_path / "ours"))
    model.config.score_scale = 4.0
    model.save_pretrained(tmp_path / "changed")
    convert(tmp_path / "changed", tmp_path / "back", to="reference")
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert config["mhffnmoe_apply_dot_scaling"] is True
    assert config["mhffnmoe_apply_dot_scaling_theory"] is True


def edit_tensors(folder: Path, edit) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def edit_config(folder: Path, **values) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: value for key, value in config.items() if value != "absent"}))


def truncate(folder: Path, size: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])


BROKEN = {
    r"expected tensor model.layers.1.mlp.router \(of 1 missing\), got none": lambda f: edit_tensors(
        f, lambda t: t.pop("model.layers.1.mlp.router")
    ),
    r"expected no tensor model.layers.0.mlp.extra \(of 1 extra\)": lambda f: edit_tensors(
        f, lambda t: t.update({"model.layers.0.mlp.extra": torch.zeros(1)})
    ),
    r"expected model.layers.0.mlp.up_weight of shape \(48, 32\), got \(32, 48\)": lambda f: edit_tensors(
        f, lambda t: t.update({"model.layers.0.mlp.up_weight": torch.zeros(32, 48)})
    ),
    "the unknown mhffnmoe_new_flag": lambda f: edit_config(f, mhffnmoe_new_flag=True),
    "the unknown shiny": lambda f: edit_config(f, shiny=1),
    "expected model_type mhffnmoe or mhffn, got 'llama'": lambda f: edit_config(f, model_type="llama"),
    "expected hidden_act 'silu', got 'gelu'": lambda f: edit_config(f, hidden_act="gelu"),
    "intermediate_size: expected a multiple of num_subnetworks 5, got 48": lambda f: edit_config(
        f, mhffnmoe_num_experts=5
    ),
    "num_ffn_heads: expected a multiple of num_ffn_kv_heads 3, got 4": lambda f: edit_config(
        f, mhffnmoe_num_kuv_heads=3
    ),
    r"model.safetensors is corrupt: expected \d+ bytes, got 20000": lambda f: truncate(f, 20000),
    r"model.safetensors is corrupt: expected a header of \d+ bytes, got 100": lambda f: truncate(f, 100),
    r"model.safetensors is corrupt: expected a header, got 3 bytes": lambda f: truncate(f, 3),
    "expected model.safetensors or model.safetensors.index.json": lambda f: (f / "model.safetensors").unlink(),
    "expected a JSON object in .*config.json": lambda f: (f / "config.json").write_text("{"),
    "SRC: expected a folder with config.json": lambda f: (f / "config.json").unlink(),
    "pickled weights can run code": lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
}


@pytest.mark.parametrize("message", BROKEN)
def test_invalid_checkpoints_are_errors_and_nothing_is_written(tmp_path, message):
    make(tmp_path / "theirs")
    BROKEN[message](tmp_path / "theirs")
    with pytest.raises(InputError, match=message):
        convert(tmp_path / "theirs", tmp_path / "ours")
    assert [p.name for p in tmp_path.iterdir()] == ["theirs"]


def test_a_shard_that_is_missing_or_incomplete(tmp_path):
    make(tmp_path / "theirs", shards=3)
    shard = tmp_path / "theirs/model-00002-of-00003.safetensors"
    tensors = load_file(shard)
    first = min(tensors)
    save_file({name: tensor for name, tensor in tensors.items() if name != first}, shard)
    with pytest.raises(InputError, match=f"expected tensor {first} in .*00002"):
        convert(tmp_path / "theirs", tmp_path / "ours")
    shard.unlink()
    with pytest.raises(InputError, match=r"expected the file .*00002.*, got none"):
        convert(tmp_path / "theirs", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_a_non_empty_destination_is_left_alone(tmp_path):
    make(tmp_path / "theirs")
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours/precious").write_text("kept")
    with pytest.raises(InputError, match="DST: expected a new or empty folder"):
        convert(tmp_path / "theirs", tmp_path / "ours")
    assert (tmp_path / "ours/precious").read_text() == "kept"


INEXPRESSIBLE = {
    "gate_scale: expected 1.0, all that the reference code has, got 2.0": {"gate_scale": 2.0},
    "gate_type: expected sigmoid, all that the reference code has, got 'softmax'": {"gate_type": "softmax"},
    "ffn_type: expected flashmhf or mhffn, all that the reference code has, got 'pkv'": {"ffn_type": "pkv"},
    "score_scale: expected .*, all that the reference code has, got 3.0": {"score_scale": 3.0},
    "output_scale: expected .*, all that the reference code has, got 0.5": {"output_scale": 0.5},
    "rope_parameters: expected rope_type default, all that the reference code has, got 'linear'": {
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    },
}


@pytest.mark.parametrize("message", INEXPRESSIBLE)
def test_what_the_reference_cannot_express(tmp_path, message):
    config = FlashMHFConfig(
        **{
            "vocab_size": 90,
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            **INEXPRESSIBLE[message],
        }
    )
    FlashMHFForCausalLM(config).save_pretrained(tmp_path / "ours")
    with pytest.raises(InputError, match=message):
        convert(tmp_path / "ours", tmp_path / "theirs", to="reference")
    assert not (tmp_path / "theirs").exists()


def test_only_our_checkpoints_convert_to_the_reference(tmp_path):
    make(tmp_path / "theirs")
    with pytest.raises(InputError, match="expected model_type 'flashmhf', got 'mhffnmoe'"):
        convert(tmp_path / "theirs", tmp_path / "back", to="reference")
    with pytest.raises(InputError, match="to: expected flashmhf or reference, got 'llama'"):
        convert(tmp_path / "theirs", tmp_path / "back", to="llama")
