"""The operator with norm and gate: against the formula, under PyTorch's machinery, and what it saves."""

import functools

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from flashmhf.ops import backends, flops, reference  # noqa: F401  (flops registers the formulas)
from flashmhf.ops.gated_mhf import gated_mhf
from flashmhf.ops.prologue import Prologue

BACKENDS = ("reference", "blockwise")
PARTS = {"both": (True, True), "gate": (True, False), "norm": (False, True), "neither": (False, False)}
OPTIONS = {"gate_total": 2.5, "norm_eps": 1e-3}


def leaves(dtype=torch.float64, has_gate=True, has_norm=True, T=(2, 3), H=4, H_kv=2, E=3, F=5, D=6):
    shapes = [(*T, H, D), *[(H_kv, E, F, D)] * 3, (H, D, E) if has_gate else None, (H, D) if has_norm else None]
    return [None if shape is None else torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def options_of(inputs) -> dict[str, float]:
    return OPTIONS if inputs[4] is not None else {**OPTIONS, "gate_total": 1.0}


def formula(*inputs, kind="sigmoid"):
    return reference.gated_forward(*inputs, Prologue(kind, **options_of(inputs)))


@pytest.fixture
def triton_runs_here(monkeypatch):
    """Every backend's name selects the Triton kernels, which run in the interpreter."""
    from flashmhf.ops.triton import backend

    monkeypatch.setattr(backends, "select", lambda problem, name: backend)


def compare(inputs, backend, kind="sigmoid", tolerance=None):
    out = gated_mhf(*inputs, gate_type=kind, backend=backend, **options_of(inputs))
    expected = formula(*inputs, kind=kind)
    torch.testing.assert_close(out, expected, **(tolerance or {}))
    needed = [x for x in inputs if x is not None]
    vector = torch.randn_like(out)
    grads = torch.autograd.grad(out, needed, vector)
    for grad, want in zip(grads, torch.autograd.grad(expected, needed, vector), strict=True):
        torch.testing.assert_close(grad, want, **(tolerance or {}))


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS.keys())
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_the_formula(backend, parts, kind, poisoned_memory):
    compare(leaves(torch.float64, *parts), backend, kind)


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS.keys())
def test_matches_the_formula_on_triton(parts, triton_runs_here, poisoned_memory):
    compare(leaves(torch.float32, *parts, D=16, F=20), "auto", tolerance={"rtol": 1e-3, "atol": 1e-3})


def three_dimensions(inputs):
    """K, U and V as (H_kv E, F, D), as the layer holds them."""
    return [x.detach().flatten(0, 1).requires_grad_() if i in (1, 2, 3) else x for i, x in enumerate(inputs)]


@pytest.fixture
def onednn_runs_here():
    if reason := backends.backends()["onednn"]:
        pytest.skip(reason)


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS.keys())
def test_matches_the_formula_on_onednn(parts, kind, onednn_runs_here, poisoned_memory):
    compare(leaves(torch.float32, *parts, D=16, F=20), "onednn", kind, tolerance={"rtol": 1e-4, "atol": 1e-4})


@pytest.mark.parametrize("backend", [*BACKENDS, "triton", "onednn"])
def test_weights_of_three_dimensions(backend, request, poisoned_memory):
    if backend in ("triton", "onednn"):
        request.getfixturevalue(f"{backend}_runs_here")
    for _ in range(3):  # recorded, then replayed
        inputs = leaves(torch.float32, D=16, F=20)
        flat = three_dimensions(inputs)
        out, want = (gated_mhf(*x, backend=backend, **OPTIONS) for x in (flat, inputs))
        assert torch.equal(out, want)
        vector = torch.randn_like(out)
        grads, wanted = torch.autograd.grad(out, flat, vector), torch.autograd.grad(want, inputs, vector)
        for grad, other, x in zip(grads, wanted, flat, strict=True):
            assert grad.shape == x.shape
            assert torch.equal(grad.flatten(), other.flatten())


def test_derivatives_and_batches_of_weights_of_three_dimensions():
    inputs = three_dimensions(leaves(T=(2,), E=2, F=3, D=2))
    function = functools.partial(gated_mhf, **OPTIONS)
    torch.library.opcheck(torch.ops.flashmhf.gated_mhf.default, (*inputs, "sigmoid", *OPTIONS.values(), "blockwise"))
    torch.autograd.gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True)
    torch.autograd.gradgradcheck(function, inputs)
    for dims in ((None, 0, 0, 0, None, None), (0, None, None, None, None, None), (0, 0, 0, 0, 0, 0)):
        batched = [x if dim is None else torch.stack([x, 2 * x, -x]) for x, dim in zip(inputs, dims, strict=True)]
        each = [function(*(x if dim is None else x[i] for x, dim in zip(batched, dims, strict=True))) for i in range(3)]
        torch.testing.assert_close(torch.vmap(function, dims)(*batched), torch.stack(each))


