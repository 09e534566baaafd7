"""Every value of a configuration changes the model or is refused; what transformers writes loads again."""

import json
from dataclasses import fields
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaConfig

from flashmhf.errors import InputError
from flashmhf.models import FlashMHFConfig, FlashMHFForCausalLM, FlashMHFForSequenceClassification
from flashmhf.models.config_checks import USED_BY
from flashmhf.models.loading import load_config, load_model
from tiny import tiny_model

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_subnetworks": 3,
    "num_ffn_heads": 4,
    "gate_type": "sigmoid",
    "q_norm": True,
    "pad_token_id": 3,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
}
CHANGED: dict[str, Any] = {  # a value of every field that describes another model
    "vocab_size": 65,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 32,
    "initializer_range": 0.5,
    "rms_norm_eps": 0.1,
    "use_cache": False,
    "pad_token_id": 4,
    "bos_token_id": 5,
    "eos_token_id": 6,
    "tie_word_embeddings": True,
    "attention_bias": True,
    "attention_dropout": 0.9,
    "mlp_bias": True,
    "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0},
    "output_hidden_states": True,
    "dtype": "bfloat16",
    "id2label": {"0": "a", "1": "b", "2": "c"},
    "problem_type": "regression",
    "ffn_type": "mhffn",
    "num_subnetworks": 1,
    "num_ffn_heads": 2,
    "num_ffn_kv_heads": 2,
    "gate_type": "softmax",
    "q_norm": False,
    "qk_norm": True,
    "ffn_projections": False,
    "ffn_norm": False,
    "score_scale": 2.0,
    "gate_scale": 2.0,
    "output_scale": 2.0,
    "recompute_q": True,
    "init": "scaled",
    "backend": "reference",
}
NOTES = {"transformers_version", "architectures", "label2id", "reference_config"}  # describe the file, not the model
REFUSED: dict[str, Any] = {
    "hidden_act": "gelu",
    "pretraining_tp": 2,
    "chunk_size_feed_forward": 4,
    "return_dict": False,
    "is_encoder_decoder": True,
}


def effects(**changes: Any) -> str:
    """Everything about a model that a value could change, as text."""
    values = {**SIZES, **changes}
    if changes.get("ffn_type") == "mhffn":
        values.pop("gate_type")
    if "num_attention_heads" in changes:
        values["num_ffn_heads"] = 4
    torch.manual_seed(0)
    model = FlashMHFForCausalLM._from_config(FlashMHFConfig(**values))
    tokens = torch.arange(3, 19)[None]
    with torch.no_grad():
        output = model.eval()(tokens)
        torch.manual_seed(0)
        dropped = model.train()(tokens)
    layer = model.model.layers[0].mlp
    head = FlashMHFForSequenceClassification(FlashMHFConfig(**values))
    found = [type(output), list(output) if isinstance(output, dict) else None, output[0].sum().item()]
    found += [dropped[0].sum().item(), repr(model), layer.recompute_q, layer.backend, layer.score_scale]
    found += [{name: (t.shape, t.dtype, t.sum().item()) for name, t in model.state_dict().items()}]
    found += [model.generation_config.to_dict(), model.model.rotary_emb.max_seq_len_cached]
    return str([*found, head.score.out_features, head.config.problem_type])


def test_every_field_is_in_one_of_the_tables():
    names = {field.name for field in fields(FlashMHFConfig)}
    assert names == CHANGED.keys() | NOTES | REFUSED.keys()
    assert {field.name for field in fields(LlamaConfig)} < names


def test_effects_are_the_same_for_the_same_values():
    assert effects() == effects()


@pytest.mark.parametrize("name", CHANGED)
def test_every_value_changes_the_model(name):
    assert effects(**{name: CHANGED[name]}) != effects()


@pytest.mark.parametrize("name", REFUSED)
def test_values_without_effect_are_refused(name):
    with pytest.raises(ValueError, match=f"{name}: expected .*, all that this model has, got {REFUSED[name]!r}"):
        FlashMHFConfig(**{**SIZES, name: REFUSED[name]})


