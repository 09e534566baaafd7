"""The optimum of a sweep: the parabola, how flat it is, and the noise over seeds."""

import math
import statistics

import numpy as np
import pytest

from flashmhf.sweeping.optimum import fitted_rate, flat_range, noise


def parabola(rates, minimum: float, curvature: float = 0.1) -> dict[float, float]:
    return {rate: 1.5 + curvature * math.log(rate / minimum) ** 2 for rate in rates}


@pytest.mark.parametrize("minimum", [0.9e-3, 1e-3, 1.3e-3])
def test_a_parabola_is_found_again(minimum):
    losses = parabola((2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3), minimum)
    assert fitted_rate(losses) == pytest.approx(minimum)
    found = flat_range(losses, 0.01)
    limit = min(losses.values()) + 0.01
    for end in (found.low, found.high):
        assert 1.5 + 0.1 * math.log(end / minimum) ** 2 == pytest.approx(limit)
    assert found.low < minimum < found.high
    assert not found.open_below
    assert not found.open_above


def test_polyfit_agrees():
    losses = {5e-4: 1.71, 1e-3: 1.6, 2e-3: 1.75}
    a, b, _ = np.polyfit(np.log(list(losses)), list(losses.values()), 2)
    assert fitted_rate(losses) == pytest.approx(math.exp(-b / (2 * a)))


def test_the_minimum_lies_between_the_neighbours():
    generator = np.random.default_rng(0)
    for low, high in generator.exponential(size=(100, 2)):
        fitted = fitted_rate({1.0: low, 2.0: 0.0, 5.0: high})
        assert 1.0 < fitted < 5.0


def test_without_both_neighbours_only_rates_that_were_tried_count():
    losses = {1e-3: 1.5, 2e-3: 1.505, 4e-3: 1.6}
    assert fitted_rate(losses) is None
    found = flat_range(losses, 0.01)
    assert (found.low, found.high, found.open_below, found.open_above) == (1e-3, 2e-3, True, False)


def test_a_range_goes_on_over_neighbours_within_the_tolerance():
    found = flat_range({1e-3: 1.6, 2e-3: 1.504, 4e-3: 1.5, 8e-3: 1.509}, 0.01)
    assert (found.low, found.high, found.open_below, found.open_above) == (2e-3, 8e-3, False, True)


def test_equal_losses_are_flat():
    losses = dict.fromkeys((1e-3, 2e-3, 4e-3), 1.5)
    assert fitted_rate(losses) is None
    for tolerance in (0.0, 0.01):
        found = flat_range(losses, tolerance)
        assert (found.low, found.high, found.open_below, found.open_above) == (1e-3, 4e-3, True, True)


def test_a_rate_that_fails_ends_the_range():
    losses = {1e-3: 1.6, 2e-3: 1.5, 4e-3: math.inf}
    assert fitted_rate(losses) is None
    found = flat_range(losses, 0.01)
    assert (found.low, found.high, found.open_above) == (2e-3, 2e-3, False)


def test_one_rate():
    found = flat_range({1e-3: 1.5}, 0.01)
    assert (found.low, found.high, found.open_below, found.open_above) == (1e-3, 1e-3, True, True)


def test_noise_is_the_interval_of_a_paired_difference():
    best, other = (1.0, 2.0, 3.0), (1.1, 2.0, 3.5)
    spread = statistics.stdev([0.1, 0.0, 0.5])
    assert noise(best, [other]) == pytest.approx(4.303 * spread / math.sqrt(3), rel=1e-3)
    assert noise(best, [[loss + 5 for loss in best]]) == 0.0  # what all seeds share is no noise


def test_without_a_pair_there_is_no_noise():
    assert noise((1.0,), [(2.0,)]) is None
    assert noise((1.0, 2.0), []) is None


def test_one_difference_in_twenty_is_mistaken_for_a_real_one():
    generator = np.random.default_rng(0)
    mistaken = 0
    for _ in range(2000):
        best, *others = generator.normal(size=(4, 3))
        mistaken += abs(np.mean(others[0] - best)) > noise(best, others)
    assert 0.03 < mistaken / 2000 < 0.08
