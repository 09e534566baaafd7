"""Checkpoints with K, U and V of four dimensions, (H_kv, E, F, D), as they were."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from flashmhf.errors import InputError
from flashmhf.layers.former_shapes import accept_former_shapes, former_shapes
from flashmhf.models.loading import load_model
from flashmhf.models.reference.conversion import convert
from tiny import tiny_model

OPTIONS = {"num_hidden_layers": 2, "num_subnetworks": 3, "q_norm": True, "num_ffn_kv_heads": 1, "intermediate_size": 96}
VARIANTS = {"grouped": {}, "two heads": {"num_ffn_kv_heads": 2}, "mhffn": {"ffn_type": "mhffn", "num_subnetworks": 1}}
TOKENS = torch.arange(18).view(2, 9) * 7 % 320


def to_former(tensors: dict[str, Tensor], shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    return {name: tensor.view(shapes[name]).clone() if name in shapes else tensor for name, tensor in tensors.items()}


WRONG = {  # as many numbers in another order
    "sub-networks first": lambda tensor: tensor.transpose(0, 1),
    "columns first": lambda tensor: tensor.transpose(2, 3),
    "three dimensions, columns first": lambda tensor: tensor.flatten(0, 1).transpose(1, 2),
    "two dimensions": lambda tensor: tensor.flatten(0, 2),
}


def save(model: nn.Module, folder: Path, edit, **options) -> None:
    model.save_pretrained(folder, **options)
    for file in folder.glob("*.safetensors"):
        save_file(edit(load_file(file), former_shapes(model)), file, metadata={"format": "pt"})


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("size", ["5GB", "20KB"], ids=["one file", "sharded"])
def test_from_pretrained_loads_them_and_saves_three_dimensions(tmp_path, options, size):
    model = tiny_model(**OPTIONS | options).eval()
    save(model, tmp_path / "former", to_former, max_shard_size=size)
    loaded = load_model(str(tmp_path / "former"))
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    for auto in (AutoModel, AutoModelForSequenceClassification):
        other = dict(auto.from_pretrained(tmp_path / "former").base_model.named_parameters())
        assert torch.equal(other["layers.1.mlp.v"], model.model.layers[1].mlp.v)
    loaded.save_pretrained(tmp_path / "present")
    assert {
        t.ndim for n, t in load_file(tmp_path / "present/model.safetensors").items() if n in former_shapes(model)
    } == {3}
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "present")(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_other_shapes_with_as_many_numbers_are_refused(tmp_path, change):
    def edit(tensors: dict[str, Tensor], shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
        former = to_former(tensors, shapes)
        return {n: change(tensor).contiguous() if n in shapes else tensor for n, tensor in former.items()}

    model = tiny_model(**OPTIONS | {"num_ffn_kv_heads": 2, "init": "reference"})
    save(model, tmp_path, edit)
    with pytest.raises(InputError, match="model: "):
        load_model(str(tmp_path))
    with pytest.raises(InputError, match=r"checkpoint: expected model\.layers\.0\.mlp\.k of shape"):
        convert(tmp_path, tmp_path / "reference", to="reference")
    state = edit(model.state_dict(), former_shapes(model))
    with pytest.raises(RuntimeError, match=r"size mismatch for model\.layers\.0\.mlp\.k"):
        model.load_state_dict(state)


def test_load_state_dict_loads_them_and_leaves_the_dictionary_as_it_was():
    model, other = tiny_model(**OPTIONS).eval(), tiny_model(**OPTIONS).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    state = to_former(model.state_dict(), former_shapes(model))
    other.load_state_dict(state)
    assert torch.equal(other(TOKENS).logits, model(TOKENS).logits)
    assert state["model.layers.0.mlp.k"].ndim == 4
    layer = copy.deepcopy(model.model.layers[0].mlp)
    layer.load_state_dict(
        {name: p.view(former_shapes(layer).get(name, p.shape)) for name, p in layer.state_dict().items()}
    )


def test_an_optimizer_goes_on():
    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        model(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
        rows = [p for n, p in model.named_parameters() if n in former_shapes(model)]
        others = [p for n, p in model.named_parameters() if n not in former_shapes(model)]
        return torch.optim.AdamW([{"params": others}, {"params": rows, "weight_decay": 0.0}], lr=1e-2)

    model = tiny_model(**OPTIONS)
    optimizer = optimizer_of(model)
    step(model, optimizer)
    other = copy.deepcopy(model)
    state = copy.deepcopy(optimizer.state_dict())
    H_kv, E = other.model.layers[0].mlp.rows_shape[:2]
    for values in state["state"].values():
        for name, value in values.items():
            if value.ndim == 3 and value.shape[0] == H_kv * E:
                values[name] = value.view(H_kv, E, *value.shape[1:]).clone()
    resumed = optimizer_of(other)
    accept_former_shapes(resumed, other)
    resumed.load_state_dict(state)
    for name in ("exp_avg", "exp_avg_sq"):
        assert resumed.state[other.model.layers[0].mlp.k][name].shape == other.model.layers[0].mlp.k.shape
    step(model, optimizer)
    step(other, resumed)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_a_former_checkpoint_is_converted_to_the_reference_format(tmp_path):
    model = tiny_model(**OPTIONS | {"init": "reference", "num_ffn_kv_heads": 2})
    save(model, tmp_path / "former", to_former)
    model.save_pretrained(tmp_path / "present")
    for name in ("former", "present"):
        convert(tmp_path / name, tmp_path / f"{name}-reference", to="reference")
    found, expected = (load_file(tmp_path / f"{n}-reference/model.safetensors") for n in ("former", "present"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    convert(tmp_path / "former-reference", tmp_path / "back")
    back = load_file(tmp_path / "back/model.safetensors")
    assert all(
        torch.equal(back[name], tensor) for name, tensor in load_file(tmp_path / "present/model.safetensors").items()
    )
