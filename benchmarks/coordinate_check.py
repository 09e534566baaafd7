"""RMS of activations, and of their change over a few Adam steps, against width and number of heads.

    python benchmarks/coordinate_check.py benchmarks/results/coordinate_check.csv docs/coordinate_check.png

A one-layer model on the bytes of a module of the standard library. Along "width" the head dim stays 64 and the number
of heads grows; along "heads" the width stays 256. Prints the exponents of the power laws as Markdown. A few minutes.
"""

import argparse
import csv
import itertools
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.ticker import NullLocator
from torch import Tensor, nn

from flashmhf.reports.render import png
from flashmhf.reports.style import colours_of, legend_below, new_figure
from flashmhf.reports.table import Table
from flashmhf.reports.ticks import logarithmic
from measured_picture import main

STEPS, BATCH, CONTEXT, LEARNING_RATE, SEEDS = 4, 2, 128, 1e-3, 2
BASE_WIDTH, HEAD_DIM, SUBNETWORK_SIZE = 64, 64, 192
WIDTHS, HEADS, HEADS_WIDTH = (64, 128, 256, 512, 1024), (1, 2, 4, 8, 16), 256
VARIANTS = ("flashmhf", "mhffn", "pkv", "swiglu")
SETTINGS = (("reference", False), ("scaled", False), ("scaled", True))  # (init, learning rates by fan-in)
PARTS = ("scores", "gate", "ffn", "attention", "logits")
CASE = ("axis", "variant", "init", "by_fan_in", "width", "heads")  # what identifies a case, seeds apart


@dataclass(frozen=True)
class Case:
    """One model; `by_fan_in`: learning rates scale with the fan-in; `heads` of its feed-forward layer."""

    variant: str
    init: str
    by_fan_in: bool
    width: int
    heads: int
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One part of one case, geometric means over seeds: its RMS at initialisation, and that of its change."""

    axis: str
    variant: str
    init: str
    by_fan_in: bool
    width: int
    heads: int
    part: str
    size: float
    change: float


def configuration(case: Case) -> dict[str, Any]:
    """The FlashMHFConfig values of a case: d_ff proportional to the width, sub-networks of constant size."""
    rows = 3 * case.width
    values = {"ffn_type": case.variant, "init": case.init, "hidden_size": case.width, "intermediate_size": rows}
    values |= {"num_hidden_layers": 1, "num_attention_heads": case.width // HEAD_DIM, "vocab_size": 256}
    values |= {"max_position_embeddings": CONTEXT, "tie_word_embeddings": False, "num_ffn_heads": case.heads}
    subnetworks = rows // SUBNETWORK_SIZE if case.variant == "flashmhf" else 1
    return values | {"num_subnetworks": subnetworks, "q_norm": case.variant == "flashmhf"}


def measure(case: Case) -> dict[str, tuple[float, float]]:
    """part -> (RMS at initialisation, RMS of its change after STEPS steps), on the first batch."""
    from flashmhf.models import FlashMHFConfig, FlashMHFForCausalLM
    from flashmhf.training.learning_rates import learning_rate_factors, scale_learning_rates

    torch.manual_seed(case.seed)
    model = FlashMHFForCausalLM(FlashMHFConfig(**configuration(case)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    if case.by_fan_in:
        scale_learning_rates(optimizer, learning_rate_factors(model, BASE_WIDTH))
    batches = tokens(case.seed)
    before = parts(model, batches[0])
    for batch in batches:
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = parts(model, batches[0])
    return {name: (rms(start), rms(after[name] - start)) for name, start in before.items()}


def tokens(seed: int) -> list[Tensor]:
    text = Path(argparse.__file__).read_bytes()
    ids = torch.frombuffer(bytearray(text), dtype=torch.uint8)[seed * STEPS * BATCH * CONTEXT :].long()
    return list(ids[: STEPS * BATCH * CONTEXT].view(STEPS, BATCH, CONTEXT))


@torch.no_grad()
def parts(model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
    """The output of each part of the model for a batch."""
    block = model.model.layers[0]  # type: ignore[union-attr, index]
    found: dict[str, Tensor] = {}

    def keep_ffn(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        found.update(inner_parts(module, inputs[0]) | {"ffn": output})

    def keep_attention(module: nn.Module, inputs: Any, output: Any) -> None:
        found["attention"] = output[0]

    hooks = [block.mlp.register_forward_hook(keep_ffn), block.self_attn.register_forward_hook(keep_attention)]  # type: ignore[union-attr]
    found["logits"] = model(input_ids=batch).logits
    for hook in hooks:
        hook.remove()
    return found


def inner_parts(layer: Any, x: Tensor) -> dict[str, Tensor]:
    """Scores M (a SwiGLU's gate_proj, PKV's logits), and the gate's logits if it has a gate."""
    from flashmhf.layers import FlashMHF, SwiGLU

    if isinstance(layer, SwiGLU):
        return {"scores": layer.gate_proj(x)}
    q = layer.in_proj(x).unflatten(-1, (-1, layer.head_dim))
    if not isinstance(layer, FlashMHF):
        return {"scores": torch.einsum("...hd,hsd->...hs", q, layer.k) / math.sqrt(layer.head_dim)}
    q = q if layer.q_norm is None else layer.q_norm(q)
    found = {"scores": layer.score_scale * torch.einsum("...hd,hefd->...hef", q, layer.k.view(layer.rows_shape))}
    if layer.gate_weight is not None:
        found["gate"] = layer.gate_scale * torch.einsum("...hd,hde->...he", q, layer.gate_weight)
    return found


def rms(x: Tensor) -> float:
    return x.float().square().mean().sqrt().item()


