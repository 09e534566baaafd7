"""Successive halving: what each rung costs, which cells it keeps, what a budget allows."""

import itertools
import math

import pytest

from flashmhf.errors import InputError
from flashmhf.sweeping.budget import count_steps
from flashmhf.sweeping.halving import Cell, Halving, keep


def halving(rates=4, warmups=2, seeds=3, rungs=3, steps=1000) -> Halving:
    return Halving(rates=rates, warmups=warmups, seeds=seeds, rungs=rungs, steps=steps)


@pytest.mark.parametrize(
    ("shape", "cells", "lengths"),
    [
        ((4, 2, 3), (8, 4), (500, 1000)),
        ((5, 3, 3), (15, 8, 4), (250, 500, 1000)),
        ((4, 1, 3), (4, 3), (500, 1000)),
        ((2, 2, 3), (4, 3), (500, 1000)),
        ((2, 2, 1), (4,), (1000,)),  # a shorter rung would cost more than it saves
        ((3, 1, 5), (3,), (1000,)),
        ((1, 4, 3), (4, 2), (500, 1000)),
    ],
)
def test_cells_and_steps_of_each_rung(shape, cells, lengths):
    found = halving(*shape)
    assert (found.cells, found.lengths) == (cells, lengths)
    assert found.runs == (*cells[:-1], cells[-1] * shape[2])


def test_no_other_number_of_rungs_costs_less():
    for rates, warmups, seeds in itertools.product(range(1, 9), range(1, 5), (1, 2, 3, 5)):
        if rates * warmups > 1:
            costs = [halving(rates, warmups, seeds, rungs, 2**10).total_steps for rungs in range(1, 6)]
            assert costs == sorted(costs, reverse=True)
            assert costs[0] == rates * warmups * seeds * 2**10


GRID = [Cell(warmup, rate) for warmup in (0.02, 0.1) for rate in (1.0, 2.0, 4.0, 8.0)]


def losses(**changes: float) -> dict[Cell, float]:
    """Nine of every cell; a2 is that of the first warm-up and rate 2."""
    found = dict.fromkeys(GRID, 9.0)
    for name, loss in changes.items():
        found[Cell({"a": 0.02, "b": 0.1}[name[0]], float(name[1:]))] = loss
    return found


def names(cells) -> list[str]:
    return [{0.02: "a", 0.1: "b"}[cell.warmup] + f"{cell.learning_rate:g}" for cell in cells]


def test_the_best_keeps_its_neighbours_and_another_warmup():
    found = losses(b2=1.0, b8=1.1, a8=1.2, a2=1.3, b1=3.0, b4=math.inf)
    assert names(keep(found, GRID, 3)) == ["b1", "b2", "b4"]
    assert names(keep(found, GRID, 4)) == ["a8", "b1", "b2", "b4"]
    assert names(keep(found, GRID, 6)) == ["a2", "a8", "b1", "b2", "b4", "b8"]


def test_at_the_edge_the_next_best_takes_the_missing_neighbours_place():
    assert names(keep(losses(b1=1.0, b4=1.1, a8=1.2), GRID, 4)) == ["a8", "b1", "b2", "b4"]


def test_a_dropped_cell_comes_back_as_the_neighbour_of_the_best():
    remaining = {cell: loss for cell, loss in losses(b4=1.0, b2=2.0, b1=3.0).items() if cell != Cell(0.1, 8.0)}
    assert "b8" in names(keep(remaining, GRID, 4))


def test_of_equal_losses_the_order_of_the_grid_decides():
    assert names(keep(losses(), GRID, 4)) == names(keep(dict(reversed(losses().items())), GRID, 4))


def test_steps_are_the_most_that_the_budget_allows():
    for budget in range(20 * 300, 20 * 3000, 797):
        steps = count_steps(halving(), None, budget, 20)
        assert halving(steps=steps).total_steps * 20 <= budget < halving(steps=steps + 2).total_steps * 20


@pytest.mark.parametrize(
    ("max_steps", "budget", "message"),
    [
        (None, None, "max-steps: expected the steps of a full run, or --budget, got neither"),
        (
            100,
            31_999,
            r"budget: expected at least 32,000 tokens for each contender's 20 runs \(8 cells, 3 seeds for the last 4\) "
            "of up to 100 steps of 20 tokens, got 31,999",
        ),
        (None, 1279, r"budget: expected at least 1,280 tokens .* of up to 4 steps of 20 tokens, got 1,279"),
    ],
)
def test_a_budget_that_is_too_small(max_steps, budget, message):
    with pytest.raises(InputError, match=message):
        count_steps(halving(), max_steps, budget, 20)


def test_a_budget_that_suffices():
    assert count_steps(halving(), 100, 32_000, 20) == 100
    assert count_steps(halving(), None, 1280, 20) == 4


def test_no_rungs():
    with pytest.raises(InputError, match="rungs: expected 1 or more, got 0"):
        halving(rungs=0)
