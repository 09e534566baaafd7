"""Emulated values have Triton's types, and reject what Gluon leaves undefined."""

import pytest

pytest.importorskip("triton")

import torch
from triton.experimental.gluon import language as gl

from gluon.machine import EmulationError
from gluon.values import Pointer, Value, atomic_add, load, scalar, store


def value(dtype: torch.dtype, *shape: int) -> Value:
    return Value(torch.ones(shape, dtype=dtype))


@pytest.mark.parametrize(
    ("result", "dtype"),
    [
        (value(torch.bfloat16, 4) * value(torch.float32), gl.float32),
        (value(torch.bfloat16, 4) * 0.5, gl.bfloat16),
        (value(torch.float16, 4) / value(torch.float16, 4), gl.float32),
        (value(torch.int32, 4) * 2, gl.int32),
        (value(torch.int32, 4) * 2.0, gl.float32),
        (value(torch.int32) * 2**40, gl.int64),
        (1 - value(torch.int64, 4), gl.int64),
        (value(torch.int32, 4) < 3, gl.int1),
        ((value(torch.int32, 4) < 3) & (value(torch.int32, 4) > 0), gl.int1),
    ],
)
def test_types_of_results(result, dtype):
    assert result.dtype == dtype


def test_integers_divide_as_c_does():
    assert int(scalar(-7) // 2) == -3
    assert int(scalar(-7) % 2) == -1


def test_int32_overflows_are_errors():
    assert int(scalar(2**30).to(gl.int64) * 4) == 2**32
    with pytest.raises(EmulationError, match="int32 overflows: values from 4294967296 to 4294967296"):
        scalar(2**30) * 4


def test_ranks_must_be_equal():
    assert (value(torch.float32, 4, 1) * value(torch.float32, 1, 3)).shape == [4, 3]
    with pytest.raises(EmulationError, match="ranks differ"):
        value(torch.float32, 4, 3) * value(torch.float32, 3)


def test_pointers_stay_in_their_tensor():
    tensor = torch.arange(12.0).view(4, 3)[1:, :2]
    pointer = Pointer(tensor) + Value(torch.tensor([0, 3, 7, 8]))
    assert load(pointer, Value(torch.tensor([True, True, True, False])), 5.0).data.tolist() == [3, 6, 10, 5]
    with pytest.raises(EmulationError, match="offsets 0 to 8 of a tensor of 8"):
        load(pointer)
    store(Pointer(tensor) + 1, 9.0)
    atomic_add(Pointer(tensor) + Value(torch.zeros(3, dtype=torch.int32)), Value(torch.ones(3)))
    assert tensor[0].tolist() == [6, 9]
