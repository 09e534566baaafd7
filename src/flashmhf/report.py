"""A comparison as one self-contained HTML page: table, curves, speed and memory, samples."""

import html
import io
import re
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from flashmhf.inspection import FIGURES, HeadReport

COLOURS = {  # Okabe and Ito's, told apart with any colour vision
    "flashmhf": "#0072B2",
    "swiglu": "#D55E00",
    "mhffn": "#009E73",
    "pkv": "#CC79A7",
    "dense_moe": "#E69F00",
}
UNIGRAM_COLOUR = "#666666"
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

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>FlashMHF comparison</title>
<style>
  :root {{ color-scheme: light; }}
  body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; color: #1a1a1a;
         background: #fff; }}
  h1 {{ font-size: 1.5rem; }} h2 {{ font-size: 1.15rem; margin-top: 2rem; }}
  .scroll {{ overflow-x: auto; }}
  table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
  th, td {{ padding: 0.35rem 0.7rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }}
  th:first-child, td:first-child {{ text-align: left; }}
  th {{ font-weight: 600; white-space: normal; vertical-align: bottom; }}
  figure {{ margin: 1rem 0; }} figure svg {{ width: 100%; max-width: 40rem; height: auto; }}
  pre {{ background: #f5f5f5; padding: 0.7rem; overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere;
        font-size: 0.85rem; }}
  .prompt {{ color: #777; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def write_report(results: dict[str, Any], file: Path) -> None:
    """Writes the page for what `comparison.compare` returns; it loads nothing from anywhere."""
    beside = file.with_name(file.name + ".tmp")
    beside.write_text(PAGE.format(body="\n".join(_sections(results))), encoding="utf-8")
    beside.replace(file)


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
        _html_table(results),
        "<h2>Loss</h2>",
        _figure(_curves(results, "curve", None), "Training loss, one line a run"),
        _figure(_curves(results, "validation_curve", "o"), "Validation loss, one line a run"),
        "<h2>Speed and memory</h2>",
        _figure(_bars(results, "tokens_per_second"), "Tokens a second of the training step"),
        _figure(_bars(results, "peak_memory_mib"), "Peak memory of the training process, MiB"),
        "<h2>Samples</h2>",
        *_samples(results["samples"]),
        "<h2>Settings</h2>",
        f"<pre>{html.escape(_settings_text(settings))}</pre>",
    ]


def markdown_table(results: dict[str, Any]) -> str:
    """One row a variant, the lowest validation loss first."""
    rows = [COLUMNS, ("---", *("---:" for _ in COLUMNS[1:])), *_rows(results)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _html_table(results: dict[str, Any]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in COLUMNS)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in _rows(results)
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


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


def _figure(figure: Figure, caption: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(
        r'(<svg [^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg [^>]*?) height="[^"]*"', r"\1", svg, count=1), count=1
    )
    caption = html.escape(caption)
    return f'<figure role="img" aria-label="{caption}">{svg}<figcaption>{caption}</figcaption></figure>'


def _spread(measure: dict[str, Any]) -> str:
    deviation = measure["standard_deviation"]
    return f"{measure['mean']:.3f}" + ("" if deviation is None else f" ± {deviation:.3f}")
