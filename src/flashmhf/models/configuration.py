"""Configuration of the FlashMHF model family: a Llama backbone whose feed-forward layer is chosen by `ffn_type`."""

import json
import logging
from dataclasses import fields
from typing import Any, ClassVar

from transformers import LlamaConfig

from flashmhf.layers import INITS, Scales, default_scales
from flashmhf.models.config_checks import USED_BY, check_names, check_others, check_rope, check_values
from flashmhf.names import PRESETS, preset_names
from flashmhf.ops.backends import check_name
from flashmhf.ops.prologue import GATES

logger = logging.getLogger(__name__)

FFN_TYPES = ("flashmhf", "mhffn", "pkv", "dense_moe", "swiglu")


class FlashMHFConfig(LlamaConfig):
    """`transformers.LlamaConfig` with the options of the feed-forward layer.

    Names are those of `flashmhf.FlashMHF`, except where Llama has the same name for another thing: num_ffn_heads and
    num_ffn_kv_heads (the layer's num_heads and num_kv_heads), ffn_projections (projections), mlp_bias (bias),
    rms_norm_eps (norm_eps).

    Every value is used or refused: an unknown name, a value of LlamaConfig's that this model does not have (another
    activation than SiLU), and a value of a field that the chosen ffn_type does not use.

    Attributes:
        ffn_type: "flashmhf", "mhffn" (one sub-network, no gate), "dense_moe" (one head, no projections), "pkv"
            (attention over intermediate_size learned slots per head) or "swiglu".
        intermediate_size (int): d_ff: rows of K, U and V per head, E x F; slots of PKV; width of SwiGLU.
        num_subnetworks: E; intermediate_size is a multiple of it. For "flashmhf" and "dense_moe".
        subnetwork_size: F, in place of intermediate_size E x F, which is what is saved.
        num_ffn_heads: H of "flashmhf", "mhffn" and "pkv"; hidden_size is a multiple of it.
        num_ffn_kv_heads: heads with their own K, U, V. Default: num_ffn_heads.
        gate_type: "sigmoid", "softmax" or None. For "flashmhf" and "dense_moe".
        q_norm: RMSNorm on each head of the projected input. For "flashmhf" and "mhffn".
        qk_norm: RMSNorm on each head's queries and keys in attention, as in Qwen3.
        ffn_projections: False leaves out the layer's in_proj and out_proj. For "flashmhf" and "mhffn".
        ffn_norm: False leaves out the RMSNorm before the feed-forward layer.
        mlp_bias: biases in the layer's projections.
        score_scale: see `flashmhf.FlashMHF`. None is resolved here and saved as a number, so that a checkpoint keeps
            its meaning in later versions.
        gate_scale: as score_scale.
        output_scale: as score_scale.
        recompute_q: save less for the backward, see `flashmhf.FlashMHF`.
        init: "reference" or "scaled".
        backend: of the operator, see `flashmhf.flash_mhf`.
        reference_config: config.json of the reference checkpoint that this model was converted from, kept for the
            conversion back.

    Raises:
        ValueError: an invalid value; the message names it, what was expected and what was given.
    """

    model_type = "flashmhf"
    base_model_tp_plan: ClassVar[dict[str, str]] = {
        f"layers.*.self_attn.{name}": plan
        for name, plan in (("q_proj", "colwise"), ("k_proj", "colwise"), ("v_proj", "colwise"), ("o_proj", "rowwise"))
    }

    ffn_type: str = "flashmhf"
    num_subnetworks: int = 1
    num_ffn_heads: int | None = None
    num_ffn_kv_heads: int | None = None
    gate_type: str | None = "sigmoid"
    q_norm: bool = False
    qk_norm: bool = False
    ffn_projections: bool = True
    ffn_norm: bool = True
    score_scale: float | None = None
    gate_scale: float | None = None
    output_scale: float | None = None
    recompute_q: bool = False
    init: str = "reference"
    backend: str = "auto"
    reference_config: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if "gate" in kwargs:  # the former name of gate_type
            self.gate_type = kwargs.pop("gate")
        if kwargs.get("subnetwork_size") is not None:
            self._set_subnetwork_size(kwargs["subnetwork_size"])
        kwargs.pop("subnetwork_size", None)
        self._check(kwargs)
        if kwargs.pop("auto_map", None):
            logger.warning("auto_map is not used: code that comes with a model is never run")
        self._unused_fields_have_their_defaults()
        if self.num_ffn_heads is None:
            self.num_ffn_heads = self.num_attention_heads
        if self.num_ffn_kv_heads is None:
            self.num_ffn_kv_heads = self.num_ffn_heads
        self._check_multiples()
        scales = self._default_scales()
        self.score_scale = scales.score if self.score_scale is None else float(self.score_scale)
        self.gate_scale = scales.gate if self.gate_scale is None else float(self.gate_scale)
        self.output_scale = scales.output if self.output_scale is None else float(self.output_scale)
        super().__post_init__(**kwargs)
        if self.head_dim is not None and self.head_dim % 2 != 0:
            raise ValueError(f"head_dim: expected an even number for rotary positions, got {self.head_dim}")

    @property
    def ffn_heads(self) -> tuple[int, int]:
        """(H, H_kv) of the feed-forward layer."""
        assert self.num_ffn_heads is not None
        assert self.num_ffn_kv_heads is not None
        return self.num_ffn_heads, self.num_ffn_kv_heads

    @property
    def ffn_scales(self) -> Scales:
        """The scales of the feed-forward layer."""
        assert self.score_scale is not None
        assert self.gate_scale is not None
        assert self.output_scale is not None
        return Scales(self.score_scale, self.gate_scale, self.output_scale)

    @property
    def subnetwork_size(self) -> int:
        """F, the width of one sub-network."""
        return self.intermediate_size // self.num_subnetworks

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "FlashMHFConfig":
        """The preset `name`, one of `preset_names()`, with some values replaced.

        With another ffn_type, the preset's values of fields that it does not use are left out.

        Raises:
            ValueError: no such preset, or an invalid value.
        """
        if name not in preset_names():
            raise ValueError(f"preset: expected one of {', '.join(preset_names())}, got {name!r}")
        values = json.loads((PRESETS / f"{name}.json").read_text())
        if overrides.get("subnetwork_size") is not None:
            del values["intermediate_size"]
        ffn_type = overrides.get("ffn_type", values["ffn_type"])
        unused = {field for field, users in USED_BY.items() if ffn_type not in users}
        return cls(**{field: value for field, value in values.items() if field not in unused} | overrides)

    def _set_subnetwork_size(self, size: Any) -> None:
        if self.ffn_type not in USED_BY["gate_type"]:
            raise ValueError(f"subnetwork_size: expected none, since ffn_type {self.ffn_type} has no sub-networks")
        check_values({"subnetwork_size": size, "num_subnetworks": self.num_subnetworks})
        intermediate_size = size * self.num_subnetworks
        if self.intermediate_size not in (intermediate_size, type(self).intermediate_size):
            raise ValueError(
                f"subnetwork_size: expected none beside intermediate_size {self.intermediate_size}, or one that agrees "
                f"with it and num_subnetworks {self.num_subnetworks}, got {size}"
            )
        self.intermediate_size = intermediate_size

    def _check(self, others: dict[str, Any]) -> None:
        """Checks the fields and `others`, which are not fields."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        check_names(others, values)
        if others.pop("model_type", self.model_type) != self.model_type:
            raise ValueError("model_type: expected 'flashmhf', got another")
        for name, choices in (("ffn_type", FFN_TYPES), ("gate_type", (*GATES, None)), ("init", INITS)):
            if values[name] not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(map(str, choices))}, got {values[name]!r:.80}")
        check_name(self.backend)
        check_values(values | others)
        check_others(values | others)
        for parameters in (self.rope_parameters, others.get("rope_scaling"), {"rope_theta": others.get("rope_theta")}):
            check_rope(parameters)

    def _unused_fields_have_their_defaults(self) -> None:
        """Refuses other values of the fields that `ffn_type` does not use, except in what transformers has written:
        earlier versions saved them, and a comparison derives one ffn_type from another."""
        saved = self.transformers_version is not None
        defaults = {
            **{f"{name}_scale": scale for name, scale in self._default_scales()._asdict().items()},
            "gate_type": None,
            **({"ffn_projections": False} if self.ffn_type == "dense_moe" else {}),
        }
        for name, users in USED_BY.items():
            value, default = getattr(self, name), getattr(type(self), name)
            used = self.ffn_type in users and (name != "gate_scale" or self.gate_type is not None)
            used = used and (name != "mlp_bias" or self.ffn_projections or self.ffn_type in ("pkv", "swiglu"))
            if used or value in (default, defaults.get(name, default)):
                continue
            if not saved:
                raise ValueError(
                    f"{name}: expected {default!r}, since ffn_type {self.ffn_type} does not use it, got {value!r:.80}"
                )
            setattr(self, name, default)

    def _default_scales(self) -> Scales:
        heads = self.num_attention_heads if self.num_ffn_heads is None else self.num_ffn_heads
        gate_type = self.gate_type if self.ffn_type in USED_BY["gate_type"] else None
        return default_scales(self.init, 1 if self.ffn_type == "dense_moe" else heads, self.num_subnetworks, gate_type)

    def _check_multiples(self) -> None:
        for name, divisor_name in (
            ("intermediate_size", "num_subnetworks"),
            ("hidden_size", "num_attention_heads"),
            ("hidden_size", "num_ffn_heads"),
            ("num_ffn_heads", "num_ffn_kv_heads"),
            ("num_attention_heads", "num_key_value_heads"),
        ):
            value, divisor = getattr(self, name), getattr(self, divisor_name)
            if divisor is not None and value % divisor != 0:
                raise ValueError(f"{name}: expected a multiple of {divisor_name} {divisor}, got {value}")