@pytest.mark.parametrize(
    ("number", "shape", "message"),
    [
        (1, (7, 5, 6), "k: expected a multiple of gate_weight's E rows"),
        (2, (6, 4, 6), "u: expected k's shape"),
        (3, (6, 5, 7), "v: expected k's shape"),
        (4, (4, 6, 0), "k: expected a multiple of gate_weight's E rows"),
        (4, (4, 6), "k: expected a multiple of gate_weight's E rows"),
        (4, None, "k: expected shape .H_kv, E, F, D."),
    ],
)
def test_bad_weights_of_three_dimensions(number, shape, message):
    inputs = three_dimensions(leaves())
    inputs[number] = None if shape is None else torch.randn(shape, dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        gated_mhf(*inputs, norm_eps=1e-3)


@pytest.mark.parametrize("needed", range(6))
def test_one_gradient_at_a_time(needed):
    inputs = leaves()
    expected = torch.autograd.grad(formula(*inputs).sum(), inputs[needed])
    alone = [x.detach().requires_grad_(i == needed) for i, x in enumerate(inputs)]
    torch.testing.assert_close(torch.autograd.grad(gated_mhf(*alone, **OPTIONS).sum(), alone[needed]), expected)


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS.keys())
def test_opcheck(parts):
    inputs = leaves(torch.float64, *parts)
    options = ("sigmoid", *options_of(inputs).values(), "blockwise")
    torch.library.opcheck(torch.ops.flashmhf.gated_mhf.default, (*inputs, *options))
    plain = [None if x is None else x.detach() for x in inputs]
    needs = [True, False, True, True, parts[0], parts[1]]
    arguments = (torch.randn_like(plain[0]), *plain, needs, *options)
    torch.library.opcheck(torch.ops.flashmhf.gated_mhf_backward.default, arguments)


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS.keys())
@pytest.mark.parametrize("backend", BACKENDS)
def test_first_and_second_derivatives(backend, parts):
    inputs = leaves(torch.float64, *parts, T=(2,), H=2, H_kv=1, E=2, F=3, D=4)
    present = [x for x in inputs if x is not None]

    def call(*given):
        rest = iter(given)
        return gated_mhf(*(None if x is None else next(rest) for x in inputs), backend=backend, **options_of(inputs))

    assert torch.autograd.gradcheck(call, present)
    assert torch.autograd.gradgradcheck(call, present)


def test_compile_autocast_and_checkpoint():
    inputs = leaves(torch.float32)
    compiled = torch.compile(gated_mhf, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs, **OPTIONS), gated_mhf(*inputs, **OPTIONS))
    out = checkpoint(lambda *x: gated_mhf(*x, **OPTIONS), *inputs, use_reentrant=False)
    grads = torch.autograd.grad(out.sum(), inputs)
    torch.testing.assert_close(grads, torch.autograd.grad(gated_mhf(*inputs, **OPTIONS).sum(), inputs))
    with torch.autocast("cpu", torch.bfloat16):
        out = gated_mhf(*inputs, **OPTIONS)
    low = [x.detach().bfloat16() for x in inputs[:4]]
    assert torch.equal(out, gated_mhf(*low, *inputs[4:], **OPTIONS))


def test_saves_only_its_inputs():
    inputs, saved = leaves(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        gated_mhf(*inputs)
    assert {x.data_ptr() for x in saved} == {x.data_ptr() for x in inputs}


@pytest.mark.parametrize("shapes", [list, three_dimensions])
def test_flops(shapes):
    inputs = shapes(leaves(torch.float32))
    product, gate = 2 * inputs[0].numel() * 3 * 5, 2 * inputs[0].numel() * 3
    with FlopCounterMode(display=False) as forward:
        out = gated_mhf(*inputs)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert forward.get_total_flops() == 3 * product + gate
    assert backward.get_total_flops() == 8 * product + 2 * gate


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({4: torch.randn(4, 6, 2)}, r"gate_weight: expected shape \(4, 6, 3\), got \(4, 6, 2\)"),
        ({5: torch.randn(4, 5)}, r"norm_weight: expected shape \(4, 6\), got \(4, 5\)"),
        ({5: torch.randn(4, 6, device="meta")}, "norm_weight: expected q's device cpu, got meta"),
        ({4: torch.ones(4, 6, 3, dtype=torch.int64)}, "gate_weight: expected float64, .*, got torch.int64"),
        ({5: torch.ones(4, 6, dtype=torch.bool)}, "norm_weight: expected float64, .*, got torch.bool"),
    ],
)
def test_bad_weights(changes, message):
    inputs = [changes.get(i, x) for i, x in enumerate(leaves(torch.float32))]
    with pytest.raises(ValueError, match=message):
        gated_mhf(*inputs)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate_type": "relu"}, "gate_type: expected one of sigmoid, softmax, got 'relu'"),
        ({"gate_total": float("nan")}, "gate_total: expected a finite number, got nan"),
        ({"norm_eps": -1e-6}, "norm_eps: expected a finite number >= 0, got -1e-06"),
        ({"norm_eps": float("inf")}, "norm_eps: expected a finite number >= 0, got inf"),
        (
            {"backend": "cuda"},
            "backend: expected one of auto, hopper, triton, onednn, blockwise, reference, got 'cuda'",
        ),
    ],
)
def test_bad_options(options, message, device):
    with pytest.raises(ValueError, match=message):
        gated_mhf(*(x.detach().to(device) for x in leaves()), **options)


def test_a_total_without_a_gate():
    with pytest.raises(ValueError, match="gate_total: expected 1 without gate_weight, got 2"):
        gated_mhf(*leaves(has_gate=False), gate_total=2)
