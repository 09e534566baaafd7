"""The error budget for values of any magnitude: no backend overflows, vanishes or errs where eager PyTorch does not."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from problems import NAMES, Shape, eager_results, exact_results, make_inputs, rounding

from flashmhf.ops import backends, blockwise
from flashmhf.ops.flash_mhf import flash_mhf
from flashmhf.ops.problem import Problem

INPUTS = ("q", "k", "u", "v", "gate", "dout")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
RUNS = [
    *(("blockwise", dtype) for dtype in DTYPES),
    *(("onednn", dtype) for dtype in backends.ONEDNN_DTYPES),
]
SMALL, MEDIUM = Shape((9,), 2, 1, 2, 5, 8), Shape((20,), 2, 2, 2, 20, 8)
MAX_TERMS = 40  # of a sum over tokens or rows
# Powers of ten by which inputs are multiplied; the rest stays near one.
SCALES = {
    **{f"{name} {power}": {name: power} for name in INPUTS for power in (-7, -5, -3, 3, 5)},
    "small q, large gate": {"q": -2, "gate": 5},
    "large q, small gate": {"q": 2, "gate": -6},
    "SiLU(M) N overflows in float16, its product with the gate does not": {"q": 2.3, "gate": -4},
    "dA SiLU(M) overflows in float16, with the gate it does not": {"dout": 3.5, "q": 1.5, "gate": -4},
    "dA SiLU(M) vanishes in float16, with the gate it does not": {"dout": -3, "q": -1, "gate": 5},
    "dA N overflows in float16, P dA does not": {"v": 3, "u": 3, "k": -5, "gate": -3},
    "small weights and output gradient, large gate": {"k": -2, "u": -2, "v": -2, "dout": -2, "gate": 4},
}


@pytest.fixture(params=RUNS, ids=str)
def run(request) -> tuple[str, torch.dtype]:
    """A backend and a dtype that it supports."""
    backend, dtype = request.param
    if reason := backends.backends(Problem.of(*make_inputs(SMALL, dtype)[:5]))[backend]:
        pytest.skip(reason)
    return request.param


def scaled(inputs: list, scales: dict[str, float]) -> list:
    return [
        x if x is None else (x.double() * 10.0 ** scales.get(name, 0)).to(x.dtype)
        for name, x in zip(INPUTS, inputs, strict=True)
    ]


def assert_no_worse_than_eager(backend: str, inputs: list) -> None:
    """Where eager is finite, for one token or for a gradient of parameters, so is the result, within the budget.

    CPUs' instructions for bfloat16, which PyTorch uses for larger products, too, take subnormal numbers as zeros.
    """
    *arguments, dout = inputs
    leaves = [None if x is None else x.detach().requires_grad_() for x in arguments]
    out = flash_mhf(*leaves, backend=backend)
    got = [out.detach(), *torch.autograd.grad(out, [x for x in leaves if x is not None], dout)]
    info = torch.finfo(dout.dtype)
    slightly_larger = eager_results([x if x is None else (1.1 * x.double()).to(x.dtype) for x in inputs])
    results = zip(NAMES, got, eager_results(inputs), slightly_larger, exact_results(inputs), strict=False)
    for name, mine, eager, larger, exact in results:
        finite = eager.isfinite() & larger.isfinite() & exact.isfinite()  # by more than a rounding
        # Finite sums of terms most of which overflow are finite by chance.
        finite &= finite.all() if name in ("dk", "du", "dv") else finite.all(-1, keepdim=True)
        assert mine[finite].isfinite().all(), f"{name}: not finite where eager is"
        eager_error, error = ((x.double() - exact)[finite].norm() for x in (eager, mine))
        subnormal = info.smallest_normal * math.sqrt(mine.numel())
        subnormal *= math.sqrt(MAX_TERMS) if (backend, dout.dtype) == ("onednn", torch.bfloat16) else info.eps
        budget = 2 * eager_error + rounding(mine[finite], dout.dtype) * exact[finite].norm() + subnormal
        assert error <= budget, f"{name}: error {error:.2e}, of eager {eager_error:.2e}"


SPECIAL = {
    "zeros": lambda x: x.mul_(torch.rand(x.shape) > 0.5),
    "negative zeros": lambda x: x.copy_(torch.where(torch.rand(x.shape) > 0.5, x, -0.0)),
    "subnormal": lambda x: x.copy_(x.clamp(-1, 1).double() * torch.finfo(x.dtype).smallest_normal),
    "every magnitude": lambda x: x.copy_(x.double() * 10.0 ** torch.randint(-9, 5, x.shape)),
    "large": lambda x: x[..., :1].fill_(torch.finfo(x.dtype).max / 64),  # sums of 20 stay finite in any order
    "one row of infinities": lambda x: x.view(-1, *x.shape[-1:])[3].fill_(torch.inf),
    "one row of NaN": lambda x: x.view(-1, *x.shape[-1:])[3].fill_(torch.nan),
}


@pytest.mark.parametrize("scales", SCALES.values(), ids=SCALES.keys())
def test_scales(scales, run):
    backend, dtype = run
    for shape in (SMALL, MEDIUM):
        assert_no_worse_than_eager(backend, scaled(make_inputs(shape, dtype), scales))


@pytest.mark.parametrize("special", SPECIAL.values(), ids=SPECIAL.keys())
def test_special_values(special, run):
    backend, dtype = run
    for shape in (SMALL, MEDIUM):
        for i in range(len(INPUTS)):
            inputs = make_inputs(shape, dtype)
            special(inputs[i])
            assert_no_worse_than_eager(backend, inputs)


@pytest.mark.parametrize("special", SPECIAL.values(), ids=SPECIAL.keys())
@pytest.mark.parametrize("which", [0, 4], ids=["q", "gate"])
def test_one_token_changes_no_bit_of_another(which, special, run):
    """Not even by changing how the rest is rounded."""
    backend, dtype = run
    *inputs, dout = make_inputs(Shape((40,), 2, 1, 2, 20, 8), dtype)
    changed = [x.clone() for x in inputs]
    special(changed[which][7:14])
    results = []
    for arguments in (inputs, changed):
        leaves = [x.requires_grad_() for x in arguments]
        out = flash_mhf(*leaves, backend=backend)
        results.append((out, *torch.autograd.grad(out, [leaves[0], leaves[4]], dout)))
    others = [*range(7), *range(14, 40)]
    for x, y in zip(*results, strict=True):
        assert torch.equal(x[others], y[others])


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_scales(data, run):
    backend, dtype = run
    largest = {torch.float16: 5, torch.bfloat16: 12, torch.float32: 12, torch.float64: 100}[dtype]
    if run == ("onednn", torch.bfloat16):
        largest = 6  # a large factor would magnify the error of a subnormal number that counts as zero
    scales = {name: data.draw(st.floats(-largest, largest)) for name in INPUTS}
    shape = data.draw(st.sampled_from((SMALL, MEDIUM)))
    assert_no_worse_than_eager(backend, scaled(make_inputs(shape, dtype), scales))


@pytest.mark.parametrize("scales", SCALES.values(), ids=SCALES.keys())
def test_scales_of_float16_in_float16_tiles(scales, monkeypatch):
    """What accelerators compute with, where float16 is not computed in float32."""
    create = blockwise._Workspace.__init__

    def in_float16(self, q, gate):
        create(self, q, gate)
        self.dtype = q.dtype

    monkeypatch.setattr(blockwise._Workspace, "__init__", in_float16)
    for shape in (SMALL, MEDIUM):
        assert_no_worse_than_eager("blockwise", scaled(make_inputs(shape, torch.float16), scales))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("scales", SCALES.values(), ids=SCALES.keys())
def test_scales_triton(scales, dtype):
    assert_no_worse_than_eager("triton", scaled(make_inputs(SMALL, dtype), scales))
