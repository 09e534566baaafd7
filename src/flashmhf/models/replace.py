"""Replaces the feed-forward layers of an existing model, for fine-tuning studies."""

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedModel

from flashmhf.layers import FlashMHF
from flashmhf.models.replaced import record_layers

Model = TypeVar("Model", bound=nn.Module)

SWIGLU_PARTS = ("gate_proj", "up_proj", "down_proj")


def replace_ffn(
    model: Model,
    *,
    layers: Iterable[int] | None = None,
    **options: Any,
) -> Model:
    """Replaces SwiGLU layers of a Llama-like model (Llama, Mistral, Qwen) with new FlashMHF layers, in place.

    The new layers are freshly initialised, on the device and in the dtype of the old ones. The configuration of a
    transformers model records them: after `save_pretrained`, an Auto class's `from_pretrained` loads the model in any
    process that has imported flashmhf. Pass the complete model, not a part of it.

    Args:
        model: any module whose decoder layers have an `mlp` with gate_proj, up_proj and down_proj.
        layers: indices of the layers to replace, in the model's order. Default: all.
        options: of `FlashMHF.like_swiglu`, which chooses sizes of equal parameters: num_heads, num_subnetworks,
            subnetwork_size, gate_type, q_norm, init and the others.

    Returns:
        The same model.

    Raises:
        ValueError: the model has no such layer, or an invalid argument.
    """
    owners = _swiglu_owners(model, None if layers is None else list(layers))
    new = [_like(owner.mlp, options) for owner in owners]
    for owner, ffn in zip(owners, new, strict=True):
        ffn.train(owner.mlp.training)
        owner.mlp = ffn
    for inner in _transformers_models(model):
        contained = {id(module) for module in inner.modules()}
        record_layers(inner, [owner for owner in owners if id(owner) in contained])
    return model


def _transformers_models(module: nn.Module) -> Iterator[PreTrainedModel]:
    """The module itself, or those that it wraps, as PEFT does."""
    if isinstance(module, PreTrainedModel):
        yield module
    else:
        for child in module.children():
            yield from _transformers_models(child)


def _swiglu_owners(model: nn.Module, layers: list[int] | None) -> list[Any]:
    """The chosen modules among those that have a SwiGLU layer as `mlp`."""
    owners: list[Any] = [module for module in model.modules() if _is_swiglu(getattr(module, "mlp", None))]
    if not owners:
        raise ValueError(f"model: expected layers with an mlp of {', '.join(SWIGLU_PARTS)}, got {type(model).__name__}")
    for index in layers or ():
        if not 0 <= index < len(owners):
            raise ValueError(f"layers: expected 0 to {len(owners) - 1}, got {index}")
    return owners if layers is None else [owners[index] for index in dict.fromkeys(layers)]


def _is_swiglu(module: Any) -> bool:
    return isinstance(module, nn.Module) and all(isinstance(getattr(module, n, None), nn.Linear) for n in SWIGLU_PARTS)


def _like(old: Any, options: dict[str, Any]) -> FlashMHF:
    """A FlashMHF layer for the place of a SwiGLU layer."""
    weight = old.gate_proj.weight
    if not weight.is_floating_point():
        raise ValueError(f"model: expected feed-forward layers of floating-point numbers, got {weight.dtype}")
    intermediate_size, hidden_size = weight.shape
    return FlashMHF.like_swiglu(hidden_size, intermediate_size, device=weight.device, dtype=weight.dtype, **options)
