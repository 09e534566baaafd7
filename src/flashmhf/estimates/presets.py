"""The sizes of the presets, as a table."""

from dataclasses import dataclass

from flashmhf.estimates.cost import count_parameters
from flashmhf.models import FlashMHFConfig, preset_names
from flashmhf.reports.table import Table


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


def presets_table(sizes: dict[str, PresetSize]) -> Table:
    """Parameters (tied embeddings once), width, layers, attention heads, and the feed-forward layer's sizes."""
    columns = ["preset", "parameters", "width", "layers", "attention", "FFN: H, E x F"]
    rows = [
        [
            name,
            _millions(size.parameters),
            size.hidden_size,
            size.num_hidden_layers,
            size.num_attention_heads,
            _ffn(size),
        ]
        for name, size in sorted(sizes.items(), key=lambda item: (item[1].parameters > 2**23, *_family(item[0])))
    ]
    return Table(columns, rows)


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


def _family(name: str) -> tuple[str, float]:
    """What the table is sorted by: flashmhf-128m before flashmhf-1.3b."""
    family, _, size = name.rpartition("-")
    units = {"m": 1e6, "b": 1e9}
    return family, float(size[:-1]) * units[size[-1]] if size[-1] in units else 0.0


def _millions(parameters: int) -> str:
    return f"{parameters / 1e6:,.1f} M"


def _ffn(size: PresetSize) -> str:
    rows = f"{size.intermediate_size:,}"
    if size.num_subnetworks is not None:
        rows = f"{size.num_subnetworks} x {size.subnetwork_size}"
    return rows if size.num_heads is None else f"{size.num_heads}, {rows}"
