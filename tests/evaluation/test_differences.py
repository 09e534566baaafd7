"""Intervals against closed forms, and differences that pair documents and runs."""

import math
from dataclasses import replace

import numpy as np
import pytest

from flashmhf.errors import InputError
from flashmhf.evaluation import DocumentLoss, Evaluation
from flashmhf.evaluation.bootstrap import RESAMPLES, ratio_interval, student_t
from flashmhf.evaluation.differences import paired_difference


def evaluation(nats, tokens, digests=None):
    digests = digests or [f"{i:x}" for i in range(len(nats))]
    per_document = [
        DocumentLoss(f"document {i}", digest, float(loss), int(number), 2 * int(number))
        for i, (digest, loss, number) in enumerate(zip(digests, nats, tokens, strict=True))
    ]
    return Evaluation(0.0, 1.0, 0.0, None, int(sum(tokens)), 2 * int(sum(tokens)), len(nats), 8, 8, [], per_document)


@pytest.fixture
def losses():
    """400 documents of 20 to 200 tokens with very different losses."""
    generator = np.random.default_rng(1)
    tokens = generator.integers(20, 200, 400)
    return tokens * generator.normal(3.0, 0.5, 400), tokens, generator


def test_an_interval_agrees_with_the_normal_approximation(losses):
    nats, tokens, _ = losses
    ratio = nats.sum() / tokens.sum()
    error = math.sqrt(((nats - ratio * tokens) ** 2).sum()) / tokens.sum()
    low, high = ratio_interval(nats, tokens)
    assert (low, high) == pytest.approx((ratio - 1.96 * error, ratio + 1.96 * error), abs=0.2 * error)
    assert (low, high) == ratio_interval(nats, tokens)
    assert (low, high) != ratio_interval(nats, tokens, seed=1)


def test_a_draw_cut_into_parts(losses, monkeypatch):
    nats, tokens, _ = losses
    whole = ratio_interval(nats, tokens)
    monkeypatch.setattr("flashmhf.evaluation.bootstrap.MAX_ELEMENTS", 400 * (RESAMPLES // 3))  # three parts and a rest
    assert ratio_interval(nats, tokens) == pytest.approx(whole, abs=0.02)


def test_pairs_show_what_two_intervals_hide(losses):
    nats, tokens, generator = losses
    better = nats - tokens * generator.normal(0.01, 0.02, 400)
    found = paired_difference(evaluation(nats, tokens), evaluation(better, tokens))
    assert found.mean == pytest.approx((nats.sum() - better.sum()) / tokens.sum())
    assert 0 < found.interval[0] < found.mean < found.interval[1]
    alone = ratio_interval(nats, tokens)
    assert found.interval[1] - found.interval[0] < (alone[1] - alone[0]) / 5
    assert (found.documents, len(found.by_run), found.measure) == (400, 1, "nats_per_token")
    back = paired_difference(evaluation(better, tokens), evaluation(nats, tokens))
    assert (back.mean, *back.interval) == pytest.approx((-found.mean, -found.interval[1], -found.interval[0]))


def test_bits_a_byte_for_other_tokens(losses):
    nats, tokens, _ = losses
    other = evaluation(nats, tokens)
    other = replace(other, per_document=[replace(one, tokens=one.tokens + 1) for one in other.per_document])
    with pytest.raises(InputError, match="evaluations: expected the same tokenizer or measure='bits_per_byte', got "):
        paired_difference(evaluation(nats, tokens), other)
    found = paired_difference(evaluation(2 * nats, tokens), other, measure="bits_per_byte")
    assert found.mean == pytest.approx(nats.sum() / math.log(2) / (2 * tokens.sum()))


def test_runs_widen_the_interval_by_how_much_they_differ(losses):
    nats, tokens, _ = losses
    second = [evaluation(nats, tokens)] * 4
    alike = [evaluation(nats + 0.1 * tokens, tokens)] * 4
    apart = [evaluation(nats + shift * tokens, tokens) for shift in (-0.2, 0.0, 0.2, 0.4)]
    one, other = paired_difference(alike, second), paired_difference(apart, second)
    assert one.mean == pytest.approx(0.1)
    assert one.interval == pytest.approx((0.1, 0.1))
    assert other.mean == pytest.approx(0.1)
    half = 3.182 * 0.2582 / 2  # Student's t of 3 degrees of freedom, times the standard error of four runs
    assert other.interval == pytest.approx((0.1 - half, 0.1 + half), abs=0.04 * half)
    assert other.by_run == pytest.approx((-0.2, 0.0, 0.2, 0.4))
    assert other.document_error == pytest.approx(one.document_error, abs=1e-12)  # which seeds do not change


def test_one_document_gives_no_interval():
    found = paired_difference(evaluation([4.0], [2]), evaluation([3.0], [2]))
    assert (found.mean, found.interval, found.document_error) == (0.5, None, None)


def test_a_document_without_tokens_counts_for_nothing():
    found = paired_difference(evaluation([4.0, 0.0, 2.0], [2, 0, 1]), evaluation([3.0, 0.0, 1.0], [2, 0, 1]))
    assert (found.mean, found.documents) == (pytest.approx(2 / 3), 2)
    assert all(math.isfinite(end) for end in found.interval)


def test_refusals():
    mine = evaluation([1.0, 2.0], [1, 1])
    for others, message in (
        (evaluation([1.0, 2.0], [1, 1], ["0", "f"]), "expected the same documents, got document 1 and document 1"),
        (evaluation([1.0], [1]), "expected the same documents, got 2 and 1"),
        ([mine, mine], "expected as many of one model as of the other, got 1 and 2"),
        ([], "expected as many of one model as of the other, got 1 and 0"),
    ):
        with pytest.raises(InputError, match=f"evaluations: {message}"):
            paired_difference(mine, others)
    with pytest.raises(InputError, match="measure: expected nats_per_token or bits_per_byte, got 'accuracy'"):
        paired_difference(mine, mine, measure="accuracy")


@pytest.mark.parametrize(("runs", "documents"), [(1, 4), (1, 10), (1, 30), (3, 40)])
def test_intervals_hold_what_is_true_as_often_as_promised(runs, documents):
    """Of 95 % intervals about 95 in 100, which percentiles of few documents and of three drawn runs do not."""
    generator = np.random.default_rng(2)
    covered = 0
    for _ in range(200):
        of_runs = generator.normal(0.0, 0.1, (runs, 1)) if runs > 1 else 0.0
        values = of_runs + generator.normal(0.0, 0.2, documents) + generator.normal(0.0, 0.05, (runs, documents))
        low, high = ratio_interval(values, np.ones(documents))
        covered += low <= 0 <= high
    assert 181 <= covered <= 199


def test_students_t():
    expected = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 9: 2.262, 18: 2.101, 1000: 1.962}
    assert {degrees: student_t(degrees) for degrees in expected} == pytest.approx(expected, rel=0.01)
