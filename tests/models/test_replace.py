"""Replacing the feed-forward layers of existing models."""

import copy
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from flashmhf import FlashMHF, replace_ffn
from flashmhf.data.config import DataConfig
from flashmhf.data.tokenizer import load_tokenizer
from flashmhf.errors import InputError
from flashmhf.models.loading import load_model
from flashmhf.training.arguments import parse_arguments
from flashmhf.training.config import TrainConfig
from flashmhf.training.run import train

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


TOKENS = torch.arange(16).view(2, 8) * 7 % 90


def make(kind=LlamaConfig, dtype=torch.float32, **options):
    return AutoModelForCausalLM.from_config(kind(**SIZES | options), dtype=dtype)


def replaced(calls: list[dict], kind=LlamaConfig, **options):
    """A small model after some calls of `replace_ffn`, with parameters that are not those of a new one."""
    model = make(kind, **options).eval()
    for arguments in calls:
        replace_ffn(model, **arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return model


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


def with_adapter(model):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))


OPTIONS = {
    "defaults": [{}],
    "one layer": [{"layers": [1], "q_norm": True, "init": "scaled"}],
    "two calls": [{"layers": [2], "num_heads": 4, "gate_type": "softmax"}, {"layers": [0], "gate_type": None}],
    "the rest later": [{"layers": [1], "bias": True, "num_kv_heads": 1}, {"projections": False, "num_heads": 2}],
    "scales": [{"score_scale": 0.1, "output_scale": 1 / 3, "norm_eps": 1e-3, "q_norm": True, "recompute_q": True}],
}