def cases() -> list[tuple[str, Case]]:
    """All cases, each with the axis it belongs to."""
    along_width = [("width", width, width // HEAD_DIM) for width in WIDTHS]
    along_heads = [("heads", HEADS_WIDTH, heads) for heads in HEADS]
    return [
        (axis, Case(variant, init, by_fan_in, width, heads, seed))
        for variant in VARIANTS
        for init, by_fan_in in SETTINGS
        for axis, width, heads in along_width + (along_heads if variant != "swiglu" and not by_fan_in else [])
        for seed in range(SEEDS)
    ]


def run() -> list[Measurement]:
    """Measures all cases."""
    measured: dict[tuple[str, Case], list[dict[str, tuple[float, float]]]] = {}
    for axis, case in cases():
        measured.setdefault((axis, replace(case, seed=0)), []).append(measure(case))
        if axis == "width" and case.seed == SEEDS - 1:
            print(f"{case.variant} {case.init} {case.width}", flush=True)
    rows = []
    for (axis, case), results in measured.items():
        settings = {name: getattr(case, name) for name in CASE if name != "axis"}
        for part in results[0]:
            size, change = (mean_log([result[part][i] for result in results]) for i in (0, 1))
            rows.append(Measurement(axis=axis, **settings, part=part, size=size, change=change))
    return rows


def mean_log(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def exponent(x: list[float], y: list[float]) -> float:
    """Slope of log(y) against log(x), by least squares."""
    log_x, log_y = (torch.tensor([math.log(value) for value in values]) for values in (x, y))
    return float(((log_x - log_x.mean()) * (log_y - log_y.mean())).sum() / (log_x - log_x.mean()).square().sum())


def write_rows(rows: list[Measurement], file: Path) -> None:
    """As CSV: one line per case, with two columns per part."""
    lines: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        case = {name: getattr(row, name) for name in CASE}
        line = lines.setdefault(tuple(case.values()), case)
        line |= {f"{row.part}_{name}": f"{getattr(row, name):.6g}" for name in ("size", "change")}
    file.write_text(Table.of(list(lines.values())).csv())


def read_rows(file: Path) -> list[Measurement]:
    """Reads what `write_rows` wrote."""
    with file.open(newline="") as opened:
        lines = list(csv.DictReader(opened))
    return [
        Measurement(
            axis=line["axis"],
            variant=line["variant"],
            init=line["init"],
            by_fan_in=line["by_fan_in"] == "True",
            width=int(line["width"]),
            heads=int(line["heads"]),
            part=part,
            size=float(line[f"{part}_size"]),
            change=float(line[f"{part}_change"]),
        )
        for line in lines
        for part in PARTS
        if line[f"{part}_size"]
    ]


def line_of(rows: list[Measurement], **chosen: Any) -> list[Measurement]:
    return [row for row in rows if all(getattr(row, name) == value for name, value in chosen.items())]


def tables(rows: list[Measurement]) -> str:
    """Markdown: exponents of sizes and changes along both axes."""
    return "\n\n".join(table(rows, axis, quantity) for axis in ("width", "heads") for quantity in ("size", "change"))


def table(rows: list[Measurement], axis: str, quantity: str) -> str:
    """Markdown: exponents of a quantity along an axis, one line per variant and part."""
    settings = [pair for pair in SETTINGS if axis == "width" or not pair[1]]
    lines = []
    for variant, part in itertools.product(VARIANTS, PARTS):
        cells = [
            line_of(rows, axis=axis, variant=variant, part=part, init=init, by_fan_in=by_fan_in)
            for init, by_fan_in in settings
        ]
        if all(cells):
            exponents = [
                exponent(*([getattr(row, name) for row in cell] for name in (axis, quantity))) for cell in cells
            ]
            lines.append([f"{variant}, {part}", *(f"{value:+.2f}" for value in exponents)])
    return Table([f"{quantity} along {axis}", *(label(*pair) for pair in settings)], lines).markdown()


def label(init: str, by_fan_in: bool) -> str:
    return f"`{init}`" + (", rates by fan-in" if by_fan_in else "")


def draw(rows: list[Measurement], file: Path) -> None:
    """Changes against width and heads: one column per setting, one row per part."""
    columns = [("width", *pair) for pair in SETTINGS] + [("heads", *pair) for pair in SETTINGS[:2]]
    shown = ("scores", "gate", "ffn", "logits")
    figure = new_figure(15, 10)
    axes = figure.subplots(len(shown), len(columns), sharex="col", sharey="row")
    for y, part in enumerate(shown):
        for x, (axis, init, by_fan_in) in enumerate(columns):
            panel = axes[y][x]
            for variant, colour in zip(VARIANTS, colours_of(VARIANTS), strict=True):
                line = line_of(rows, axis=axis, variant=variant, part=part, init=init, by_fan_in=by_fan_in)
                if line:
                    across = [getattr(row, axis) for row in line]
                    panel.plot(across, [row.change for row in line], "o-", label=variant, color=colour)
                    panel.plot(across, [row.size for row in line], ":", color=colour)
            logarithmic(panel, "y")
            panel.set(xscale="log", xticks=across, xticklabels=across)
            panel.grid(alpha=0.3)
            panel.xaxis.set_minor_locator(NullLocator())
            if y == 0:
                panel.set_title(label(init, by_fan_in).replace("`", ""))
            if y == len(shown) - 1:
                panel.set_xlabel(axis)
        axes[y][0].set_ylabel(f"{part}: RMS")
    legend_below(figure)
    figure.suptitle(f"change after {STEPS} Adam steps at {LEARNING_RATE:g} (lines); size at initialisation (dotted)")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(png(figure, dpi=80))


if __name__ == "__main__":
    main(__doc__, run=run, write_rows=write_rows, read_rows=read_rows, tables=tables, draw=draw)
