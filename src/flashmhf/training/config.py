"""What is trained, on what, and how. Imports nothing heavy: the command line takes its defaults from here."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

from flashmhf.data.config import DataConfig

RUN_FILE = "run.json"  # in a run's folder, see `run_files`
DIRECTORY = "directory"  # in that file: where the run was started, which relative paths start from
SETTINGS = "training_arguments"  # in that file: every flag of transformers.TrainingArguments
# Options that may differ when a run is resumed.
MAY_CHANGE = ("max_non_finite_steps", "regional_compilation", "fused_loss", "tensor_parallel")
ADAMW, MUON = OPTIMIZERS = ("adamw", "muon")
NAMES = ("model", "data", "tokenizer")  # of what may be found under another path; `fingerprints` tell whether it is


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run, apart from transformers.TrainingArguments.

    Args:
        model: a preset or a JSON configuration (both start from new weights), or a model's folder (starts from its).
        data: what it is trained on.
        optimizer: "muon" for the layers' matrices, see `flashmhf.training.muon`, or "adamw".
        mup_base_width: the hidden size for which the learning rate was tuned; see `learning_rates`.
        max_non_finite_steps: this many steps in a row without a finite loss and gradient end the run.
        regional_compilation: compile each decoder layer, see `flashmhf.training.compilation`.
        fused_loss: "auto", "on" or "off", see `flashmhf.models.fused_loss`.
        tensor_parallel: the number of processes to split the heads over, see `flashmhf.distributed.tensor_parallel`.
    """

    model: str
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: str = MUON
    mup_base_width: int | None = None
    max_non_finite_steps: int = 5
    regional_compilation: bool = False
    fused_loss: str = "auto"
    tensor_parallel: int = 1

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """From the options of `flashmhf train` by name, such as "fused_loss"; ignores other names."""
        own = {field.name: options[field.name] for field in fields(cls) if field.name in options}
        return cls(**{**own, "data": DataConfig.from_options(options)})

    def options(self) -> dict[str, Any]:
        """The inverse of `from_options`: what `flashmhf train --config` reads."""
        own = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "data"}
        return {**own, **self.data.options()}

    def identity(self) -> dict[str, Any]:
        """The options in which a resumed run must equal the one before."""
        return {name: value for name, value in self.options().items() if name not in MAY_CHANGE}
