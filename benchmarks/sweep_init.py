"""The short sweep behind the `scaled` initialisation: tiny models on bytes of books, one line of JSON a run.

    python benchmarks/sweep_init.py DATA benchmarks/results/sweep_init.jsonl

Finished rows are kept; delete a line to run it again. Two runs at a time, one thread each; about four minutes a run
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
class Trial:
    """One training run. `score_rms` and `output_gain` are the constants of `layers/initialisation.py`.

    A scale of None is that of `scaled`.
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


TRIALS = [
    Trial("swiglu", init="reference"),
    Trial("swiglu", init="reference", learning_rate=4e-3),
    Trial("swiglu", 0.64, 2.5),
    Trial("flashmhf", init="reference"),
    Trial("flashmhf", init="reference", learning_rate=4e-3),
    Trial("flashmhf", 0.64, 2.5),
    Trial("swiglu", 0.64, 2.5, 4e-3),
    Trial("flashmhf", 0.64, 2.5, 4e-3),
    Trial("swiglu", 0.64, 5.0),
    Trial("flashmhf", 0.64, 5.0),
    Trial("swiglu", 1.0, 2.5),
    Trial("flashmhf", 1.0, 2.5),
    Trial("swiglu", 0.64, 2.5, 8e-3),
    Trial("flashmhf", 0.64, 2.5, 8e-3),
    Trial("flashmhf", 0.64, 2.5, 4e-3, gate_scale=1.0),
    Trial("flashmhf", 0.64, 2.5, 4e-3, q_norm=False),
    Trial("mhffn", 0.64, 2.5, 4e-3),
    Trial("pkv", 1.0, 0.1, 4e-3),
    Trial("pkv", 1.0, 1.0, 4e-3),
    Trial("pkv", 0.1, 0.1, 4e-3),
    Trial("dense_moe", 0.64, 2.5, 4e-3),
    Trial("swiglu", 0.64, 2.5, 1e-3),
    Trial("flashmhf", 0.64, 2.5, 1e-3),
    Trial("flashmhf", 0.64, 2.5, gate_scale=1.0),
    Trial("swiglu", 0.64, 2.5, 5e-4),
    Trial("flashmhf", 0.64, 2.5, 5e-4),
    Trial("swiglu", init="reference", learning_rate=1e-3),
    Trial("flashmhf", init="reference", learning_rate=1e-3),
    Trial("swiglu", 0.64, 2.5, 1e-3, seed=1),
    Trial("flashmhf", 0.64, 2.5, 1e-3, seed=1),
    Trial("mhffn", 0.64, 2.5, 1e-3),
    Trial("dense_moe", 0.64, 2.5, 1e-3),
    Trial("pkv", 1.0, 0.1, 1e-3),
    Trial("pkv", 1.0, 1.0, 1e-3),
    Trial("flashmhf", 0.64, 2.5, 1e-3, gate_scale=1.0),
]


def run_trial(trial: Trial, data: str) -> dict:
    """Trains one model and returns its row."""
    from flashmhf.data.config import DataConfig
    from flashmhf.layers import initialisation
    from flashmhf.models import FlashMHFConfig
    from flashmhf.training.arguments import parse_arguments
    from flashmhf.training.config import TrainConfig
    from flashmhf.training.run import train

    torch.set_num_threads(1)
    if trial.score_rms is not None:
        initialisation.SCALED_SCORE_RMS = initialisation.SCALED_PKV_KEY_RMS = trial.score_rms
    if trial.output_gain is not None:
        initialisation.SCALED_OUTPUT_GAIN = initialisation.SCALED_PKV_VALUE_STD = trial.output_gain
    config = FlashMHFConfig.from_preset(
        f"{trial.variant}-tiny",
        init=trial.init,
        q_norm=trial.q_norm,
        num_ffn_heads=trial.num_ffn_heads,
        score_scale=trial.score_scale,
        gate_scale=trial.gate_scale,
        output_scale=trial.output_scale,
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.json"
        file.write_text(json.dumps(config.to_dict()))
        flags = ["--max-steps", str(STEPS), "--per-device-train-batch-size", str(BATCH), "--seed", str(trial.seed)]
        flags += ["--learning-rate", str(trial.learning_rate), "--warmup-steps", "20", "--report-to", "none"]
        flags += ["--eval-strategy", "no", "--save-strategy", "no", "--disable-tqdm", "true"]
        data_config = DataConfig(source=data, context_length=CONTEXT, validation_tokens=2**16)
        result = train(TrainConfig(model=str(file), data=data_config), parse_arguments(flags, f"{folder}/run"))
    kept = ("parameters", "validation_loss", "train_loss", "tokens_per_second", "elapsed_s")
    return asdict(trial) | {name: getattr(result, name) for name in kept}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    done = []
    if arguments.output.exists():
        rows = [json.loads(line) for line in arguments.output.read_text().splitlines()]
        done = [Trial(**{name: row[name] for name in asdict(Trial("swiglu"))}) for row in rows]
    waiting = [trial for trial in TRIALS if trial not in done]
    with ProcessPoolExecutor(2, max_tasks_per_child=1) as pool:
        for future in [pool.submit(run_trial, trial, arguments.data) for trial in waiting]:
            row = future.result()
            assert math.isfinite(row["validation_loss"])
            with arguments.output.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
