"""A comparison as a page: tables, curves in steps and in time, loss against size, speed and memory, samples."""

import html
from pathlib import Path
from typing import Any

from flashmhf.reports.curves import bars, curves, gate_maps, loss_against
from flashmhf.reports.page import figures, html_table, markdown_rows, write_page

COLUMNS = (
    "FFN",
    "validation loss (nats/token)",
    "held-out documents",
    "to the first (95 %)",
    "bits/byte",
    "parameters",
    "MFLOP/token",
    "layers",
    "d_ff",
    "tokens/s",
    "peak memory (MiB)",
)
EFFECT_COLUMNS = ("ablation", "held-out documents, to flashmhf (95 %)", "reading")
DEPTHS = {"same": "the same depth", "paper": "the paper's depths, 5 layers with several heads for 6 without"}


def write_report(results: dict[str, Any], file: Path) -> None:
    """Writes the page for what `comparison.compare` returns."""
    names = ", ".join(results["settings"]["variants"])
    write_page(file, f"Feed-forward layers compared: {names}", _sections(results))


def markdown_table(results: dict[str, Any]) -> str:
    """One row an entry, the lowest validation loss first; what the numbers are; ablations; what died."""
    effects = _effects(results)
    ablations = [markdown_rows(EFFECT_COLUMNS, effects)] if effects else []
    return "\n\n".join([markdown_rows(COLUMNS, _rows(results)), _note(results), *ablations, *_died(results)])


def _sections(results: dict[str, Any]) -> list[str]:
    return [
        _introduction(results),
        html_table(COLUMNS, _rows(results)),
        f"<p>{html.escape(_note(results))}</p>",
        *(f"<p><b>{html.escape(line)}</b></p>" for line in _died(results)),
        "<h2>Loss</h2>",
        figures(
            (curves(results, "curve", 0, None), "Training loss by step, one line a run, averaged over neighbours"),
            (curves(results, "validation_curve", 0, "o"), "Validation loss by step, one line a run"),
            (curves(results, "curve", 2, None), "Training loss by time in training"),
            (curves(results, "validation_curve", 2, "o"), "Validation loss by time in training"),
        ),
        f"<p>{_reading(results)}</p>",
        *_ablations(results),
        *_sweep(results),
        *_gates(results),
        "<h2>Size</h2>",
        figures(
            (loss_against(results, "parameters", "parameters"), "Validation loss against parameters, mean over seeds"),
            (
                loss_against(results, "forward_flops_per_token", "FLOPs/token, forward"),
                "Validation loss against FLOPs/token, mean over seeds",
            ),
        ),
        f"<h2>Speed and memory</h2><p>{_machine(results)}</p>",
        figures(
            (bars(results, "tokens_per_second"), "Tokens/s of training"),
            (bars(results, "peak_memory_mib"), "Peak memory of the training process, MiB"),
        ),
        "<h2>Samples</h2>",
        *_samples(results["samples"]),
        "<h2>Settings</h2>",
        f"<pre>{html.escape(_settings_text(results['settings']))}</pre>",
    ]


def _introduction(results: dict[str, Any]) -> str:
    settings = results["settings"]
    data = settings["data"]
    seeds = ", ".join(map(str, settings["seeds"]))
    tokens = next(run["tokens"] for run in results["runs"] if run["status"] == "finished")
    best = _ranked(results)[0]
    return (
        f"<p>Trained from new weights on <b>{html.escape(data['source'])}</b> (tokenizer "
        f"{html.escape(data['tokenizer'])}), {tokens:,} tokens each in blocks of {data['context_length']}, "
        f"seeds {seeds}; matched {settings['match']} at {DEPTHS[settings['depth']]}, all else alike, and of each seed "
        f"the same order of the data. Lowest validation loss here: <b>{html.escape(best['variant'])}</b>. A model "
        f"without context could reach {results['unigram_entropy_nats']:.3f} nats/token (the unigram entropy).</p>"
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
            f"{row['forward_flops_per_token'] / 1e6:,.1f}",
            str(row["layers"]),
            f"{row['intermediate_size']:,}",
            _mean(row["tokens_per_second"]),
            _mean(row["peak_memory_mib"]),
        )
        for row in _ranked(results)
    ]


def _died(results: dict[str, Any]) -> list[str]:
    died = [f"{run['variant']} with seed {run['seed']}" for run in results["runs"] if run["status"] == "failed"]
    died += [
        f"{row['variant']} with seed {row['seed']} at {row['learning_rate']:g}"
        for row in results["sweep"]
        if row["validation_loss"] is None and not row["chosen"]
    ]
    return [f"These runs died and are in no mean: {', '.join(died)}."] if died else []


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
    rows = []
    for row in results["sweep"]:
        rates = sorted(other["learning_rate"] for other in results["sweep"] if other["variant"] == row["variant"])
        edge = ", at the edge of those tried" if row["learning_rate"] in (rates[0], rates[-1]) else ""
        loss = "died" if row["validation_loss"] is None else f"{row['validation_loss']:.3f}"
        rows.append((row["variant"], f"{row['learning_rate']:g}", loss, f"taken{edge}" if row["chosen"] else ""))
    columns = ("FFN", "learning rate", "validation loss, first seed", "")
    note = "<p>Chosen by the first seed's validation loss, which stays in the means; ablations take flashmhf's.</p>"
    return ["<h2>Learning rates</h2>", note, html_table(columns, rows)]


def _reading(results: dict[str, Any]) -> str:
    """What the intervals decide, in words."""
    first = results["settings"]["variants"][0]
    lines = []
    if all(row["difference"] is None for row in results["variants"]):
        return f"Nothing could be compared with {html.escape(first)}."
    for row in results["variants"]:
        if row["difference"] is None:
            continue
        verdict = html.escape(_verdict(row["difference"], first))
        lines.append(f"<b>{html.escape(row['variant'])}</b>: {verdict} ({_difference(row['difference'])})")
    return f"On the held-out documents: {'; '.join(lines)}."


def _note(results: dict[str, Any]) -> str:
    """What the columns and intervals are."""
    settings = results["settings"]
    documents = max((row["documents"]["number"] or 0 for row in results["variants"]), default=0)
    compared = [row["difference"]["nats_per_token"] for row in results["variants"] if row["difference"]]
    runs = max((found["runs"] for found in compared), default=1)
    over = f"Student's t over {runs} seeds" if runs > 1 else "nothing else: one seed says nothing of another"
    return (
        f"±: standard deviation over seeds. Held-out documents: nats/token on {documents} of them, of each the first "
        f"{settings['document_bytes']:,} bytes. Differences are paired by document and seed; their 95 % intervals "
        f"cover a bootstrap over documents and {over}. Of twenty such intervals around no difference one excludes 0."
    )


def _machine(results: dict[str, Any]) -> str:
    jobs = results["jobs"]
    alone = "each run alone" if jobs == 1 else f"{jobs} runs at a time, which share the machine"
    return f"Medians over the steps of a run, means over seeds; {alone}."


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
    note = "<p>1: all sub-networks alike; 0: one alone. Least and most of the heads, first seed that ended well.</p>"
    maps = [(gate_maps(heads), f"Gates of {name}") for name, heads in results["gates"].items() if heads]
    return ["<h2>Gates</h2>", note, html_table(columns, rows), figures(*maps)]


def _range(values: list[float]) -> str:
    return f"{min(values):.3f} to {max(values):.3f}"


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
