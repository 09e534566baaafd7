"""Runs the backend `triton` on CPU tensors, through Triton's interpreter."""

import dataclasses

import torch

from flashmhf.ops import backends
from flashmhf.ops.problem import Problem


def interpret_triton(monkeypatch) -> None:
    """Lets the backend `triton` take CPU tensors, for Triton's interpreter; its other conditions stay."""

    def unsupported_reason(problem: Problem | None) -> str | None:
        if problem is None:
            return None
        if problem.dtype == torch.bfloat16:
            return "Triton's interpreter multiplies bfloat16 wrongly"
        if problem.dtype == torch.float64 or problem.D > backends.TRITON_MAX_HEAD_DIM:
            return "not for the kernels"
        return None

    (real,) = (row for row in backends.BACKENDS if row.name == "triton")
    interpreted = dataclasses.replace(real, unsupported_reason=unsupported_reason)
    table = tuple(interpreted if row.name == "triton" else row for row in backends.BACKENDS)
    monkeypatch.setattr(backends, "BACKENDS", table)