@pytest.mark.parametrize("calls", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(
    "saved", [{}, {"max_shard_size": "20KB"}, {"tie_word_embeddings": True}, {"dtype": torch.bfloat16}], ids=str
)
def test_a_saved_model_is_loaded(tmp_path, calls, saved):
    size = {key: value for key, value in saved.items() if key == "max_shard_size"}
    model = replaced(calls, **{key: value for key, value in saved.items() if key not in size})
    expected = model(TOKENS).logits
    model.save_pretrained(tmp_path, **size)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert loaded.dtype == model.dtype
    assert repr(loaded) == repr(model)
    assert torch.equal(loaded(TOKENS).logits, expected)
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/config.json").read_text() == (tmp_path / "config.json").read_text()
    assert torch.equal(load_model(str(tmp_path / "again"))(TOKENS).logits, expected)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_other_heads_and_copies_have_the_layers(tmp_path, kind):
    model = replaced([{"layers": [1], "num_heads": 4, "q_norm": True}], kind)
    expected = model(TOKENS)
    model.save_pretrained(tmp_path)
    for auto in (AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification):
        other = auto.from_pretrained(tmp_path).base_model
        assert torch.equal(other(TOKENS)[0], model.model(TOKENS)[0])
    built = AutoModelForCausalLM.from_config(model.config)
    assert [isinstance(layer.mlp, FlashMHF) for layer in built.model.layers] == [False, True, False]
    assert all(p.isfinite().all() and p.std() > 0 for n, p in built.named_parameters() if n.endswith("mlp.k"))
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(copied) is type(model)
        assert torch.equal(copied(TOKENS).logits, expected.logits)
    assert isinstance(model, type(make(kind)))
    assert model.config.model_type == kind.model_type
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == model.config.to_dict() | {"_name_or_path": str(tmp_path)}


def test_other_models_with_the_same_configuration_object_stay_as_they_are(tmp_path):
    config = LlamaConfig(**SIZES)
    model, other = LlamaForCausalLM(config), LlamaForCausalLM(config).eval()
    replace_ffn(model, num_heads=4)
    assert type(config) is LlamaConfig
    other.save_pretrained(tmp_path)
    assert torch.equal(LlamaForCausalLM.from_pretrained(tmp_path)(TOKENS).logits, other(TOKENS).logits)
    model.set_attn_implementation("eager")
    assert model.model.layers[0].self_attn.config._attn_implementation == "eager"


def test_a_model_whose_backbone_was_given_is_loaded(tmp_path):
    model = make().eval()
    replace_ffn(model.model, num_heads=4)
    model.save_pretrained(tmp_path)
    assert torch.equal(load_model(str(tmp_path))(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize("wrap", [nn.Sequential, with_adapter], ids=["Sequential", "PEFT"])
def test_a_wrapped_model_is_loaded(tmp_path, wrap):
    model = make().eval()
    wrapped = replace_ffn(wrap(model), num_heads=4, layers=[2])
    if hasattr(wrapped, "unload"):
        wrapped.unload()
    expected = model(TOKENS).logits
    model.save_pretrained(tmp_path)
    assert torch.equal(load_model(str(tmp_path))(TOKENS).logits, expected)


def test_a_class_that_does_not_know_the_layers_refuses_the_model(tmp_path):
    replaced([{"num_heads": 4}]).save_pretrained(tmp_path)
    for known in (LlamaForCausalLM, LlamaModel, Qwen3ForCausalLM):
        with pytest.raises(Exception, match="this model has FlashMHF layers: import flashmhf"):
            known.from_pretrained(tmp_path)


def test_a_model_that_no_auto_class_knows_is_not_saved(tmp_path):
    class OwnConfig(LlamaConfig):
        model_type = "own"

    class Own(LlamaForCausalLM):
        config_class = OwnConfig

    model = replace_ffn(Own(OwnConfig(**SIZES)), num_heads=4)
    with pytest.raises(ValueError, match=r"model: expected a type that AutoConfig knows, .*, got OwnConfig"):
        model.save_pretrained(tmp_path)
    assert copy.deepcopy(model)(TOKENS).logits.isfinite().all()


DAMAGED = {
    "original_model_type: expected one that transformers knows, got 'nothing'": {"original_model_type": "nothing"},
    "original_model_type: .*, got 'llama'": {"original": 3},
    "replaced_ffn: expected FlashMHF layers of this model, got layers.9": {"replaced_ffn": {"layers.9": {}}},
    "replaced_ffn: expected FlashMHF layers of this model, got layers.0": {"replaced_ffn": {"layers.0": {"what": 1}}},
    "replaced_ffn: expected the arguments of FlashMHF layers by name, got 'all'": {"replaced_ffn": "all"},
}


@pytest.mark.parametrize("message", DAMAGED)
def test_damaged_configurations_are_refused_in_one_line(tmp_path, message):
    replaced([{"num_heads": 4}]).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | DAMAGED[message]))
    with pytest.raises(InputError, match=message):
        load_model(str(tmp_path))


@pytest.mark.slow
def test_a_replaced_model_is_trained_resumed_and_scored(tmp_path, corpus_folder):
    model = replace_ffn(AutoModelForCausalLM.from_config(LlamaConfig(**SIZES | {"vocab_size": 320})), layers=[1])
    model.save_pretrained(tmp_path / "model")
    load_tokenizer("bytes").save_pretrained(tmp_path / "model")
    data = DataConfig(
        source=str(corpus_folder), context_length=32, validation_tokens=64, tokenizer=str(tmp_path / "model")
    )
    run = TrainConfig(model=str(tmp_path / "model"), data=data)
    flags = ["--max-steps", "4", "--save-steps", "2", "--report-to", "none", "--disable-tqdm", "true"]
    train(run, parse_arguments(flags, str(tmp_path / "run")))
    resumed = Path(shutil.copytree(tmp_path / "run", tmp_path / "resumed"))
    shutil.rmtree(resumed / "checkpoint-4")
    (resumed / "result.json").unlink()
    train(run, parse_arguments(flags, str(resumed)), resume=True)
    found, expected = (load_model(str(folder)) for folder in (resumed, tmp_path / "run"))
    assert isinstance(found.model.layers[1].mlp, FlashMHF)
    assert all(torch.equal(p, q) for p, q in zip(found.parameters(), expected.parameters(), strict=True))


def test_errors_leave_the_model_unchanged():
    model = make()
    with pytest.raises(ValueError, match="layers: expected 0 to 2, got 3"):
        replace_ffn(model, layers=[0, 3])
    quantised = make()
    quantised.model.layers[0].mlp.gate_proj.weight = nn.Parameter(
        torch.zeros(2, dtype=torch.uint8), requires_grad=False
    )
    with pytest.raises(ValueError, match=r"model: expected .* of floating-point numbers, got torch\.uint8"):
        replace_ffn(quantised)
    with pytest.raises(ValueError, match="hidden_size: expected a multiple of num_heads 5, got 64"):
        replace_ffn(model, num_heads=5)
    assert not any(isinstance(module, FlashMHF) for module in model.modules())
    with pytest.raises(
        ValueError, match="model: expected layers with an mlp of gate_proj, up_proj, down_proj, got Linear"
    ):
        replace_ffn(torch.nn.Linear(3, 3))
