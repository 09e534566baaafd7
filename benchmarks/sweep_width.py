"""Loss over learning rate and width: does the best learning rate transfer from one width to the next?

    python benchmarks/sweep_width.py DATA benchmarks/results/sweep_width.jsonl [--minutes 30]
    python benchmarks/sweep_width.py DATA ROWS --minutes 0 --picture docs/width_sweep.png

Two-layer models with head dim 32 on bytes, equal parameters at every width, one thread, one JSON line per run.
Finished runs are kept, and no run starts after `--minutes`.
"""

import argparse
import json
import math
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flashmhf.benchmarking.measuring import Row
from flashmhf.reports.render import png
from flashmhf.reports.style import PALETTE, legend_below, new_figure
from flashmhf.reports.table import Table
from flashmhf.reports.ticks import logarithmic

STEPS, BATCH, CONTEXT, WARMUP = 160, 4, 128, 16
BASE_WIDTH, HEAD_DIM = 64, 32
SUBNETWORK_SIZE = 74  # with E = d / 32: d_ff = 2.3125 d, as many parameters as a SwiGLU with 3 d
# (init, by fan-in, width) -> exponents of learning rates, powers of 1/2 around the best.
GRID: dict[tuple[str, bool, int], tuple[int, ...]] = {
    ("scaled", False, 64): (5, 6, 7, 8, 9, 10),
    ("scaled", False, 128): (8, 7, 9),
    ("scaled", True, 128): (7, 6, 8),
    ("scaled", False, 32): (7, 6, 8, 5),
    ("scaled", True, 32): (7, 8, 6),
    ("reference", False, 64): (7, 6, 8),
    ("scaled", True, 256): (7, 8, 6),
    ("scaled", False, 256): (9, 8, 10),
}
SEEDS, LARGE = 2, 256


@dataclass(frozen=True)
class Run:
    """One training run. With `by_fan_in` the learning rate is that at BASE_WIDTH."""

    variant: str
    width: int
    learning_rate: float
    init: str = "scaled"
    by_fan_in: bool = False
    seed: int = 0


def runs() -> list[Run]:
    """The complete grid, seed by seed, the large width first. At BASE_WIDTH both rules agree for `scaled`."""
    grid = [
        Run(variant, width, 2.0**-power, init, by_fan_in, seed)
        for seed in range(SEEDS)
        for (init, by_fan_in, width), powers in GRID.items()
        for power in powers
        for variant in ("flashmhf", "swiglu")
    ]
    return sorted(grid, key=lambda run: run.width < LARGE)


def configuration(run: Run) -> dict[str, Any]:
    """The FlashMHFConfig values of a run."""
    heads = run.width // HEAD_DIM
    values = {"ffn_type": run.variant, "init": run.init, "hidden_size": run.width, "num_hidden_layers": 2}
    values |= {"num_attention_heads": heads, "tie_word_embeddings": False, "max_position_embeddings": CONTEXT}
    if run.variant == "swiglu":
        return values | {"intermediate_size": 3 * run.width}
    sizes = {"num_ffn_heads": heads, "num_subnetworks": heads, "intermediate_size": heads * SUBNETWORK_SIZE}
    return values | sizes | {"q_norm": True}


def train_run(run: Run, data: str) -> Row:
    """Trains one model and returns its row."""
    from flashmhf.data.config import DataConfig
    from flashmhf.models import FlashMHFConfig
    from flashmhf.training.arguments import parse_arguments
    from flashmhf.training.config import TrainConfig
    from flashmhf.training.run import train

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.json"
        file.write_text(json.dumps(FlashMHFConfig(**configuration(run)).to_dict()))
        flags = ["--max-steps", str(STEPS), "--per-device-train-batch-size", str(BATCH), "--seed", str(run.seed)]
        flags += ["--learning-rate", str(run.learning_rate), "--warmup-steps", str(WARMUP), "--report-to", "none"]
        flags += ["--eval-strategy", "no", "--save-strategy", "no", "--disable-tqdm", "true"]
        base_width = BASE_WIDTH if run.by_fan_in else None
        config = TrainConfig(
            model=str(file),
            data=DataConfig(source=data, context_length=CONTEXT, validation_tokens=2**15),
            mup_base_width=base_width,
        )
        result = train(config, parse_arguments(flags, f"{folder}/run"))
    return asdict(run) | {name: getattr(result, name) for name in ("parameters", "validation_loss", "elapsed_s")}


