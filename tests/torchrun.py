"""`flashmhf train` under torchrun on the CPU, as users start it."""

import subprocess
import sys
from pathlib import Path

from flashmhf.training.config import TrainConfig

FLAGS = ["--context-length", "32", "--learning-rate", "1e-2", "--logging-steps", "1", "--eval-strategy", "no", "--json"]


def command(run: TrainConfig, folder: Path, processes: int, *flags: str, launcher: tuple[str, ...] = ()) -> list[str]:
    """Four sequences per step with any number of processes."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    train = [
        "-m",
        "flashmhf",
        "train",
        "--model",
        run.model,
        "--data",
        run.data.source,
        "--output-dir",
        str(folder),
        "--optimizer",
        run.optimizer,
        *FLAGS,
    ]
    batch = [
        "--per-device-train-batch-size",
        str(4 // processes),
        "--validation-tokens",
        str(run.data.validation_tokens),
    ]
    return [*torchrun, *launcher, *train, *batch, *flags]


def torchrun(*arguments, **options) -> subprocess.CompletedProcess:
    return subprocess.run(command(*arguments, **options), capture_output=True, text=True, timeout=240, check=False)
