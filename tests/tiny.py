"""Small stand-ins for what takes long to make."""

from pathlib import Path
from typing import Any

from flashmhf.training.run_files import TrainResult


def train_result(folder: Path, **changes: Any) -> TrainResult:
    """The result of a training run in `folder` that has finished."""
    values: dict[str, Any] = {
        "steps": 6,
        "tokens": 768,
        "parameters": 10_000,
        "train_loss": 2.5,
        "validation_loss": 2.25,
        "bits_per_byte": 3.25,
        "tokens_per_second": 1000.0,
        "peak_memory_mib": 512.0,
        "elapsed_s": 1.5,
        "skipped_steps": 0,
        "tokens_used": {"books": 768},
        "bad_data": "",
        "interrupted_by": None,
        "output_dir": str(folder),
    }
    return TrainResult(**(values | changes))
