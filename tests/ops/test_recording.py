"""Replays of recorded computations: on other tensors, with memory freed as early, or not at all."""

import weakref

import pytest
import torch
from torch import Tensor

from flashmhf.ops import recording
from flashmhf.ops.recording import record


def replayed(compute, *given: Tensor | None, others: list[Tensor | None]):
    """The result for `others` of the computation recorded for `given`."""
    result, program = record(lambda: compute(*given), given)
    assert program is not None
    assert recording.recorder() is None
    torch.testing.assert_close(result, compute(*given))
    return program.replay(others, "cpu")


def two(*size: int, **options) -> tuple[Tensor, Tensor]:
    return torch.randn(*size, **options), torch.randn(*size, **options)


def every_kind(x: Tensor, absent: None, y: Tensor) -> list[Tensor]:
    buffer = torch.zeros(3, 4)
    buffer[1:] += x[1:]
    copy = torch.empty_like(y).copy_(y).view(4, 3)
    return [buffer, copy.t().contiguous(), x.to(torch.float16), torch.empty(0, 2), copy.sum(0)]


def test_operators_views_and_writes():
    (x, other_x), (y, other_y) = two(3, 4), two(3, 4)
    got = replayed(every_kind, x, None, y, others=[other_x, None, other_y])
    torch.testing.assert_close(got, every_kind(other_x, None, other_y))


def test_unused_results_are_not_computed():
    def compute(x: Tensor) -> Tensor:
        x.sum()
        return x + 1

    _, program = record(lambda: compute(x), [x := torch.randn(3)])
    assert len(program.steps) == 1


def test_in_place_writes_to_an_input():
    x, other = two(3)
    expected = other + 1
    _, program = record(lambda: x.add_(1) * 2, [x])
    assert program.replay([other], "cpu").equal(expected * 2)
    assert other.equal(expected)


def test_memory_is_freed_as_early_as_when_recorded():
    alive = []

    def compute(x: Tensor) -> Tensor:
        first = x + 1
        second = first * 2
        del first
        return second.sum(0) + x[0]

    x = torch.randn(3, 4)
    _, program = record(lambda: compute(x), [x])
    seen: dict[int, weakref.ref] = {}

    def watched(step):
        def run(slots):
            step(slots)
            seen.update((slot, weakref.ref(y)) for slot, y in enumerate(slots) if slot > 0 and y is not None)
            alive.append([slot for slot, reference in seen.items() if reference() is not None])

        return run

    program.steps = [watched(step) for step in program.steps]
    program.replay([torch.randn(3, 4)], "cpu")
    assert len(seen) == 5
    assert [1] in alive  # first
    assert [2] in alive  # only second
    assert max(map(len, alive)) == 3  # the sum, the row, and theirs


def test_autocast_is_off():
    x, other = two(4, 4)
    _, program = record(lambda: x @ x, [x])
    with torch.autocast("cpu", torch.bfloat16):
        assert (other @ other).dtype == torch.bfloat16
        assert program.replay([other], "cpu").dtype == torch.float32


@pytest.mark.parametrize(
    "compute",
    [
        lambda x: x * x.sum().item(),
        lambda x: torch.cat([x, x]),
        lambda x: x.split(1)[0],
        lambda x: x + torch.tensor([1.0]),
    ],
    ids=["value", "list", "several", "constant"],
)
def test_computations_that_cannot_be_replayed(compute):
    x = torch.randn(3, 4)
    result, program = record(lambda: compute(x), [x])
    assert program is None
    torch.testing.assert_close(result, compute(x))


def test_an_error_ends_the_recording():
    with pytest.raises(ZeroDivisionError):
        record(lambda: 1 / 0, [torch.randn(3)])
    assert recording.recorder() is None
    assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()
