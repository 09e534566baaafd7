"""What the seeds of a comparison decide: better, worse, or not decided, and then how many seeds would decide."""

import math
import statistics
from dataclasses import dataclass

from flashmhf.evaluation.bootstrap import student_t
from flashmhf.evaluation.differences import Difference

BETTER, WORSE, UNDECIDED = "better", "worse", "undecided"
MIN_SEEDS = 3  # with fewer there is no verdict, whatever the losses are
MIN_DOCUMENTS = 2  # with one there is no interval over documents
MAX_SEEDS_NEEDED = 1000  # beyond it, only that it would be more


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """On a loss of one variant minus that of another.

    Attributes:
        outcome: "better" or "worse" if there are `MIN_SEEDS` and the 95 % interval excludes 0, otherwise "undecided".
        seeds: that both finished.
        seeds_needed: about how many would decide a difference of this size, see `_seeds_needed`. None if it is decided,
            if one seed cannot tell, or if it is more than `MAX_SEEDS_NEEDED`.
        more_documents: more seeds alone would not decide, since the difference varies too much over the documents, or
            there is only one.
        resolution: standard deviation over seeds of the paired difference; None for one seed.
    """

    outcome: str
    seeds: int
    seeds_needed: int | None
    more_documents: bool
    resolution: float | None


def judge(difference: Difference) -> Verdict:
    """The verdict on a difference whose runs are seeds."""
    seeds = len(difference.by_run)
    resolution = statistics.stdev(difference.by_run) if seeds > 1 else None
    outcome, seeds_needed, more_documents = UNDECIDED, None, False
    if seeds >= MIN_SEEDS and difference.interval is not None and not _includes_zero(difference.interval):
        outcome = BETTER if difference.mean < 0 else WORSE
    elif resolution is not None:
        seeds_needed = _seeds_needed(difference, resolution, difference.document_error)
        more_documents = seeds_needed is None and _seeds_needed(difference, resolution, 0.0) is not None
    return Verdict(
        outcome=outcome,
        seeds=seeds,
        seeds_needed=seeds_needed,
        more_documents=more_documents,
        resolution=resolution,
    )


def _includes_zero(interval: tuple[float, float]) -> bool:
    return interval[0] <= 0 <= interval[1]


def _seeds_needed(difference: Difference, resolution: float, document_error: float | None) -> int | None:
    """The smallest larger number of seeds at which the interval would exclude 0, if mean and spread stay as they are.

    The interval's half width is that of Student's t over seeds and that over documents, added in squares.
    """
    if document_error is None:
        return None
    for seeds in range(max(MIN_SEEDS, len(difference.by_run) + 1), MAX_SEEDS_NEEDED + 1):
        over_seeds = student_t(seeds - 1) * resolution / math.sqrt(seeds)
        if abs(difference.mean) > math.hypot(over_seeds, document_error):
            return seeds
    return None
