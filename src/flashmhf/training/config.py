"""What a training run is about. Imports nothing heavy: the command line takes its defaults from here."""

from dataclasses import asdict, dataclass, field
from typing import Any

from flashmhf.data.config import DataConfig


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run, beside the flags of transformers.TrainingArguments.

    Args:
        model: a preset, a JSON configuration (both start from new weights) or a model's folder (goes on from its).
        data: what it is trained on.
        mup_base_width: a hidden size for which the learning rate is; see `learning_rates`.
        max_non_finite_steps: so many in a row without a finite loss and gradient end the run.
        regional_compilation: every decoder layer goes through torch.compile, see `flashmhf.training.compilation`.
        fused_loss: "auto", "on" or "off", see `flashmhf.models.fused_loss`.
        tensor_parallel: over so many processes the heads are split, see `flashmhf.distributed.trainer`.
    """

    model: str
    data: DataConfig = field(default_factory=DataConfig)
    mup_base_width: int | None = None
    max_non_finite_steps: int = 5
    regional_compilation: bool = False
    fused_loss: str = "auto"
    tensor_parallel: int = 1

    def identity(self) -> dict[str, Any]:
        """What a run that is resumed must share with the one before; the rest may change."""
        data = asdict(self.data)
        return {
            "model": self.model,
            "data": data.pop("source"),
            **data,
            "mup_base_width": self.mup_base_width,
        }
