"""The FlashMHF model family: transformers' Llama with another feed-forward layer.

Attention (Llama's, or with `qk_norm` Qwen3's), embeddings, rotary positions, KV cache, generation and the task heads
are transformers' own classes.
"""

from typing import Any

from torch import nn
from transformers.generation import GenerationMixin
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from flashmhf.layers import MHFFN, PKV, DenseMoE, FlashMHF, SwiGLU
from flashmhf.models.configuration import FlashMHFConfig


def build_ffn(config: FlashMHFConfig) -> nn.Module:
    """The feed-forward layer that a configuration describes."""
    common: dict[str, Any] = {"bias": config.mlp_bias, "init": config.init}
    if config.ffn_type == "swiglu":
        return SwiGLU(config.hidden_size, config.intermediate_size, **common)
    if config.ffn_type == "pkv":
        return PKV(config.hidden_size, config.ffn_heads[0], config.intermediate_size, **common)
    H, H_kv = config.ffn_heads
    options: dict[str, Any] = {
        **common,
        "score_scale": config.score_scale,
        "gate_scale": config.gate_scale,
        "output_scale": config.output_scale,
        "recompute_q": config.recompute_q,
        "backend": config.backend,
    }
    if config.ffn_type == "dense_moe":
        options |= {"gate_type": config.gate_type}
        return DenseMoE(config.hidden_size, config.num_subnetworks, config.subnetwork_size, **options)
    options |= {
        "num_kv_heads": H_kv,
        "q_norm": config.q_norm,
        "norm_eps": config.rms_norm_eps,
        "projections": config.ffn_projections,
    }
    if config.ffn_type == "mhffn":
        return MHFFN(config.hidden_size, H, config.intermediate_size, **options)
    return FlashMHF(
        config.hidden_size,
        H,
        config.num_subnetworks,
        config.subnetwork_size,
        gate_type=config.gate_type,
        **options,
    )


class FlashMHFDecoderLayer(LlamaDecoderLayer):
    def __init__(self, config: FlashMHFConfig, layer_idx: int) -> None:
        GradientCheckpointingLayer.__init__(self)  # not Llama's, which would build an MLP first
        self.hidden_size = config.hidden_size
        attention = Qwen3Attention if config.qk_norm else LlamaAttention
        self.self_attn = attention(config, layer_idx)  # type: ignore[assignment, arg-type]
        self.mlp = build_ffn(config)  # type: ignore[assignment]
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if not config.ffn_norm:
            self.post_attention_layernorm = nn.Identity()  # type: ignore[assignment]


class FlashMHFPreTrainedModel(LlamaPreTrainedModel):
    config: FlashMHFConfig
    config_class = FlashMHFConfig
    _no_split_modules = ["FlashMHFDecoderLayer"]
    _can_record_outputs = {"hidden_states": FlashMHFDecoderLayer, "attentions": [LlamaAttention, Qwen3Attention]}

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # transformers' shortcut for custom code would skip a layer whose parameters are all in Linear modules. These
        # layers initialise through torch.nn.init, which transformers guards, so they do not need the shortcut.
        super()._initialize_weights(module, is_custom_code=False)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (FlashMHF, PKV, SwiGLU)):
            module.reset_parameters()  # runs after the layer's Linear modules; does not touch loaded tensors
        else:
            super()._init_weights(module)


class FlashMHFModel(FlashMHFPreTrainedModel, LlamaModel):
    """The backbone: token ids to hidden states. See `transformers.LlamaModel`."""

    def __init__(self, config: FlashMHFConfig) -> None:
        FlashMHFPreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(FlashMHFDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class FlashMHFForCausalLM(FlashMHFPreTrainedModel, LlamaForCausalLM, GenerationMixin):
    """The language model, with KV cache and `generate`. See `transformers.LlamaForCausalLM`."""

    def __init__(self, config: FlashMHFConfig) -> None:
        FlashMHFPreTrainedModel.__init__(self, config)
        self.model = FlashMHFModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class FlashMHFForSequenceClassification(GenericForSequenceClassification, FlashMHFPreTrainedModel):
    """The backbone with a linear head on each sequence's last token."""


class FlashMHFForTokenClassification(GenericForTokenClassification, FlashMHFPreTrainedModel):
    """The backbone with a linear head on every token."""


class FlashMHFForQuestionAnswering(GenericForQuestionAnswering, FlashMHFPreTrainedModel):
    """The backbone with a linear head for the start and the end of a span."""
