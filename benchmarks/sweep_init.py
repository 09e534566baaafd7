"""The short sweep behind the `scaled` initialisation: tiny models on bytes of books, one JSON line per run.

    python benchmarks/sweep_init.py DATA benchmarks/results/sweep_init.jsonl

Finished runs are kept; delete a line to repeat its run. Two runs at a time, one thread each; about four minutes per run
on one core.
"""

import argparse
import json
import math
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

STEPS, BATCH, CONTEXT = 300, 8, 256


@dataclass(frozen=True)
class Run:
    """One training run. `score_rms` and `output_gain` are the constants of `layers/initialisation.py`.

    None is the scale of `scaled`.
    """

    variant: str
    score_rms: float | None = None
    output_gain: float | None = None
    learning_rate: float = 2e-3
    seed: int = 0
    init: str = "scaled"
    q_norm: bool = True
    num_ffn_heads: int = 4
    score_scale: float | None = None
    gate_scale: float | None = None
    output_scale: float | None = None


RUNS = [
    Run("swiglu", init="reference"),
    Run("swiglu", init="reference", learning_rate=4e-3),
    Run("swiglu", 0.64, 2.5),
    Run("flashmhf", init="reference"),
    Run("flashmhf", init="reference", learning_rate=4e-3),
    Run("flashmhf", 0.64, 2.5),
    Run("swiglu", 0.64, 2.5, 4e-3),
    Run("flashmhf", 0.64, 2.5, 4e-3),
    Run("swiglu", 0.64, 5.0),
    Run("flashmhf", 0.64, 5.0),
    Run("swiglu", 1.0, 2.5),
    Run("flashmhf", 1.0, 2.5),
    Run("swiglu", 0.64, 2.5, 8e-3),
    Run("flashmhf", 0.64, 2.5, 8e-3),
    Run("flashmhf", 0.64, 2.5, 4e-3, gate_scale=1.0),
    Run("flashmhf", 0.64, 2.5, 4e-3, q_norm=False),
    Run("mhffn", 0.64, 2.5, 4e-3),
    Run("pkv", 1.0, 0.1, 4e-3),
    Run("pkv", 1.0, 1.0, 4e-3),
    Run("pkv", 0.1, 0.1, 4e-3),
    Run("dense_moe", 0.64, 2.5, 4e-3),
    Run("swiglu", 0.64, 2.5, 1e-3),
    Run("flashmhf", 0.64, 2.5, 1e-3),
    Run("flashmhf", 0.64, 2.5, gate_scale=1.0),
    Run("swiglu", 0.64, 2.5, 5e-4),
    Run("flashmhf", 0.64, 2.5, 5e-4),
    Run("swiglu", init="reference", learning_rate=1e-3),
    Run("flashmhf", init="reference", learning_rate=1e-3),
    Run("swiglu", 0.64, 2.5, 1e-3, seed=1),
    Run("flashmhf", 0.64, 2.5, 1e-3, seed=1),
    Run("mhffn", 0.64, 2.5, 1e-3),
    Run("dense_moe", 0.64, 2.5, 1e-3),
    Run("pkv", 1.0, 0.1, 1e-3),
    Run("pkv", 1.0, 1.0, 1e-3),
    Run("flashmhf", 0.64, 2.5, 1e-3, gate_scale=1.0),
]


def train_run(run: Run, data: str) -> dict:
    """Trains one model and returns its row."""
    from flashmhf.data.config import DataConfig
    from flashmhf.layers import initialisation
    from flashmhf.models import FlashMHFConfig
    from flashmhf.training.arguments import parse_arguments
    from flashmhf.training.config import TrainConfig
    from flashmhf.training.run import train

    torch.set_num_threads(1)
    if run.score_rms is not None:
        initialisation.SCALED_SCORE_RMS = initialisation.SCALED_PKV_KEY_RMS = run.score_rms
    if run.output_gain is not None:
        initialisation.SCALED_OUTPUT_GAIN = initialisation.SCALED_PKV_VALUE_STD = run.output_gain
    config = FlashMHFConfig.from_preset(
        f"{run.variant}-tiny",
        init=run.init,
        q_norm=run.q_norm and run.variant in ("flashmhf", "mhffn"),
        num_ffn_heads=run.num_ffn_heads,
        score_scale=run.score_scale,
        gate_scale=run.gate_scale,
        output_scale=run.output_scale,
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.json"
        file.write_text(json.dumps(config.to_dict()))
        flags = ["--max-steps", str(STEPS), "--per-device-train-batch-size", str(BATCH), "--seed", str(run.seed)]
        flags += ["--learning-rate", str(run.learning_rate), "--warmup-steps", "20", "--report-to", "none"]
        flags += ["--eval-strategy", "no", "--save-strategy", "no", "--disable-tqdm", "true"]
        data_config = DataConfig(source=data, context_length=CONTEXT, validation_tokens=2**16)
        result = train(TrainConfig(model=str(file), data=data_config), parse_arguments(flags, f"{folder}/run"))
    kept = ("parameters", "validation_loss", "train_loss", "tokens_per_second", "elapsed_s")
    return asdict(run) | {name: getattr(result, name) for name in kept}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    done = []
    if arguments.output.exists():
        rows = [json.loads(line) for line in arguments.output.read_text().splitlines()]
        done = [Run(**{name: row[name] for name in asdict(Run("swiglu"))}) for row in rows]
    waiting = [run for run in RUNS if run not in done]
    with ProcessPoolExecutor(2, max_tasks_per_child=1) as pool:
        for future in [pool.submit(train_run, run, arguments.data) for run in waiting]:
            row = future.result()
            assert math.isfinite(row["validation_loss"])
            with arguments.output.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