def sweep(data: str, output: Path, minutes: float) -> None:
    import torch

    torch.set_num_threads(1)
    finished = {Run(**{name: row[name] for name in asdict(Run("", 0, 0.0))}) for row in read(output)}
    started = time.monotonic()
    for run in runs():
        if run in finished or time.monotonic() - started >= 60 * minutes:
            continue
        row = train_run(run, data)
        assert math.isfinite(row["validation_loss"])
        with output.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


def read(file: Path) -> list[Row]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def losses(rows: list[Row], **chosen: Any) -> dict[float, list[float]]:
    """Learning rate -> validation losses of its seeds, for the rows with these values."""
    found: dict[float, list[float]] = {}
    for row in sorted(rows, key=lambda row: (row["learning_rate"], row["seed"])):
        if all(row[name] == value for name, value in chosen.items()):
            found.setdefault(row["learning_rate"], []).append(row["validation_loss"])
    return found


def lines_of(rows: list[Row]) -> list[tuple[str, bool, str, int]]:
    """(init, by_fan_in, variant, width) of everything measured; BASE_WIDTH appears under both rules."""
    found = {(row["init"], row["by_fan_in"], row["variant"], row["width"]) for row in rows}
    found |= {(init, True, *rest) for init, _, *rest in found if init == "scaled" and rest[1] == BASE_WIDTH}
    return sorted(found)


def line(rows: list[Row], init: str, by_fan_in: bool, variant: str, width: int) -> dict[float, list[float]]:
    """The losses of one of `lines_of`."""
    by_fan_in = by_fan_in and width != BASE_WIDTH
    return losses(rows, init=init, by_fan_in=by_fan_in, variant=variant, width=width)


def table(rows: list[Row]) -> str:
    """Markdown: the losses of every seed, one column per learning rate; the best mean of three or more is bold."""
    rates = sorted({row["learning_rate"] for row in rows})
    lines = []
    for init, by_fan_in, variant, width in lines_of(rows):
        found = line(rows, init, by_fan_in, variant, width)
        best = min(found, key=lambda rate: sum(found[rate]) / len(found[rate]))
        cells = {rate: ", ".join(f"{loss:.3f}" for loss in found.get(rate, [])) for rate in rates}
        if len(found) > 2:
            cells[best] = f"**{cells[best]}**"
        rule = "by fan-in" if by_fan_in else "one rate"
        lines.append([f"{variant} {width}, `{init}`, {rule}", *cells.values()])
    return Table(["", *(f"2^{math.log2(rate):.0f}" for rate in rates)], lines).markdown()


def draw(rows: list[Row], file: Path) -> None:
    """Loss against learning rate: one panel per rule and variant, one line per width."""
    shown = [line for line in lines_of(rows) if line[0] == "scaled"]
    figure = new_figure(10, 7)
    axes = figure.subplots(2, 2, sharex=True, sharey=True)
    widths = sorted({width for *_, width in shown})
    colours = dict(zip(widths, PALETTE, strict=False))
    for _, by_fan_in, variant, width in shown:
        found = line(rows, "scaled", by_fan_in, variant, width)
        panel = axes[int(variant == "swiglu")][int(by_fan_in)]
        means = [sum(values) / len(values) for values in found.values()]
        panel.plot(list(found), means, "-", color=colours[width], label=f"width {width}")
        points = [(rate, loss) for rate, values in found.items() for loss in values]
        panel.plot(*zip(*points, strict=True), "o", color=colours[width], markersize=4)
        rule = f"rates by fan-in from {BASE_WIDTH}" if by_fan_in else "one learning rate"
        panel.set(title=f"{variant}, {rule}", xlabel="learning rate", ylabel="validation loss, nats/byte")
        panel.grid(alpha=0.3)
    for panel in axes.flat:
        logarithmic(panel, "x")
    legend_below(figure)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(png(figure, dpi=80))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("output", type=Path)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    sweep(arguments.data, arguments.output, arguments.minutes)
    rows = read(arguments.output)
    print(table(rows))
    if arguments.picture is not None:
        draw(rows, arguments.picture)


if __name__ == "__main__":
    main()
