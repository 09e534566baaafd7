"""A comparison as a page: tables, curves in steps and in time, loss against size, speed and memory, samples."""

import html
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from flashmhf.reports.page import (
    BLUE,
    FIGURE_INCHES,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    VERMILION,
    figures,
    html_table,
    markdown_rows,
    new_axes,
    write_page,
)

COLOURS = {"flashmhf": BLUE, "swiglu": VERMILION, "mhffn": GREEN, "pkv": PURPLE, "dense_moe": ORANGE}
ABLATION_STYLES = ("--", ":", "-.", (0, (1, 3)), (0, (5, 1, 1, 1, 1, 1)), (0, (8, 3)))
UNIGRAM_COLOUR = GREY
COLUMNS = (
    "FFN",
    "validation loss (nats a token)",
    "held-out documents",
    "to the first (95 %)",
    "bits a byte",
    "parameters",
    "d_ff",
    "tokens a second",
    "peak memory (MiB)",
)
EFFECT_COLUMNS = ("ablation", "held-out documents, to flashmhf (95 %)", "reading")
LEAST_SIZES = 3  # for a power law


def write_report(results: dict[str, Any], file: Path) -> None:
    """Writes the page for what `comparison.compare` returns."""
    names = ", ".join(results["settings"]["variants"])
    write_page(file, f"Feed-forward layers compared: {names}", _sections(results))


def markdown_table(results: dict[str, Any]) -> str:
    """One row an entry, the lowest validation loss first."""
    effects = _effects(results)
    tables = [markdown_rows(COLUMNS, _rows(results)), *([markdown_rows(EFFECT_COLUMNS, effects)] if effects else [])]
    return "\n\n".join([*tables, *_died(results)])


def _sections(results: dict[str, Any]) -> list[str]:
    return [
        _introduction(results),
        html_table(COLUMNS, _rows(results)),
        *(f"<p><b>{html.escape(line)}</b></p>" for line in _died(results)),
        "<h2>Loss</h2>",
        figures(
            (_curves(results, "curve", 0, None), "Training loss by step, one line a run"),
            (_curves(results, "validation_curve", 0, "o"), "Validation loss by step, one line a run"),
            (_curves(results, "curve", 2, None), "Training loss by time in training"),
            (_curves(results, "validation_curve", 2, "o"), "Validation loss by time in training"),
        ),
        f"<p>{_reading(results)}</p>",
        *_ablations(results),
        *_sweep(results),
        *_gates(results),
        "<h2>Size</h2>",
        figures(
            (_against(results, "parameters", "parameters"), "Validation loss against parameters, mean over seeds"),
            (
                _against(results, "forward_flops_per_token", "FLOPs a token, forward"),
                "Validation loss against FLOPs a token, mean over seeds",
            ),
        ),
        "<h2>Speed and memory</h2>",
        figures(
            (_bars(results, "tokens_per_second"), "Tokens a second of training"),
            (_bars(results, "peak_memory_mib"), "Peak memory of the training process, MiB"),
        ),
        "<h2>Samples</h2>",
        *_samples(results["samples"]),
        "<h2>Settings</h2>",
        f"<pre>{html.escape(_settings_text(results['settings']))}</pre>",
    ]


def _introduction(results: dict[str, Any]) -> str:
    settings = results["settings"]
    seeds = ", ".join(map(str, settings["seeds"]))
    tokens = next(run["tokens"] for run in results["runs"] if run["status"] == "finished")
    best = _ranked(results)[0]
    return (
        f"<p>Trained from new weights on <b>{html.escape(settings['data'])}</b> (tokenizer "
        f"{html.escape(settings['tokenizer'])}), {tokens:,} tokens each in blocks of {settings['context_length']}, "
        f"seeds {seeds}; same trunk, matched {settings['match']}, same order of the data. Lowest validation loss here: "
        f"<b>{html.escape(best['variant'])}</b>. A model without context could reach "
        f"{results['unigram_entropy_nats']:.3f} nats a token (the unigram entropy).</p>"
    )


