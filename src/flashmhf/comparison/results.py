"""What a comparison found, and `results.json`, the file that holds it."""

import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

from flashmhf.comparison.settings import Comparison
from flashmhf.comparison.verdict import Verdict
from flashmhf.errors import InputError
from flashmhf.evaluation.differences import Difference
from flashmhf.files import read_results, write_json
from flashmhf.serialization import from_plain
from flashmhf.training.instability import Instability

R = TypeVar("R")
RESULTS_FILE = "results.json"
VERSION = 2  # of the file's format; files from before it had one are refused
FINISHED, FAILED = "finished", "failed"


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A loss by step and by seconds of training; the three have the same length."""

    steps: tuple[int, ...] = ()
    losses: tuple[float, ...] = ()
    elapsed_s: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """One training run. The measures are None if it failed.

    Attributes:
        variant: name of the `VariantResult` that it belongs to.
        folder: its name under `runs/`.
        status: "finished" or "failed".
        validation_loss: nats/token.
        tokens_per_second: median over the log.
        elapsed_s: in training, over all processes of the run.
        instabilities: signs of divergence, at most one of each kind, of a run that failed, too.
    """

    variant: str
    ffn_type: str
    model: str
    seed: int
    learning_rate: float | None
    folder: str
    status: str
    curve: Curve = Curve()
    validation_curve: Curve = Curve()
    steps: int | None = None
    tokens: int | None = None
    parameters: int | None = None
    train_loss: float | None = None
    validation_loss: float | None = None
    bits_per_byte: float | None = None
    skipped_steps: int | None = None
    tokens_per_second: float | None = None
    peak_memory_mib: float | None = None
    elapsed_s: float | None = None
    instabilities: tuple[Instability, ...] = ()

    @property
    def finished(self) -> bool:
        return self.status == FINISHED


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A measure of a variant's finished runs, one value per seed."""

    mean: float | None
    standard_deviation: float | None
    values: tuple[float, ...]

    @classmethod
    def of(cls, found: Iterable[float | None]) -> Self:
        """Of the values that are not None."""
        values = tuple(value for value in found if value is not None)
        return cls(
            mean=statistics.fmean(values) if values else None,
            standard_deviation=statistics.stdev(values) if len(values) > 1 else None,
            values=values,
        )


@dataclass(frozen=True, kw_only=True)
class DocumentsResult:
    """Nats/token on the held-out documents, over seeds, and the number of documents."""

    nats_per_token: Spread
    number: int | None


@dataclass(frozen=True, kw_only=True)
class Differences:
    """One variant minus another on the held-out documents, paired by document and seed.

    Attributes:
        baseline: the other variant.
        nats_per_token, bits_per_byte: without an interval if the seeds are fewer than a verdict needs.
        verdict: on the nats/token.
    """

    baseline: str
    nats_per_token: Difference
    bits_per_byte: Difference
    verdict: Verdict


@dataclass(frozen=True, kw_only=True)
class VariantResult:
    """One variant on one backbone, over its seeds.

    Attributes:
        variant: its name.
        ablation: option and value, or None.
        learning_rate: None for that of the flags.
        failed_seeds: seeds whose runs failed; they are in no mean.
        difference: to the first variant on the same backbone; None for that variant.
        effect: of an ablation, to the layer that it changes.
    """

    variant: str
    ffn_type: str
    model: str
    ablation: tuple[str, str] | None
    parameters: int
    forward_flops_per_token: float
    layers: int
    intermediate_size: int
    learning_rate: float | None
    failed_seeds: tuple[int, ...]
    validation_loss: Spread
    bits_per_byte: Spread
    tokens_per_second: Spread
    peak_memory_mib: Spread
    elapsed_s: Spread
    documents: DocumentsResult
    difference: Differences | None
    effect: Differences | None


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """A learning rate that was tried with the first seed."""

    variant: str
    seed: int
    learning_rate: float
    validation_loss: float | None
    chosen: bool


@dataclass(frozen=True, kw_only=True)
class GateUsage:
    """The gate of one head: mean entropy, and entropy of the mean (how even the load is); 1 is uniform."""

    layer: int
    head: int
    entropy: float
    load: float


@dataclass(frozen=True, kw_only=True)
class Samples:
    """The same prompt continued by each variant."""

    prompt: str
    continuations: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class ComparisonResult:
    """Everything that tables and report show.

    Attributes:
        jobs: runs that shared the machine.
        unigram_entropy_nats: nats/token of the best model without context, on the held-out documents.
        sweep: learning rates that were tried.
        gates: by variant; empty for layers without a gate.
    """

    settings: Comparison
    jobs: int
    unigram_entropy_nats: float
    sweep: tuple[SweepResult, ...]
    variants: tuple[VariantResult, ...]
    gates: dict[str, tuple[GateUsage, ...]]
    runs: tuple[RunResult, ...]
    samples: Samples

    def as_dict(self) -> dict[str, Any]:
        """As results.json holds it."""
        return {"version": VERSION, **asdict(self)}


def write_comparison(result: ComparisonResult, file: Path) -> None:
    """Writes results.json."""
    write_json(file, result.as_dict())


def read_comparison(file: Path) -> ComparisonResult:
    """Reads what `write_comparison` wrote.

    Raises:
        InputError: the file is damaged or has another version; names it.
    """
    return read_result(ComparisonResult, file, VERSION, noun="comparison", command="compare")


def read_result(kind: type[R], file: Path, version: int, *, noun: str, command: str) -> R:
    """What a command that keeps finished runs has written of a dataclass `kind`, with its version.

    Raises:
        InputError: the file is damaged or has another version; names it.
    """
    advice = f"run flashmhf {command} again, which keeps finished runs"
    content = read_results(file, version, noun=noun, advice=advice)
    try:
        return from_plain(kind, content)
    except ValueError as error:
        raise InputError(f"{file}: {error}") from error
