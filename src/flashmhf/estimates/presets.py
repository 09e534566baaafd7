"""The sizes of the presets."""

from dataclasses import dataclass

from flashmhf.estimates.cost import count_parameters
from flashmhf.models import FlashMHFConfig, preset_names


@dataclass(frozen=True, kw_only=True)
class PresetSize:
    """A preset's sizes; num_heads, num_subnetworks and subnetwork_size are the feed-forward layer's, with None for what
    it does not have."""

    parameters: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    num_heads: int | None
    num_subnetworks: int | None
    subnetwork_size: int | None


def preset_sizes() -> dict[str, PresetSize]:
    """Of every preset, by name."""
    return {name: _size(FlashMHFConfig.from_preset(name)) for name in preset_names()}


def _size(config: FlashMHFConfig) -> PresetSize:
    several_heads = config.ffn_type in ("flashmhf", "mhffn", "pkv")
    several_networks = config.ffn_type in ("flashmhf", "dense_moe")
    return PresetSize(
        parameters=count_parameters(config),
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        num_heads=config.ffn_heads[0] if several_heads else None,
        num_subnetworks=config.num_subnetworks if several_networks else None,
        subnetwork_size=config.subnetwork_size if several_networks else None,
    )
