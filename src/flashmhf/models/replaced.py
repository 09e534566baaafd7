"""Models some of whose feed-forward layers were replaced: their configuration records it, so they can be loaded again.

Such a model gets a subclass of its class that puts the layers back when it is built, and its configuration one that
writes a config.json of another `model_type`. transformers without this package, or with the original class, refuses
that file; it would otherwise fill the missing feed-forward layers with random numbers.
"""

import copy
import functools
import json
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import _LazyAutoMapping
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from flashmhf.layers import FlashMHF

MODEL_TYPE = "flashmhf_replaced"
# In the place of a number that every other configuration checks; the message of the error shows it.
REFUSAL = "this model has FlashMHF layers: import flashmhf and load it with an Auto class of transformers"
ARGUMENTS = (  # of FlashMHF, which it keeps as attributes
    *("hidden_size", "num_heads", "num_subnetworks", "subnetwork_size", "num_kv_heads", "gate_type", "init"),
    *("score_scale", "gate_scale", "output_scale", "recompute_q", "backend"),
)


class ReplacedConfig(PreTrainedConfig):
    """What AutoConfig finds for `flashmhf_replaced`; builds the configuration of the original type, with the layers."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        original = str(config_dict.get("original_model_type"))
        if original not in CONFIG_MAPPING or not isinstance(config_dict.get("original"), dict):
            raise ValueError(f"original_model_type: expected one that transformers knows, got {original!r}")
        layers = config_dict.get("replaced_ffn")
        if not isinstance(layers, dict) or not all(isinstance(arguments, dict) for arguments in layers.values()):
            raise ValueError(f"replaced_ffn: expected the arguments of FlashMHF layers by name, got {layers!r}")
        return replaced_config(CONFIG_MAPPING[original]).from_dict(config_dict, **kwargs)  # type: ignore[arg-type]


class _RecordsLayers:
    """Mixed into a configuration; `replaced_ffn` has the arguments of each new layer, by its decoder layer's name."""

    replaced_ffn: dict[str, dict[str, Any]] | None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        if config_dict.get("model_type") == MODEL_TYPE:
            config_dict = {**config_dict["original"], "replaced_ffn": config_dict["replaced_ffn"]}
        return super().from_dict(config_dict, **kwargs)  # type: ignore[misc]

    def to_json_string(self, *args: Any, **kwargs: Any) -> str:
        original = json.loads(super().to_json_string(*args, **kwargs))  # type: ignore[misc]
        written = {
            "model_type": MODEL_TYPE,
            "hidden_size": REFUSAL,
            "original_model_type": original.pop("model_type"),
            "replaced_ffn": original.pop("replaced_ffn"),
            "original": original,  # without its model_type, by which transformers would find it in here
        }
        return json.dumps(written, indent=2, sort_keys=True) + "\n"

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        (original,) = type(self).__bases__[1:]
        known: Any = original
        if known.model_type not in CONFIG_MAPPING or CONFIG_MAPPING[known.model_type] is not original:
            raise ValueError(
                f"model: expected a type that AutoConfig knows, to save replaced layers, got {original.__name__}"
            )
        super().save_pretrained(*args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _new, (replaced_config, type(self).__bases__[1]), self.__dict__.copy()


class _HasReplacedLayers:
    """Mixed into a model."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        put_layers(self, config.replaced_ffn or {})

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        super()._initialize_weights(module, is_custom_code=False)  # type: ignore[misc]  # as in FlashMHFPreTrainedModel

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, FlashMHF):
            module.reset_parameters()
        else:
            super()._init_weights(module)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _new, (replaced_model, type(self).__bases__[1]), self.__getstate__()


def record_layers(model: PreTrainedModel, owners: list[nn.Module]) -> None:
    """Records the FlashMHF layers that decoder layers have as `mlp` in the model's configuration, in place.

    The configuration of a model with a head is copied before, since the caller's other models may share it; that of a
    backbone alone is shared with its head.
    """
    if not owners:
        return
    names = {id(module): name for name, module in model.base_model.named_modules()}
    layers = {names[id(owner)]: _arguments(owner.mlp) for owner in owners}  # type: ignore[arg-type]
    if isinstance(model.config, _RecordsLayers):
        layers = {**(model.config.replaced_ffn or {}), **layers}
    elif model.base_model is not model:
        _copy_config(model)
    config: Any = model.config
    if not isinstance(config, _RecordsLayers):
        config.__class__ = replaced_config(type(config))  # type: ignore[arg-type]
    config.replaced_ffn = layers
    if not isinstance(model, _HasReplacedLayers):
        model.__class__ = replaced_model(type(model))  # type: ignore[arg-type]


def put_layers(model: Any, layers: dict[str, dict[str, Any]]) -> None:
    """Replaces the `mlp` of decoder layers by new FlashMHF layers with these arguments.

    Raises:
        ValueError: there is no such decoder layer, or the arguments are not those of FlashMHF.
    """
    for name, arguments in layers.items():
        try:
            owner = model.base_model.get_submodule(name)
            if not isinstance(owner.mlp, FlashMHF):  # a backbone within the model has put it there
                weight = owner.mlp.gate_proj.weight
                owner.mlp = FlashMHF(**arguments, device=weight.device, dtype=weight.dtype)
        except (AttributeError, TypeError) as error:
            raise ValueError(f"replaced_ffn: expected FlashMHF layers of this model, got {name}: {error}") from error


@functools.cache
def replaced_config(original: Any) -> Any:
    """The subclass of a configuration class that records layers, known to the Auto classes."""
    made = _config_class(original)
    autos: list[Any] = [value for value in vars(modeling_auto).values() if isinstance(value, type)]
    for auto in autos:
        mapping = getattr(auto, "_model_mapping", None)
        if isinstance(mapping, _LazyAutoMapping) and original in mapping:
            model = mapping[original]
            if getattr(model, "config_class", None) is original:  # neither a choice of several nor shared with others
                auto.register(made, replaced_model(model), exist_ok=True)
    return made


@functools.cache
def replaced_model(original: Any) -> Any:
    """The subclass of a model class that puts recorded layers back; it has the same name."""
    namespace = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "config_class": _config_class(original.config_class),
    }
    return type(original.__name__, (_HasReplacedLayers, original), namespace)


@functools.cache
def _config_class(original: Any) -> Any:
    namespace = {"__module__": __name__, "__annotations__": {"replaced_ffn": dict | None}, "replaced_ffn": None}
    return type(f"Replaced{original.__name__}", (_RecordsLayers, original), namespace)


def _arguments(layer: FlashMHF) -> dict[str, Any]:
    """With which FlashMHF builds such a layer."""
    return {name: getattr(layer, name) for name in ARGUMENTS} | {
        "q_norm": layer.q_norm is not None,
        "norm_eps": 1e-6 if layer.q_norm is None else layer.q_norm.eps,
        "projections": layer.in_proj is not None,
        "bias": layer.in_proj is not None and layer.in_proj.bias is not None,
    }


def _copy_config(model: PreTrainedModel) -> None:
    """Gives a model, and every module in it, copies of the configurations that they share with others."""
    copies: dict[int, Any] = {}
    copy.deepcopy(model.config, copies)
    for module in model.modules():
        shared = getattr(module, "config", None)
        if id(shared) in copies:
            module.config = copies[id(shared)]


def _new(subclass: Any, original: type) -> Any:
    """For pickle and copy, which cannot find the subclass by its name."""
    made = subclass(original)
    return made.__new__(made)
