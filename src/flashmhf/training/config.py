"""What a training run is about. Imports nothing heavy: the command line takes its defaults from here."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

from flashmhf.data.config import DataConfig

# options that may differ when a run is resumed
MAY_CHANGE = ("max_non_finite_steps", "regional_compilation", "fused_loss", "tensor_parallel")


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

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """From values by option of `flashmhf train`, with underscores ("data" is the SOURCE); ignores others."""
        data = {name: options[option] for name, option in _data_options().items() if option in options}
        own = {field.name: options[field.name] for field in fields(cls) if field.name in options}
        return cls(**{**own, "data": DataConfig(**data)})

    def options(self) -> dict[str, Any]:
        """The inverse of `from_options`, which is also what `flashmhf train --config` reads."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**own, **{option: getattr(self.data, name) for name, option in _data_options().items()}}

    def identity(self) -> dict[str, Any]:
        """The options in which a resumed run must equal the one before."""
        return {name: value for name, value in self.options().items() if name not in MAY_CHANGE}


def _data_options() -> dict[str, str]:
    """Fields of DataConfig and their options."""
    return {field.name: "data" if field.name == "source" else field.name for field in fields(DataConfig)}
