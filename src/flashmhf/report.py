"""A comparison as one self-contained HTML page: table, curves, speed and memory, samples."""

import html
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from flashmhf.inspection import FIGURES, HeadReport
from flashmhf.pages import BLUE, GREEN, GREY, ORANGE, PURPLE, VERMILION, html_figure, html_table, write_page

COLOURS = {"flashmhf": BLUE, "swiglu": VERMILION, "mhffn": GREEN, "pkv": PURPLE, "dense_moe": ORANGE}
UNIGRAM_COLOUR = GREY
FIGURE_INCHES = (5.0, 3.4)
COLUMNS = (
    "FFN",
    "validation loss (nats a token)",
    "bits a byte",
    "parameters",
    "d_ff",
    "tokens a second",
    "peak memory (MiB)",
)


def write_report(results: dict[str, Any], file: Path) -> None:
    """Writes the page for what `comparison.compare` returns; it loads nothing from anywhere."""
    write_page(file, "FlashMHF comparison", _sections(results))


def draw_heads(reports: list[HeadReport], file: Path) -> None:
    """A PNG with one map of layers by heads for each figure of `flashmhf inspect` that the model has."""
    figures = [name for name in FIGURES if getattr(reports[0], name) is not None]
    layers, heads = (max(getattr(report, name) for report in reports) + 1 for name in ("layer", "head"))
    columns = 4
    size = (3.2 * columns, (1.2 + 0.28 * layers) * -(-len(figures) // columns))
    figure, axes = plt.subplots(-(-len(figures) // columns), columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(figures) :]:
        axis.set_visible(False)
    for axis, name in zip(axes.flat, figures, strict=False):
        values = [[float("nan")] * heads for _ in range(layers)]
        for report in reports:
            values[report.layer][report.head] = getattr(report, name)
        image = axis.imshow(values, aspect="auto", cmap="viridis", interpolation="nearest")
        figure.colorbar(image, ax=axis)
        axis.set(title=name.replace("_", " "), xlabel="head", ylabel="layer")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    try:
        figure.savefig(file, dpi=120)
    finally:
        plt.close(figure)


def _sections(results: dict[str, Any]) -> list[str]:
    settings = results["settings"]
    best = min(results["variants"], key=lambda row: row["validation_loss"]["mean"])
    seeds = ", ".join(map(str, settings["seeds"]))
    tokens = results["runs"][0]["tokens"]
    return [
        f"<h1>Feed-forward layers compared: {', '.join(map(html.escape, settings['variants']))}</h1>",
        f"<p>Trained from new weights on <b>{html.escape(settings['data'])}</b> (tokenizer "
        f"{html.escape(settings['tokenizer'])}), {tokens:,} tokens each in blocks of {settings['context_length']}, "
        f"seeds {seeds}; same trunk, matched parameters, same order of the data. Lowest validation loss here: "
        f"<b>{html.escape(best['variant'])}</b>. A model without context could reach "
        f"{results['unigram_entropy_nats']:.3f} nats a token (the unigram entropy).</p>",
        html_table(COLUMNS, _rows(results)),
        "<h2>Loss</h2>",
        html_figure(_curves(results, "curve", None), "Training loss, one line a run"),
        html_figure(_curves(results, "validation_curve", "o"), "Validation loss, one line a run"),
        "<h2>Speed and memory</h2>",
        html_figure(_bars(results, "tokens_per_second"), "Tokens a second of the training step"),
        html_figure(_bars(results, "peak_memory_mib"), "Peak memory of the training process, MiB"),
        "<h2>Samples</h2>",
        *_samples(results["samples"]),
        "<h2>Settings</h2>",
        f"<pre>{html.escape(_settings_text(settings))}</pre>",
    ]


def markdown_table(results: dict[str, Any]) -> str:
    """One row a variant, the lowest validation loss first."""
    rows = [COLUMNS, ("---", *("---:" for _ in COLUMNS[1:])), *_rows(results)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    return [
        (
            row["variant"],
            _spread(row["validation_loss"]),
            _spread(row["bits_per_byte"]),
            f"{row['parameters']:,}",
            f"{row['intermediate_size']:,}",
            f"{row['tokens_per_second']['mean']:,.0f}",
            f"{row['peak_memory_mib']['mean']:,.0f}",
        )
        for row in sorted(results["variants"], key=lambda row: row["validation_loss"]["mean"])
    ]


def _curves(results: dict[str, Any], name: str, marker: str | None) -> Figure:
    """One line a run, one colour a variant, and what a model without context could reach."""
    figure, axes = plt.subplots(figsize=FIGURE_INCHES, layout="constrained")
    labelled: set[str] = set()
    for run in results["runs"]:
        steps, losses = zip(*run[name], strict=True)
        label = None if run["variant"] in labelled else run["variant"]
        labelled.add(run["variant"])
        axes.plot(steps, losses, color=COLOURS[run["variant"]], marker=marker, markersize=4, linewidth=1.5, label=label)
    entropy = results["unigram_entropy_nats"]
    axes.axhline(entropy, color=UNIGRAM_COLOUR, linestyle="--", linewidth=1, label="unigram entropy")
    axes.set_xlabel("step")
    axes.set_ylabel("nats a token")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#eeeeee")
    axes.legend(frameon=False)
    return figure


def _bars(results: dict[str, Any], measure: str) -> Figure:
    rows = results["variants"][::-1]
    figure, axes = plt.subplots(figsize=(FIGURE_INCHES[0], 0.6 + 0.4 * len(rows)), layout="constrained")
    names = [row["variant"] for row in rows]
    bars = axes.barh(names, [row[measure]["mean"] for row in rows], color=[COLOURS[n] for n in names], height=0.6)
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
    deviation = measure["standard_deviation"]
    return f"{measure['mean']:.3f}" + ("" if deviation is None else f" ± {deviation:.3f}")
