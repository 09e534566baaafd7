"""The model family through transformers' interfaces."""

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from flashmhf.data.tokenizer import byte_tokenizer
from flashmhf.models import (
    FlashMHFConfig,
    FlashMHFForCausalLM,
    FlashMHFForQuestionAnswering,
    FlashMHFForSequenceClassification,
    FlashMHFForTokenClassification,
    FlashMHFModel,
)
from flashmhf.models.configuration import FFN_TYPES

SIZES = {
    "vocab_size": 90,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_ffn_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def make_config(ffn_type: str = "flashmhf", **values) -> FlashMHFConfig:
    subnetworks = 3 if ffn_type in ("flashmhf", "dense_moe") else 1
    return FlashMHFConfig(**{**SIZES, "ffn_type": ffn_type, "num_subnetworks": subnetworks, "init": "scaled", **values})


@pytest.fixture(params=FFN_TYPES)
def model(request) -> FlashMHFForCausalLM:
    return FlashMHFForCausalLM(make_config(request.param)).eval()


def ids(*size: int) -> torch.Tensor:
    return torch.randint(1, 90, size)


def test_training_step_reaches_every_parameter(model):
    tokens = ids(2, 10)
    model.train()
    model(tokens, labels=tokens).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_cached_generation_is_the_same_as_uncached(model):
    prompt, mask = ids(2, 5), torch.ones(2, 5, dtype=torch.int64)
    settings = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    cached = model.generate(prompt, **settings)
    assert torch.equal(cached, model.generate(prompt, use_cache=False, **settings))


def test_save_and_load_through_the_auto_classes(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(loaded, FlashMHFForCausalLM)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    tokens = ids(2, 6)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == loaded.config.to_dict()
    assert isinstance(AutoModel.from_pretrained(tmp_path), FlashMHFModel)


@pytest.mark.parametrize(
    ("auto", "kind", "labels"),
    [
        (AutoModelForSequenceClassification, FlashMHFForSequenceClassification, {"labels": torch.tensor([0, 1])}),
        (AutoModelForTokenClassification, FlashMHFForTokenClassification, {"labels": torch.zeros(2, 6).long()}),
        (
            AutoModelForQuestionAnswering,
            FlashMHFForQuestionAnswering,
            {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])},
        ),
    ],
)
def test_task_heads(auto, kind, labels, tmp_path):
    backbone = FlashMHFForCausalLM(make_config())
    backbone.save_pretrained(tmp_path)
    model = auto.from_pretrained(tmp_path)
    assert isinstance(model, kind)
    loaded = dict(model.named_parameters())["model.layers.1.mlp.k"]
    assert torch.equal(loaded, backbone.model.layers[1].mlp.k)
    loss = model(ids(2, 6), **labels).loss
    loss.backward()
    assert loss.isfinite()
    model.save_pretrained(tmp_path / "head")
    assert not auto.from_pretrained(tmp_path / "head", output_loading_info=True)[1]["missing_keys"]


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant):
    model = FlashMHFForCausalLM(make_config())
    tokens = ids(2, 10)

    def grads() -> list[torch.Tensor]:
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    plain = grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.testing.assert_close(grads(), plain)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_implementations_agree(attention):
    torch.manual_seed(0)
    config = make_config()
    model = FlashMHFForCausalLM(config).eval()
    tokens = ids(2, 12)
    model.set_attn_implementation(attention)
    expected = FlashMHFForCausalLM(config).eval()
    expected.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(tokens).logits, expected(tokens).logits, rtol=1e-4, atol=1e-5)
    assert FlashMHFForCausalLM._supports_flash_attn


def test_padding_on_the_left_changes_nothing():
    model = FlashMHFForCausalLM(make_config()).eval()
    tokens = ids(1, 6)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), tokens], 1)
    mask = torch.tensor([[0] * 3 + [1] * 6])
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    logits = model(padded, attention_mask=mask, position_ids=positions).logits[:, 3:]
    torch.testing.assert_close(logits, model(tokens).logits, rtol=1e-4, atol=1e-5)


