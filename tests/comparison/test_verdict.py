"""Verdicts: none from fewer than three seeds, wrong as rarely as promised, and how many seeds would decide."""

import math
import statistics

import numpy as np
import pytest

from flashmhf.comparison.results import Differences
from flashmhf.comparison.summary import differences_between
from flashmhf.comparison.verdict import BETTER, MAX_SEEDS_NEEDED, UNDECIDED, WORSE, Verdict, judge
from flashmhf.evaluation import DocumentLoss, Evaluation
from flashmhf.evaluation.bootstrap import student_t
from flashmhf.evaluation.differences import paired_difference

TOKENS = 100  # of each document


def evaluation(losses: np.ndarray) -> Evaluation:
    """Losses in nats/token of documents of equal length."""
    documents = [
        DocumentLoss(f"document {i}", f"{i:x}", float(loss) * TOKENS, TOKENS, TOKENS) for i, loss in enumerate(losses)
    ]
    total = TOKENS * len(losses)
    return Evaluation(float(losses.mean()), 1.0, 0.0, None, total, total, len(losses), 8, 8, [], documents)


def verdict_on(losses: np.ndarray) -> Verdict:
    """Of differences (seeds, documents) to a variant whose losses are all 2."""
    return judge(
        paired_difference(
            [evaluation(2 + row) for row in losses], [evaluation(np.full(len(row), 2.0)) for row in losses]
        )
    )


def by_seed(values: list[float], documents: int = 5) -> np.ndarray:
    """Seeds whose difference is the same in all documents."""
    return np.repeat(np.array(values)[:, None], documents, 1)


def between(mine: dict[int, np.ndarray], theirs: dict[int, np.ndarray]) -> Differences | None:
    variants = {"flashmhf": mine, "swiglu": theirs}
    return differences_between(
        {name: {seed: evaluation(row) for seed, row in rows.items()} for name, rows in variants.items()},
        "flashmhf",
        "swiglu",
    )


def test_three_seeds_that_agree_decide():
    better = verdict_on(by_seed([-0.10, -0.11, -0.12]))
    assert (better.outcome, better.seeds, better.seeds_needed, better.more_documents) == (BETTER, 3, None, False)
    assert better.resolution == pytest.approx(0.01)
    assert verdict_on(by_seed([0.10, 0.11, 0.12])).outcome == WORSE


@pytest.mark.parametrize("seeds", [1, 2])
def test_fewer_than_three_seeds_never_decide(seeds):
    """However large and equal the differences are; and no interval is left that would look like a verdict."""
    generator = np.random.default_rng(seeds)
    for scale in (1e-3, 1.0, 1e3):
        for sign in (-1, 1):
            losses = {seed: sign * scale * (1 + 1e-6 * generator.normal(size=9)) for seed in range(seeds)}
            found = between(losses, {seed: np.zeros(9) for seed in range(seeds)})
            assert found is not None
            assert (found.verdict.outcome, found.verdict.seeds) == (UNDECIDED, seeds)
            assert (found.nats_per_token.interval, found.bits_per_byte.interval) == (None, None)
    assert found.verdict.seeds_needed == (None if seeds == 1 else 3)
    assert (found.verdict.resolution is None) == (seeds == 1)


def test_only_seeds_that_both_finished_count():
    rows = {seed: np.full(5, 1.0 + seed / 1000) for seed in range(4)}
    other = {seed: np.full(5, 2.0) for seed in (1, 2, 3, 9)}
    found = between(rows, other)
    assert found is not None
    assert (found.verdict.outcome, found.verdict.seeds, found.baseline) == (BETTER, 3, "swiglu")
    found = between(rows, {seed: other[seed] for seed in (1, 2, 9)})
    assert found is not None
    assert (found.verdict.outcome, found.verdict.seeds) == (UNDECIDED, 2)
    assert between(rows, {9: other[9]}) is None


@pytest.mark.parametrize(("seeds", "documents", "seed_sd"), [(3, 25, 0.03), (3, 4, 0.0), (5, 25, 0.01)])
def test_without_a_difference_a_verdict_is_rare(seeds, documents, seed_sd):
    """One in twenty at most, where differences vary by seed, by document, and by both."""
    generator = np.random.default_rng(seeds + documents)
    trials = 200
    decided = 0
    for _ in range(trials):
        of_documents = generator.normal(0.0, 0.02, documents)
        of_both = generator.normal(0.0, 0.02, (seeds, documents))
        decided += verdict_on(generator.normal(0.0, seed_sd, (seeds, 1)) + of_documents + of_both).outcome != UNDECIDED
    assert decided <= 0.05 * trials + 2 * math.sqrt(0.05 * 0.95 * trials)


def test_verdicts_are_not_rare_for_lack_of_power():
    """Where documents do not differ, exactly one in twenty, since the interval over seeds is Student's."""
    generator = np.random.default_rng(0)
    trials = 400
    decided = sum(verdict_on(by_seed(list(generator.normal(0.0, 0.03, 3)))).outcome != UNDECIDED for _ in range(trials))
    assert decided == pytest.approx(0.05 * trials, abs=2 * math.sqrt(0.05 * 0.95 * trials))


@pytest.mark.parametrize("values", [[-0.01, -0.05, 0.02], [0.03, 0.05, -0.01, 0.0], [0.001, -0.02, 0.03]])
def test_the_number_of_seeds_that_would_decide(values):
    verdict = verdict_on(by_seed(values))
    mean, deviation = statistics.fmean(values), statistics.stdev(values)
    assert verdict.outcome == UNDECIDED
    needed = next(n for n in range(len(values) + 1, 10**6) if abs(mean) > student_t(n - 1) * deviation / math.sqrt(n))
    assert verdict.seeds_needed == (needed if needed <= MAX_SEEDS_NEEDED else None)


def test_as_many_seeds_as_that_do_decide():
    """With the same mean and standard deviation, and one fewer does not."""
    three = verdict_on(by_seed([-0.03, -0.01, 0.005]))
    mean, deviation = statistics.fmean([-0.03, -0.01, 0.005]), statistics.stdev([-0.03, -0.01, 0.005])
    assert three.seeds_needed is not None
    for seeds, outcome in ((three.seeds_needed + 1, BETTER), (three.seeds_needed - 1, UNDECIDED)):
        values = np.random.default_rng(0).normal(size=seeds)
        values = mean + deviation * (values - values.mean()) / values.std(ddof=1)
        assert verdict_on(by_seed(list(values))).outcome == outcome


def test_documents_that_differ_are_said_to_be_too_few():
    """The seeds agree, but the documents do not."""
    losses = np.tile([0.5, -0.4, 0.3, -0.2], (3, 1)) + by_seed([0.001, 0.0, -0.001], 4)
    verdict = verdict_on(losses)
    assert (verdict.outcome, verdict.more_documents, verdict.seeds_needed) == (UNDECIDED, True, None)
    one = verdict_on(by_seed([-0.1, -0.11, -0.12], documents=1))
    assert (one.outcome, one.more_documents, one.seeds_needed) == (UNDECIDED, True, None)


def test_models_that_are_equal_are_not_told_apart():
    verdict = verdict_on(np.zeros((3, 5)))
    assert (verdict.outcome, verdict.more_documents, verdict.seeds_needed) == (UNDECIDED, False, None)
    assert verdict.resolution == 0.0
