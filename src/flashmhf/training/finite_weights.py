"""Whether a model's weights are finite. Once they are not, no later step can repair them: a run ends."""

from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from flashmhf.errors import RunError
from flashmhf.models.loading import non_finite_weight
from flashmhf.training.checkpoints import checkpoints


def check_weights(model: nn.Module, accelerator: Accelerator, step: int, output_dir: Path) -> None:
    """Ends the run on all processes if the weights of any of them are not finite.

    Args:
        model: as it is after `step`.
        accelerator: of the processes.
        step: the last one that was taken.
        output_dir: holds the run's checkpoints.

    Raises:
        RunError: names a parameter and the checkpoint to continue from.
    """
    name = non_finite_weight(model)
    found = torch.tensor(float(name is not None), device=accelerator.device)
    if accelerator.reduce(found, "sum").item() == 0:
        return
    kept = next(iter(checkpoints(output_dir)), None) if output_dir.is_dir() else None
    then = "no checkpoint has been written yet" if kept is None else f"--resume continues from {kept.name}"
    raise RunError(
        f"weights: expected finite values after step {step}, got NaN or infinity in {name or 'another process'}; they "
        f"were not saved, {then}; a lower --learning-rate or --max-grad-norm may help"
    )
