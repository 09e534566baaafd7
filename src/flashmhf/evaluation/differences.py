"""The difference of two models' losses on the same documents, paired by document."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flashmhf.errors import InputError
from flashmhf.evaluation import Evaluation
from flashmhf.evaluation.bootstrap import ratio_interval

NATS_PER_TOKEN, BITS_PER_BYTE = "nats_per_token", "bits_per_byte"


@dataclass(frozen=True)
class Difference:
    """A measure of the first model minus that of the second.

    Attributes:
        measure: `nats_per_token` or `bits_per_byte`.
        mean: over the runs.
        by_run: of each run.
        interval: 95 %, over documents and runs; of one run, over documents alone, which tells two models apart but
            not their layers. None for one document.
        document_error: half of the 95 % interval over documents alone, for these runs; None for one document.
        documents: their number.
    """

    measure: str
    mean: float
    by_run: tuple[float, ...]
    interval: tuple[float, float] | None
    document_error: float | None
    documents: int


def paired_difference(
    first: Evaluation | Sequence[Evaluation],
    second: Evaluation | Sequence[Evaluation],
    *,
    measure: str = NATS_PER_TOKEN,
    seed: int = 0,
) -> Difference:
    """The difference between two models on the same documents, with an interval by a bootstrap over the pairs.

    Args:
        first: an evaluation, or one per training run (seed); the means over runs are compared.
        second: as many, on the same documents in the same order; run i of one is paired with run i of the other.
        measure: `nats_per_token`, or `bits_per_byte` for models whose tokenizers differ.
        seed: of the bootstrap, see `bootstrap.ratio_interval`. The spread of several runs widens the interval.

    Raises:
        InputError: the documents, their tokens or the numbers of runs differ.
    """
    if measure not in (NATS_PER_TOKEN, BITS_PER_BYTE):
        raise InputError(f"measure: expected {NATS_PER_TOKEN} or {BITS_PER_BYTE}, got {measure!r}")
    firsts, seconds = ([given] if isinstance(given, Evaluation) else list(given) for given in (first, second))
    if not firsts or len(firsts) != len(seconds):
        raise InputError(
            f"evaluations: expected as many of one model as of the other, got {len(firsts)} and {len(seconds)}"
        )
    size = "tokens" if measure == NATS_PER_TOKEN else "bytes"
    sizes = _common_sizes([*firsts, *seconds], size)
    unit = 1.0 if measure == NATS_PER_TOKEN else math.log(2)
    nats = np.array([_nats(a) - _nats(b) for a, b in zip(firsts, seconds, strict=True)]) / unit
    used = sizes > 0
    over_documents = ratio_interval(nats.mean(0)[used], sizes[used], seed=seed)
    return Difference(
        measure=measure,
        mean=float(nats.mean(0).sum() / sizes.sum()),
        by_run=tuple(float(total) for total in nats.sum(1) / sizes.sum()),
        interval=ratio_interval(nats[:, used], sizes[used], seed=seed),
        document_error=None if over_documents is None else (over_documents[1] - over_documents[0]) / 2,
        documents=int(used.sum()),
    )


def _nats(evaluation: Evaluation) -> np.ndarray:
    return np.array([document.nats for document in evaluation.per_document])


def _common_sizes(evaluations: list[Evaluation], size: str) -> np.ndarray:
    """Tokens or bytes of each document, the same in all evaluations."""
    expected = evaluations[0].per_document
    for evaluation in evaluations[1:]:
        if len(evaluation.per_document) != len(expected):
            raise InputError(
                f"evaluations: expected the same documents, got {len(expected)} and {len(evaluation.per_document)}"
            )
        for mine, theirs in zip(expected, evaluation.per_document, strict=True):
            if mine.digest != theirs.digest:
                raise InputError(f"evaluations: expected the same documents, got {mine.origin} and {theirs.origin}")
            if getattr(mine, size) != getattr(theirs, size):
                raise InputError(
                    f"evaluations: expected the same tokenizer or measure={BITS_PER_BYTE!r}, got {mine.tokens} and "
                    f"{theirs.tokens} tokens in {mine.origin}"
                )
    return np.array([getattr(document, size) for document in expected])
