"""Loading configurations and models: from presets, files and folders, of this and of earlier versions."""

import json

import pytest
import torch
from transformers import AutoConfig

from flashmhf.errors import InputError
from flashmhf.models import FlashMHFConfig
from flashmhf.models.checks import check_context_length
from flashmhf.models.loading import load_config, load_model
from flashmhf.models.reference.conversion import convert


def rename_gate_type(config: dict) -> dict:
    """The configuration with the former name of gate_type."""
    return {"gate" if name == "gate_type" else name: value for name, value in config.items()}


@pytest.mark.parametrize("gate_type", ["sigmoid", "softmax", None])
def test_configurations_with_the_former_name_of_gate_type_are_read(tmp_path, gate_type):
    config = FlashMHFConfig.from_preset("flashmhf-tiny", gate_type=gate_type)
    old = rename_gate_type(config.to_dict())
    assert "gate_type" not in old
    (tmp_path / "config.json").write_text(json.dumps(old))
    for read in (
        FlashMHFConfig.from_pretrained(tmp_path),
        AutoConfig.from_pretrained(tmp_path),
        load_config(str(tmp_path)),
        load_config(str(tmp_path / "config.json")),
    ):
        assert read.gate_type == gate_type
        assert not hasattr(read, "gate")
        assert read.to_dict()["gate_type"] == gate_type
        assert "gate" not in read.to_dict()


def test_checkpoints_with_the_former_name_of_gate_type_load_and_convert(make_model, tmp_path):
    model = make_model(num_subnetworks=3, score_scale=1.0, gate_scale=1.0, output_scale=1.0)
    model.save_pretrained(tmp_path / "old")
    file = tmp_path / "old/config.json"
    file.write_text(json.dumps(rename_gate_type(json.loads(file.read_text()))))
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(load_model(str(tmp_path / "old"))(tokens).logits, model(tokens).logits)
    convert(tmp_path / "old", tmp_path / "theirs", to="reference")
    convert(tmp_path / "theirs", tmp_path / "back")
    assert json.loads((tmp_path / "back/config.json").read_text())["gate_type"] == "sigmoid"


def test_a_source_that_is_nothing_is_an_error(tmp_path):
    with pytest.raises(InputError, match=r"model: expected a preset \(.*\), a JSON file or a folder, got 'nothing'"):
        load_config("nothing")
    with pytest.raises(InputError, match=r"model: expected a folder with config\.json, got"):
        load_model(str(tmp_path))


def test_invalid_values_name_the_file_and_the_argument(tmp_path):
    file = tmp_path / "small.json"
    file.write_text(json.dumps({"gate": "relu"}))
    with pytest.raises(InputError, match=r"small.json: gate_type: expected one of .*, got 'relu'"):
        load_config(str(file))


def test_a_missing_tensor_is_an_error(make_model, tmp_path):
    model = make_model(num_subnetworks=3)
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"q_norm": True}))
    with pytest.raises(InputError, match=r"with missing_keys: model\.layers\.0\.mlp\.q_norm\.weight"):
        load_model(str(tmp_path))


def test_the_context_length_is_at_most_the_models():
    config = FlashMHFConfig.from_preset("flashmhf-tiny")
    longest = config.max_position_embeddings
    assert check_context_length(config, None) == longest
    assert check_context_length(config, 2) == 2
    for length in (1, longest + 1):
        with pytest.raises(InputError, match=f"context-length: expected 2 to the model's {longest}, got {length}"):
            check_context_length(config, length)
