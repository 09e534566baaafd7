"""What is compared: which layers, on which backbones, trained how."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from flashmhf.data.config import DataConfig, parse_sources
from flashmhf.data.tokenizer import fit_vocabulary, load_tokenizer
from flashmhf.errors import InputError
from flashmhf.models import FlashMHFConfig
from flashmhf.models.checks import check_context_length
from flashmhf.models.configuration import FFN_TYPES
from flashmhf.models.loading import load_config
from flashmhf.ops.prologue import GATES
from flashmhf.training.config import TrainConfig

ABLATED = "flashmhf"  # the variant that ablations change
WITH_SUBNETWORKS = ("flashmhf", "dense_moe")
SWITCH = {"on": True, "off": False}
MATCHES = ("parameters", "flops")
DEPTHS = ("same", "paper")


@dataclass(frozen=True)
class Variant:
    """A feed-forward layer, a value of `ffn_type`, and at most one ablation (option, value) of it."""

    ffn_type: str
    ablation: tuple[str, str] | None = None

    @property
    def name(self) -> str:
        return self.ffn_type if self.ablation is None else f"{self.ffn_type}-{'-'.join(self.ablation)}"

    def changes(self, base: FlashMHFConfig) -> dict[str, Any]:
        """What the ablation changes in a configuration with the backbone of `base`."""
        if self.ablation is None:
            return {}
        option, value = self.ablation
        if option == "gate-type":
            return {"gate_type": None if value == "none" else value}
        if option in ("q-norm", "projections"):
            return {"q_norm" if option == "q-norm" else "ffn_projections": SWITCH[value]}
        if option == "subnetworks":
            return {"num_subnetworks": int(value)}
        heads, rest = divmod(base.hidden_size, int(value))
        if rest or heads == 0:
            raise InputError(f"head-dim: expected a divisor of the hidden size {base.hidden_size}, got {value}")
        return {"num_ffn_heads": heads, "num_ffn_kv_heads": heads}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The settings of a comparison.

    Args:
        variants: values of `ffn_type`; differences are to the first.
        models: presets, files or folders whose configurations give the backbones and the sizes to match.
        train: the configuration of every run, except for its model; its data is one SOURCE.
        training_flags: flags of transformers.TrainingArguments for every run, without seed and logging steps.
        seeds: each variant is trained once per seed, which fixes the initial weights and the order of the data.
        learning_rates: per variant. With several, the one with the lowest validation loss with the first seed is taken
            for the other seeds. Ablations take that of `flashmhf`. Without any, the one in training_flags.
        document_bytes: how much of each held-out document is scored, from its beginning.
        ablations: options (`gate-type`, `q-norm`, `projections`, `head-dim`, `subnetworks`) and values; each value is a
            variant of its own, `flashmhf` with only that changed.
        match: the backbone's "parameters", or its forward "flops" per token.
        depth: "same" for all, or the "paper"'s: 5 layers with several heads for 6 without.
    """

    settings_file: ClassVar[str] = "compare.json"  # in its folder
    noun: ClassVar[str] = "comparison"  # in messages

    variants: tuple[str, ...]
    models: tuple[str, ...]
    train: TrainConfig
    training_flags: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    learning_rates: dict[str, tuple[float, ...]] = field(default_factory=dict)
    document_bytes: int = 2**16
    ablations: dict[str, tuple[str, ...]] = field(default_factory=dict)
    match: str = "parameters"
    depth: str = "same"

    @property
    def data(self) -> DataConfig:
        return self.train.data

    def __post_init__(self) -> None:
        self._check_lists()
        if self.document_bytes < 1:
            raise InputError(f"document-bytes: expected 1 or more, got {self.document_bytes}")
        if parse_sources(self.data.source) != [(1.0, self.data.source)]:
            raise InputError(f"data: expected one SOURCE without a weight, got {self.data.source!r}")
        for option, value, choices in (("match", self.match, MATCHES), ("depth", self.depth, DEPTHS)):
            if value not in choices:
                raise InputError(f"{option}: expected {' or '.join(choices)}, got {value!r}")
        self._check_ablations()

    def _check_lists(self) -> None:
        lists: dict[str, tuple] = {"variants": self.variants, "seeds": self.seeds, "model": self.models}
        for option, values in lists.items():
            if not values:
                raise InputError(f"{option}: expected at least one, got none")
        lists |= self.ablations
        lists |= {f"learning-rate of {name}": rates for name, rates in self.learning_rates.items()}
        for option, values in lists.items():
            if len(set(values)) < len(values):
                raise InputError(f"{option}: expected each once, got {', '.join(map(str, values))}")
        for name in self.variants:
            if name not in FFN_TYPES:
                raise InputError(f"variants: expected some of {', '.join(FFN_TYPES)}, got {name!r}")
        for name in self.learning_rates:
            if name not in self.variants:
                raise InputError(
                    f"learning-rate: expected one of the variants {', '.join(self.variants)}, got {name!r}"
                )

    def _check_ablations(self) -> None:
        choices = {"gate-type": (*GATES, "none"), "q-norm": tuple(SWITCH), "projections": tuple(SWITCH)}
        for option, values in self.ablations.items():
            if values and ABLATED not in self.variants:
                raise InputError(f"{option}: expected {ABLATED} among the variants, got {', '.join(self.variants)}")
            for value in values:
                if option in choices and value not in choices[option]:
                    raise InputError(f"{option}: expected some of {', '.join(choices[option])}, got {value!r}")
                if option not in choices and not (value.isdecimal() and int(value) > 0):
                    raise InputError(f"{option}: expected positive whole numbers, got {value!r}")

    def bases(self) -> dict[str, FlashMHFConfig]:
        """The configuration of each model, with the tokenizer's vocabulary.

        Raises:
            InputError: it is of another family, its context is shorter than the data's `context_length`, or it does not
                give the number of sub-networks that a variant has.
        """
        tokenizer = load_tokenizer(self.data.tokenizer)
        bases = {}
        for name in self.models:
            base = load_config(name)
            if not isinstance(base, FlashMHFConfig):
                raise InputError(f"model: expected a flashmhf configuration, got one of type {base.model_type!r}")
            for variant in self.variants:
                if variant in WITH_SUBNETWORKS and base.ffn_type not in WITH_SUBNETWORKS:
                    raise InputError(
                        f"model: expected one of {' or '.join(WITH_SUBNETWORKS)}, whose sub-networks and norm "
                        f"{variant} takes over, got {name} of {base.ffn_type}"
                    )
            check_context_length(base, self.data.context_length)
            fit_vocabulary(base, tokenizer)
            bases[name] = base
        return bases

    def all_variants(self) -> Iterator[Variant]:
        """The variants, then the ablations."""
        for ffn_type in self.variants:
            yield Variant(ffn_type)
        for option, values in self.ablations.items():
            for value in values:
                yield Variant(ABLATED, (option, value))
