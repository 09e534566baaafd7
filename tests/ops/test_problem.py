"""Validation: errors name the argument, what was expected and what was given."""

import pytest
import torch

from flashmhf.ops.flash_mhf import flash_mhf
from flashmhf.ops.problem import Problem


def inputs() -> dict[str, torch.Tensor]:
    q = torch.randn(2, 5, 4, 8)
    k, u, v = (torch.randn(2, 3, 7, 8) for _ in range(3))
    return {"q": q, "k": k, "u": u, "v": v, "gate": torch.rand(2, 5, 4, 3)}


def test_problem_of_a_call():
    problem = Problem.of(**inputs())
    assert (problem.T, problem.H, problem.H_kv, problem.E, problem.F, problem.D) == (10, 4, 2, 3, 7, 8)
    assert problem.has_gate
    assert problem.dtype == torch.float32


WRONG = {
    "q: expected shape": {"q": torch.randn(8)},
    "k: expected shape": {"k": torch.randn(3, 7, 8)},
    "u: expected k's shape": {"u": torch.randn(2, 3, 6, 8)},
    "v: expected k's shape": {"v": torch.randn(1, 3, 7, 8)},
    "q: expected the head dim of k, 8": {"q": torch.randn(2, 5, 4, 9)},
    "q: expected a number of heads divisible by k's 2, got 3": {"q": torch.randn(2, 5, 3, 8)},
    "gate: expected shape": {"gate": torch.rand(2, 5, 4, 2)},
    "q: expected float64, float32": {"q": torch.ones(2, 5, 4, 8, dtype=torch.int64)},
    "k: expected q's dtype torch.float32, got torch.bfloat16": {"k": torch.randn(2, 3, 7, 8).bfloat16()},
    "gate: expected float64, float32": {"gate": torch.ones(2, 5, 4, 3, dtype=torch.int64)},
    "v: expected q's device cpu, got meta": {"v": torch.randn(2, 3, 7, 8, device="meta")},
    "q, k: expected H, H_kv, E, F, D >= 1": {name: torch.randn(2, 3, 0, 8) for name in "kuv"},
}


@pytest.mark.parametrize("message", WRONG)
def test_bad_arguments(message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace("'", ".")):
        Problem.of(**(inputs() | WRONG[message]))


@pytest.mark.parametrize("message", [m for m in WRONG if "device" not in m])
def test_the_public_function_raises_the_same(message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace("'", ".")):
        flash_mhf(**(inputs() | WRONG[message]))