UNKNOWN = {
    "num_heads": "num_heads: expected a field of FlashMHFConfig, got an unknown one; did you mean num_ffn_heads?",
    "num_subnetwork": "num_subnetwork: .* did you mean num_subnetworks?",
    "intermediat_size": "intermediat_size: .* did you mean intermediate_size?",
    "gate_typ": "gate_typ: .* did you mean gate_type?",
    "qnorm": "qnorm: .* did you mean q_norm?",
    "activation": "activation: expected a field of FlashMHFConfig, got an unknown one",
    "sliding_window": "sliding_window: expected a field",
    "layer_types": "layer_types: expected a field",
    "to_dict": "to_dict: expected a field",
    "save_pretrained": "save_pretrained: expected a field",
    "_auto_class": "_auto_class: expected a field",
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_names_are_refused_everywhere(tmp_path, name):
    message = UNKNOWN[name].replace("?", r"\?")
    with pytest.raises(ValueError, match=message):
        FlashMHFConfig(**{name: 4})
    with pytest.raises(ValueError, match=message):
        FlashMHFConfig.from_preset("flashmhf-tiny", **{name: 4})
    values = FlashMHFConfig(**SIZES).to_dict() | {name: 4}
    (tmp_path / "config.json").write_text(json.dumps(values))
    for load in (FlashMHFConfig.from_pretrained, AutoConfig.from_pretrained):
        with pytest.raises(ValueError, match=message):
            load(tmp_path)
    for source in (tmp_path, tmp_path / "config.json"):
        with pytest.raises(InputError, match=f"config.json: {message}"):
            load_config(str(source))


UNUSED = {
    "mlp_bias": True,
    "gate_type": "softmax",
    "gate_scale": 7.0,
    "q_norm": True,
    "ffn_projections": False,
    "score_scale": 7.0,
    "output_scale": 7.0,
    "recompute_q": True,
}


@pytest.mark.parametrize("ffn_type", ["flashmhf", "mhffn", "pkv", "dense_moe", "swiglu"])
@pytest.mark.parametrize("name", UNUSED)
def test_fields_of_other_layers_are_refused(name, ffn_type):
    values = {"ffn_type": ffn_type, name: UNUSED[name]}
    if ffn_type in USED_BY[name] or (name, ffn_type) == ("ffn_projections", "dense_moe"):  # which has none
        assert getattr(FlashMHFConfig(**values), name) == UNUSED[name]
        return
    with pytest.raises(ValueError, match=f"{name}: expected .*, since ffn_type {ffn_type} does not use it, got"):
        FlashMHFConfig(**values)
    saved = FlashMHFConfig(ffn_type=ffn_type).to_dict() | values  # as earlier versions saved it
    assert FlashMHFConfig(**saved).to_dict() == FlashMHFConfig(ffn_type=ffn_type).to_dict()


def test_a_preset_with_another_layer_leaves_out_what_that_does_not_use():
    config = FlashMHFConfig.from_preset("flashmhf-tiny", ffn_type="swiglu")
    assert (config.ffn_type, config.q_norm) == ("swiglu", False)
    with pytest.raises(ValueError, match="q_norm: expected False, since ffn_type swiglu does not use it, got True"):
        FlashMHFConfig.from_preset("flashmhf-tiny", ffn_type="swiglu", q_norm=True)


def test_biases_without_projections_are_refused():
    with pytest.raises(ValueError, match="mlp_bias: expected False, since ffn_type flashmhf does not use it"):
        FlashMHFConfig(ffn_projections=False, mlp_bias=True)


def test_a_gate_scale_without_a_gate_is_refused():
    with pytest.raises(ValueError, match="gate_scale: expected None"):
        FlashMHFConfig(gate_type=None, gate_scale=2.0)


WRITTEN: dict[str, Any] = {  # into config.json by versions of transformers, by Trainer, quantizers and the Hub
    "_name_or_path": "a/b",
    "transformers_version": "4.45.2",
    "torch_dtype": "bfloat16",
    "model_type": "flashmhf",
    "architectures": ["FlashMHFForCausalLM"],
    "id2label": {"0": "no", "1": "yes"},
    "label2id": {"no": 0, "yes": 1},
    "problem_type": "single_label_classification",
    "use_cache": False,
    "output_attentions": False,
    "rope_theta": 500.0,
    "rope_scaling": None,
    "_attn_implementation_autoset": True,
    "attn_implementation": None,
    "temperature": 0.7,
    "top_k": 5,
    "max_length": 20,
    "do_sample": True,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "tokenizer_class": "PreTrainedTokenizerFast",
    "pretraining_tp": 1,
    "hidden_act": "silu",
    "num_labels": 2,
    "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "return_dict": True,
    "auto_map": {"AutoConfig": "configuration_flashmhf.FlashMHFConfig"},
    "gate": "softmax",
    "reference_config": None,
    "chunk_size_feed_forward": 0,
    "is_encoder_decoder": False,
    "_commit_hash": None,
    "per_layer_config": None,
}


BOOKKEEPING = {"_name_or_path": None, "label2id": None}  # transformers drops label2id where id2label is the default


@pytest.mark.parametrize("name", WRITTEN)
def test_what_transformers_writes_loads(tmp_path, name):
    values = FlashMHFConfig(**SIZES).to_dict() | {name: WRITTEN[name]}
    (tmp_path / "config.json").write_text(json.dumps(values))
    for load in (FlashMHFConfig.from_pretrained, AutoConfig.from_pretrained, lambda folder: load_config(str(folder))):
        load(tmp_path).save_pretrained(tmp_path / "again")
        again = load(tmp_path / "again").to_dict()
        assert {**again, **BOOKKEEPING} == {**load(tmp_path).to_dict(), **BOOKKEEPING}
    load_config(str(tmp_path / "config.json"))


def test_everything_at_once():
    config = FlashMHFConfig(**{**SIZES, **WRITTEN})
    assert (config.gate_type, config.rope_parameters["rope_theta"]) == ("softmax", 100.0)
    assert FlashMHFConfig(**config.to_dict()).to_dict() == config.to_dict()


def test_what_trainer_and_peft_leave_loads(tmp_path):
    from transformers import Trainer, TrainingArguments

    peft = pytest.importorskip("peft")
    model = tiny_model()
    rows = [{"input_ids": list(range(8)), "labels": list(range(8))}] * 2
    arguments = TrainingArguments(str(tmp_path / "run"), max_steps=1, report_to=[], save_strategy="no", use_cpu=True)
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    trainer.save_model(str(tmp_path / "trained"))
    load_model(str(tmp_path / "trained"))
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapted.save_pretrained(tmp_path / "adapter")
    merged = adapted.merge_and_unload()
    merged.resize_token_embeddings(384)
    merged.save_pretrained(tmp_path / "merged")
    assert load_model(str(tmp_path / "merged")).config.vocab_size == 384
    with pytest.raises(InputError, match=r"config\.json"):
        load_model(str(tmp_path / "adapter"))