def test_compile_full_graph(model):
    torch._dynamo.reset()
    tokens = ids(2, 8)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens, use_cache=False).logits, model(tokens).logits)


def test_bfloat16(model):
    tokens = ids(2, 8)
    exact = model(tokens).logits
    rounded = model.to(torch.bfloat16)(tokens).logits
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() < 0.05 * exact.norm()


def test_swiglu_is_llama():
    """Same tensor names and the same function as transformers' Llama: checkpoints are interchangeable."""
    config = make_config("swiglu")
    ours = FlashMHFForCausalLM(config).eval()
    names = set(LlamaConfig().to_dict())
    llama = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in config.to_dict().items() if k in names})).eval()
    llama.load_state_dict(ours.state_dict())
    tokens = ids(2, 8)
    assert torch.equal(llama(tokens).logits, ours(tokens).logits)


@pytest.mark.parametrize("ffn_type", FFN_TYPES)
def test_layers_in_a_model_are_initialised_by_their_own_scheme(ffn_type):
    """transformers initialises the same modules; ours must come last."""
    config = make_config(ffn_type, hidden_size=256, intermediate_size=384)
    layer = FlashMHFForCausalLM(config).model.layers[1].mlp
    in_model = {name: p.std().item() for name, p in layer.named_parameters() if p.dim() > 1}
    layer.reset_parameters()
    alone = {name: p.std().item() for name, p in layer.named_parameters() if p.dim() > 1}
    assert in_model == pytest.approx(alone, rel=0.1)
    if ffn_type == "swiglu":
        assert in_model["down_proj.weight"] == pytest.approx(0.3 / 384**0.5, rel=0.1)  # not Llama's 0.02


def test_loading_leaves_loaded_tensors_alone_and_initialises_missing_ones(tmp_path):
    model = FlashMHFForCausalLM(make_config())
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    for name, tensor in model.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor), name
    assert loaded.score.weight.std() > 0


def test_without_the_norm_before_the_ffn():
    model = FlashMHFForCausalLM(make_config(ffn_norm=False))
    assert not any("post_attention_layernorm" in name for name in model.state_dict())
    model(ids(1, 4)).logits.sum().backward()


def test_options_reach_the_layer():
    config = make_config(
        num_ffn_kv_heads=1,
        gate_type="softmax",
        q_norm=True,
        mlp_bias=True,
        score_scale=3.0,
        output_scale=0.5,
        rms_norm_eps=1e-4,
    )
    layer = FlashMHFForCausalLM(config).model.layers[0].mlp
    assert (layer.num_kv_heads, layer.gate_type, layer.score_scale, layer.output_scale) == (1, "softmax", 3.0, 0.5)
    assert layer.q_norm.eps == 1e-4
    assert layer.in_proj.bias is not None


TASKS = {
    FlashMHFForCausalLM: ("CAUSAL_LM", "text-generation"),
    FlashMHFForSequenceClassification: ("SEQUENCE_CLASSIFICATION", "text-classification"),
    FlashMHFForTokenClassification: ("TOKEN_CLASSIFICATION", "token-classification"),
    FlashMHFForQuestionAnswering: ("QUESTION_ANSWERING", None),  # transformers 5 has no pipeline for it
}


@pytest.mark.parametrize("model_class", TASKS, ids=lambda model_class: model_class.__name__)
def test_every_head_is_in_the_tables_of_class_names(model_class):
    """Trainer's label smoothing and the pipelines know classes by their names."""
    from transformers import pipeline
    from transformers.models.auto import modeling_auto

    table, task = TASKS[model_class]
    names = getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES")
    assert names["flashmhf"] == model_class.__name__
    assert getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING")[FlashMHFConfig] is model_class
    if task is not None:
        model = model_class(make_config(vocab_size=320)).eval()
        options = {"max_new_tokens": 3} if task == "text-generation" else {}
        assert pipeline(task, model=model, tokenizer=byte_tokenizer())("hello", **options)
