"""Initial spectra, sizes, and what one optimiser step of each matrix alone changes, for FlashMHF and SwiGLU.

    python benchmarks/step_check.py benchmarks/results/step_check.csv docs/step_check.png

Models of the demo's size on bytes of a module of the standard library; no training. Prints Markdown. Two minutes.
A "sign" step is Adam's first, a "polar" step Muon's: U V^T of each matrix's gradient, with entries of RMS 0.2.
"""

import argparse
import csv
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from flashmhf.layers import FlashMHF, SwiGLU
from flashmhf.layers.initialisation import REFERENCE_GAIN, init_orthogonal
from flashmhf.reports.render import png
from flashmhf.reports.style import colours_of, new_figure
from flashmhf.reports.table import Table
from flashmhf.reports.ticks import logarithmic
from measured_picture import main

RATES = {"sign": 1e-3, "polar": 4e-3}
SCORE_RMS, VOCABULARY, SEEDS, QUANTILES, SHOWN = 0.64, 256, 2, 33, 2
MATRICES = {"k": "K", "u": "U", "v": "V", "gate_weight": "gate", "in_proj": "W_in", "out_proj": "W_out"}
MATRICES |= {"gate_proj": "K", "up_proj": "U", "down_proj": "V"}  # a SwiGLU's, under the same names
CHAINS = {  # rows per head, heads, whether W_in and K are orthogonal; None: without W_in
    "SwiGLU": (748, 1, None, False),
    "both random": (576, 4, False, False),
    "K orthogonal": (576, 4, False, True),
    "W_in orthogonal": (576, 4, True, False),
    "both orthogonal": (576, 4, True, True),
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One model. Projections are Xavier-uniform, or orthogonal with gain 1 (W_in) and 0.707 (W_out)."""

    variant: str = "flashmhf"
    orthogonal: bool = True
    gain: float = 0.8  # standard deviation of V, times sqrt(d_ff)
    heads: int = 4
    subnetworks: int = 3
    score_scale: float | None = None  # None: num_heads
    embed_std: float = 0.02  # 0.02: tied to the head
    hidden: int = 256
    layers: int = 4
    context: int = 256
    batch: int = 8


SETTINGS = {
    "SwiGLU, gain 0.3": Setting(variant="swiglu", gain=0.3),
    "SwiGLU": Setting(variant="swiglu"),
    "SwiGLU, gain 2.5": Setting(variant="swiglu", gain=2.5),
    "FlashMHF, random": Setting(orthogonal=False),
    "FlashMHF, random, gain 2.5": Setting(orthogonal=False, gain=2.5),
    "FlashMHF": Setting(),
    "FlashMHF, gain 2.5": Setting(gain=2.5),
    "FlashMHF, H = 1": Setting(heads=1),
    "FlashMHF, H = 16": Setting(heads=16),
    "FlashMHF, score_scale sqrt(H)": Setting(score_scale=2.0),
    "FlashMHF, E = 12": Setting(subnetworks=12),
    "SwiGLU, embeddings 0.3": Setting(variant="swiglu", embed_std=0.3),
    "FlashMHF, embeddings 0.3": Setting(embed_std=0.3),
}


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """`kind`: spectrum (part: a quantile, or "participation"), stream (part: depth), branch, or a kind of step."""

    kind: str
    setting: str
    part: str
    value: float


def spectra(hidden: int = 256) -> Iterator[Measurement]:
    """Singular values of x -> M, in units of their RMS, for each chain of matrices; V and W_out mirror them."""
    torch.manual_seed(0)
    for name, (rows, heads, orthogonal, orthogonal_rows) in CHAINS.items():
        blocks = torch.randn(heads, rows, hidden // heads, dtype=torch.float64)
        if orthogonal_rows:
            init_orthogonal(blocks, std=1.0)
        chain = torch.block_diag(*blocks)
        if orthogonal is not None:
            chain = chain @ square(hidden, orthogonal)
        values = torch.linalg.svdvals(chain)
        energy = values.square() / values.square().mean()
        yield Measurement(
            kind="spectrum", setting=name, part="participation", value=(1 / energy.square().mean()).item()
        )
        for i, value in enumerate(energy.sqrt().quantile(torch.linspace(0, 1, QUANTILES, dtype=torch.float64))):
            yield Measurement(kind="spectrum", setting=name, part=str(i), value=value.item())


def square(size: int, orthogonal: bool) -> Tensor:
    matrix = torch.randn(size, size, dtype=torch.float64) / math.sqrt(size)
    if orthogonal:
        init_orthogonal(matrix, std=1 / math.sqrt(size))
    return matrix


def build(setting: Setting, seed: int) -> Any:
    """The model of a setting. All sizes are set here, so that the package's constants do not matter."""
    from flashmhf.models import FlashMHFConfig, FlashMHFForCausalLM

    torch.manual_seed(seed)
    rows = 9 * setting.hidden // 4 if setting.variant == "flashmhf" else 187 * setting.hidden // 64
    config = FlashMHFConfig(
        ffn_type=setting.variant,
        init="scaled",
        hidden_size=setting.hidden,
        intermediate_size=rows,
        num_hidden_layers=setting.layers,
        num_attention_heads=4,
        num_ffn_heads=setting.heads if setting.variant == "flashmhf" else None,
        num_subnetworks=setting.subnetworks if setting.variant == "flashmhf" else 1,
        q_norm=setting.variant == "flashmhf",
        score_scale=setting.score_scale,
        vocab_size=VOCABULARY,
        max_position_embeddings=setting.context,
        tie_word_embeddings=setting.embed_std == 0.02,
    )
    model: Any = FlashMHFForCausalLM(config)
    nn.init.normal_(model.model.embed_tokens.weight, std=setting.embed_std)
    for layer in model.model.layers:
        fill(layer.mlp, setting)
    return model


def fill(layer: nn.Module, setting: Setting) -> None:
    if isinstance(layer, SwiGLU):
        for projection in (layer.gate_proj, layer.up_proj):
            nn.init.normal_(projection.weight, std=SCORE_RMS / math.sqrt(projection.in_features))
        nn.init.normal_(layer.down_proj.weight, std=setting.gain / math.sqrt(layer.down_proj.in_features))
        return
    assert isinstance(layer, FlashMHF)
    for square, gain in ((layer.in_proj, 1.0), (layer.out_proj, REFERENCE_GAIN)):
        assert square is not None
        if setting.orthogonal:
            init_orthogonal(square.weight, std=gain / math.sqrt(setting.hidden))
        else:
            nn.init.xavier_uniform_(square.weight, gain=REFERENCE_GAIN)
    for rows in (layer.k, layer.u):
        nn.init.normal_(rows, std=SCORE_RMS / (layer.score_scale * math.sqrt(layer.head_dim)))
    nn.init.normal_(layer.v, std=setting.gain / math.sqrt(layer.num_subnetworks * layer.subnetwork_size))


def measure(name: str, setting: Setting, seed: int) -> Iterator[Measurement]:
    """The stream's share that the token explains, branches relative to the stream, and steps relative to the output."""
    model = build(setting, seed)
    ids = tokens(setting, seed)
    inputs: list[Tensor] = []
    streams: list[Tensor] = []
    hooks = [
        hook
        for layer in model.model.layers
        for hook in (
            layer.mlp.register_forward_hook(lambda module, arguments, output: inputs.append(arguments[0].detach())),
            layer.register_forward_hook(lambda module, arguments, output: streams.append(first(output).detach())),
        )
    ]
    nnf.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    for hook in hooks:
        hook.remove()
    layers = [layer.mlp for layer in model.model.layers]
    for depth, (layer, x, stream) in enumerate(zip(layers, inputs, streams, strict=True)):
        with torch.no_grad():
            relative = rms(layer(x)) / rms(stream)
        yield Measurement(kind="stream", setting=name, part=str(depth), value=token_share(stream, ids))
        yield Measurement(kind="branch", setting=name, part=str(depth), value=relative)
    for kind in RATES:
        for part in MATRICES.values():
            found = [change(layer, x, kind, part) for layer, x in zip(layers, inputs, strict=True)]
            if changes := [value for value in found if value is not None]:
                yield Measurement(kind=kind, setting=name, part=part, value=sum(changes) / len(changes))


@torch.no_grad()
def change(layer: nn.Module, x: Tensor, kind: str, part: str) -> float | None:
    """RMS of the change of the layer's output by one step of one matrix, relative to the output's, on SHOWN texts."""
    chosen = [p for name, p in layer.named_parameters() if MATRICES.get(name.removesuffix(".weight")) == part]
    if not chosen:
        return None
    (weight,) = chosen
    before, old = layer(x[:SHOWN]), weight.clone()
    assert weight.grad is not None
    weight.sub_(RATES[kind] * (weight.grad.sign() if kind == "sign" or part == "gate" else polar(weight.grad)))
    changed = layer(x[:SHOWN])
    weight.copy_(old)
    return rms(changed - before) / rms(before)


def polar(gradient: Tensor) -> Tensor:
    """The orthogonal factor of each matrix of `gradient`, with entries of RMS 0.2."""
    u, _, v = torch.linalg.svd(gradient, full_matrices=False)
    return u @ v * (0.2 * math.sqrt(max(gradient.shape[-2:])))


def token_share(stream: Tensor, ids: Tensor) -> float:
    """The share of the stream's variance over positions that the token at the position explains."""
    flat, groups = (stream - stream.mean((0, 1))).flatten(0, 1), ids.flatten()
    counts = torch.bincount(groups, minlength=VOCABULARY).clamp_min(1)
    means = torch.zeros(VOCABULARY, flat.shape[1]).index_add_(0, groups, flat) / counts[:, None]
    return (means[groups].square().sum() / flat.square().sum()).item()


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def tokens(setting: Setting, seed: int) -> Tensor:
    text, count = bytearray(Path(argparse.__file__).read_bytes()), setting.batch * setting.context
    return torch.frombuffer(text, dtype=torch.uint8)[seed * count : (seed + 1) * count].long().view(setting.batch, -1)


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def run() -> list[Measurement]:
    """Measures everything; means over seeds."""
    found = list(spectra())
    for name, setting in SETTINGS.items():
        seeds = [list(measure(name, setting, seed)) for seed in range(SEEDS)]
        found += [replace(rows[0], value=sum(row.value for row in rows) / SEEDS) for rows in zip(*seeds, strict=True)]
        print(name, flush=True)
    return found


def write_rows(rows: list[Measurement], file: Path) -> None:
    file.write_text(Table.of([{**asdict(row), "value": f"{row.value:.6g}"} for row in rows]).csv())


def read_rows(file: Path) -> list[Measurement]:
    with file.open(newline="") as opened:
        return [
            Measurement(kind=row["kind"], setting=row["setting"], part=row["part"], value=float(row["value"]))
            for row in csv.DictReader(opened)
        ]


def values(rows: list[Measurement], kind: str, setting: str) -> dict[str, float]:
    return {row.part: row.value for row in rows if (row.kind, row.setting) == (kind, setting)}


def tables(rows: list[Measurement]) -> str:
    """Markdown: the spectra, then steps, branches and the token's share by setting."""
    last = str(QUANTILES - 1)
    header = ["x -> M", "largest", "median", "smallest", "participation"]
    lines = []
    for name in CHAINS:
        spectrum = values(rows, "spectrum", name)
        shown = [spectrum[part] for part in (last, str(QUANTILES // 2), "0", "participation")]
        lines.append([name, *(f"{value:.2f}" if value >= 0.1 else f"{value:.4f}" for value in shown)])
    parts = list(dict.fromkeys(MATRICES.values()))
    steps = []
    for name in SETTINGS:
        found = {kind: values(rows, kind, name) for kind in RATES}
        cells = [" / ".join(f"{found[kind][part]:.3f}" for kind in RATES if part in found[kind]) for part in parts]
        stream, branch = values(rows, "stream", name), values(rows, "branch", name)
        ends = [f"{depths['0']:.2f}, {depths[max(depths)]:.2f}" for depths in (branch, stream)]
        steps.append([name, *cells, *ends])
    columns = ["sign / polar step", *parts, "branch / stream: first, last layer", "token's share"]
    return Table(header, lines).markdown() + "\n\n" + Table(columns, steps).markdown()


def draw(rows: list[Measurement], file: Path) -> None:
    """Spectra, steps and the token's share."""
    figure = new_figure(15, 5)
    spectrum, steps, stream = figure.subplots(1, 3)
    for name, colour in zip(CHAINS, colours_of(CHAINS), strict=True):
        found = values(rows, "spectrum", name)
        spectrum.plot([i / (QUANTILES - 1) for i in range(QUANTILES)], [found[str(i)] for i in range(QUANTILES)])
        spectrum.lines[-1].set(color=colour, label=name)
    spectrum.set(xlabel="quantile", ylabel="singular value / RMS", title="x -> M", ylim=(1e-3, 4))
    logarithmic(spectrum, "y")
    chosen = ["SwiGLU", "FlashMHF, random", "FlashMHF", "FlashMHF, score_scale sqrt(H)"]
    parts = list(dict.fromkeys(MATRICES.values()))
    for i, (name, colour) in enumerate(zip(chosen, colours_of(chosen), strict=True)):
        for kind, marker in zip(RATES, ("o", "x"), strict=True):
            found = values(rows, kind, name)
            at = [parts.index(part) + 0.15 * (i - 1.5) for part in found]
            label = f"{name}, {kind}"
            steps.plot(at, list(found.values()), marker, color=colour, label=label)
    logarithmic(steps, "y")
    steps.set(xticks=range(len(parts)), xticklabels=parts, title="one step of one matrix alone")
    steps.set(ylabel="change of y / RMS of y")
    depths = ["SwiGLU, gain 2.5", "SwiGLU, gain 0.3", "FlashMHF", "SwiGLU, embeddings 0.3", "FlashMHF, embeddings 0.3"]
    for name, colour in zip(depths, colours_of(depths), strict=True):
        found = values(rows, "stream", name)
        stream.plot([int(part) + 1 for part in found], list(found.values()), "o-", color=colour, label=name)
    stream.set(xlabel="after layer", xticks=[int(part) + 1 for part in found], ylabel="share", ylim=(0, 1.05))
    stream.set_title("variance of the stream explained by the token")
    for axis in (spectrum, steps, stream):
        axis.grid(alpha=0.3)
        axis.legend(fontsize="x-small", loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(png(figure, dpi=80))


if __name__ == "__main__":
    main(__doc__, run=run, write_rows=write_rows, read_rows=read_rows, tables=tables, draw=draw)