def _ranked(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Entries, the lowest validation loss first; those without any last."""
    return sorted(
        results["variants"],
        key=lambda row: (row["validation_loss"]["mean"] is None, row["validation_loss"]["mean"] or 0.0),
    )


def _rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    return [
        (
            row["variant"],
            _spread(row["validation_loss"]),
            _number(row["documents"]["nats_per_token"]),
            _difference(row["difference"]),
            _spread(row["bits_per_byte"]),
            f"{row['parameters']:,}",
            f"{row['intermediate_size']:,}",
            _mean(row["tokens_per_second"]),
            _mean(row["peak_memory_mib"]),
        )
        for row in _ranked(results)
    ]


def _died(results: dict[str, Any]) -> list[str]:
    died = [f"{run['variant']} with seed {run['seed']}" for run in results["runs"] if run["status"] == "failed"]
    return [f"These runs died and are in no mean: {', '.join(died)}."] if died else []


def _curves(results: dict[str, Any], name: str, against: int, marker: str | None) -> Figure:
    """One line a run, one colour a variant, one dash an ablation, and what a model without context could reach."""
    figure, axes = new_axes("step" if against == 0 else "seconds of training", "nats a token")
    labelled: set[str] = set()
    for run in results["runs"]:
        if not run[name]:
            continue
        label = None if run["variant"] in labelled else run["variant"]
        labelled.add(run["variant"])
        points = list(zip(*run[name], strict=True))
        axes.plot(
            points[against], points[1], marker=marker, markersize=4, linewidth=1.2, label=label, **_style(results, run)
        )
    entropy = results["unigram_entropy_nats"]
    axes.axhline(entropy, color=UNIGRAM_COLOUR, linestyle="--", linewidth=1, label="unigram entropy")
    if against == 0:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize=9)
    return figure


def _style(results: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    names = [entry["variant"] for entry in results["variants"] if entry["ablation"] is not None]
    style = ABLATION_STYLES[names.index(row["variant"]) % len(ABLATION_STYLES)] if row["variant"] in names else "-"
    return {"color": COLOURS[row["ffn_type"]], "linestyle": style}


def _effects(results: dict[str, Any]) -> list[tuple[str, ...]]:
    several = len(results["settings"]["models"]) > 1
    return [
        (
            " ".join(row["ablation"]) + (f", {row['model']}" if several else ""),
            _difference(row["effect"]),
            _verdict(row["effect"], row["ffn_type"]),
        )
        for row in results["variants"]
        if row["ablation"] is not None
    ]


def _ablations(results: dict[str, Any]) -> list[str]:
    effects = _effects(results)
    return ["<h2>Ablations</h2>", html_table(EFFECT_COLUMNS, effects)] if effects else []


def _sweep(results: dict[str, Any]) -> list[str]:
    if not results["sweep"]:
        return []
    rows = [
        (
            row["variant"],
            f"{row['learning_rate']:g}",
            "died" if row["validation_loss"] is None else f"{row['validation_loss']:.3f}",
        )
        for row in results["sweep"]
    ]
    columns = ("FFN", "learning rate", "validation loss, first seed")
    return ["<h2>Learning rates</h2>", html_table(columns, rows)]


def _reading(results: dict[str, Any]) -> str:
    """What the intervals decide, in words."""
    first = results["settings"]["variants"][0]
    lines = []
    for row in results["variants"]:
        if row["difference"] is None:
            continue
        verdict = html.escape(_verdict(row["difference"], first))
        lines.append(f"<b>{html.escape(row['variant'])}</b>: {verdict} ({_difference(row['difference'])})")
    seeds = len(results["settings"]["seeds"])
    over = "documents and Student's t over the seeds" if seeds > 1 else "documents; one seed says nothing of another"
    return (
        f"Nats a token on the held-out documents, of each the first {results['settings']['document_bytes']:,} bytes, "
        f"less those of {html.escape(first)} with the same seed on the same "
        f"documents; 95 % intervals by a bootstrap over {over}. {'; '.join(lines)}."
    )


def _verdict(difference: dict[str, Any] | None, baseline: str) -> str:
    interval = None if difference is None else difference["nats_per_token"]["interval"]
    if interval is None:
        return "not decided"
    if interval[0] <= 0 <= interval[1]:
        return f"not told apart from {baseline}"
    return f"{'worse' if interval[0] > 0 else 'better'} than {baseline}"


def _gates(results: dict[str, Any]) -> list[str]:
    """Entropy of the gate and evenness of the load, a row a layer."""
    rows = []
    for name, heads in results["gates"].items():
        for layer in sorted({head["layer"] for head in heads}):
            mine = [head for head in heads if head["layer"] == layer]
            entropies, loads = ([head[key] for head in mine] for key in ("entropy", "load"))
            rows.append((f"{name}, layer {layer}", _range(entropies), _range(loads)))
    if not rows:
        return []
    columns = ("FFN", "gate entropy by head", "evenness of the load by head")
    note = "<p>1: all sub-networks alike; 0: one alone. Least and most of the heads, first seed.</p>"
    return ["<h2>Gates</h2>", note, html_table(columns, rows)]


def _range(values: list[float]) -> str:
    return f"{min(values):.3f} to {max(values):.3f}"


def _against(results: dict[str, Any], measure: str, name: str) -> Figure:
    """Loss against a size, with a power law for each variant that has enough sizes."""
    figure, axes = new_axes(name, "nats a token")
    rows = [row for row in results["variants"] if row["validation_loss"]["mean"] is not None]
    for ffn_type, colour in COLOURS.items():
        mine = sorted(
            (row[measure], row["validation_loss"]["mean"])
            for row in rows
            if row["ffn_type"] == ffn_type and row["ablation"] is None
        )
        if not mine:
            continue
        sizes, losses = np.array(mine).T
        axes.scatter(sizes, losses, color=colour, label=ffn_type, zorder=3)
        if len(set(sizes)) >= LEAST_SIZES:
            exponent, log_scale = np.polyfit(np.log(sizes), np.log(losses), 1)
            axes.plot(
                sizes, np.exp(log_scale) * sizes**exponent, color=colour, label=f"{ffn_type}: size^{exponent:.3f}"
            )
    if len({row[measure] for row in rows}) >= LEAST_SIZES:
        axes.set(xscale="log", yscale="log")
    axes.margins(0.1)
    axes.legend(frameon=False, fontsize=9)
    return figure


def _bars(results: dict[str, Any], measure: str) -> Figure:
    rows = [row for row in results["variants"][::-1] if row[measure]["mean"] is not None]
    figure, axes = plt.subplots(figsize=(FIGURE_INCHES[0], 0.6 + 0.4 * len(rows)), layout="constrained")
    names = [row["variant"] for row in rows]
    colours = [COLOURS[row["ffn_type"]] for row in rows]
    bars = axes.barh(names, [row[measure]["mean"] for row in rows], color=colours, height=0.6)
    axes.bar_label(bars, fmt="{:,.0f}", padding=3)
    axes.margins(x=0.15)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.xaxis.set_visible(False)
    return figure


def _samples(samples: dict[str, Any]) -> list[str]:
    prompt = html.escape(samples["prompt"])
    return [
        f'<h3>{html.escape(variant)}</h3><pre><span class="prompt">{prompt}</span>{html.escape(text)}</pre>'
        for variant, text in samples["continuations"].items()
    ]


def _settings_text(settings: dict[str, Any]) -> str:
    return "\n".join(f"{name}: {value}" for name, value in settings.items())


def _spread(measure: dict[str, Any]) -> str:
    if measure["mean"] is None:
        return "died"
    deviation = measure["standard_deviation"]
    return f"{measure['mean']:.3f}" + ("" if deviation is None else f" ± {deviation:.3f}")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _difference(difference: dict[str, Any] | None) -> str:
    if difference is None:
        return ""
    found = difference["nats_per_token"]
    ends = "" if found["interval"] is None else f" [{found['interval'][0]:+.3f}, {found['interval'][1]:+.3f}]"
    return f"{found['mean']:+.3f}{ends}"


def _mean(measure: dict[str, Any]) -> str:
    return "" if measure["mean"] is None else f"{measure['mean']:,.0f}"
