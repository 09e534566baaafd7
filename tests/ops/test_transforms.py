"""torch.func, forward mode, vmap and batched gradients: against finite differences, plain autograd and loops."""

import itertools

import pytest
import torch
from problems import Shape, make_inputs
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from flashmhf import FlashMHF
from flashmhf.ops import backends
from flashmhf.ops.flash_mhf import flash_mhf
from flashmhf.ops.gated_mhf import gated_mhf

BACKENDS = ("reference", "blockwise")
LAYERS = {
    "gate": {},
    "no gate": {"gate_type": None},
    "softmax, norm, groups": {"gate_type": "softmax", "q_norm": True, "num_kv_heads": 2},
    "recomputed q": {"recompute_q": True},
}
STEP = 1e-5  # of central differences in float64


def make_layer(backend="auto", dtype=torch.float64, **options) -> FlashMHF:
    return FlashMHF(16, 4, 3, 5, init="scaled", backend=backend, dtype=dtype, **options)


def flash_inputs(gate=True, dtype=torch.float64):
    """Distinct sizes, so that no two dimensions are confused."""
    *arguments, _ = make_inputs(Shape((3,), 4, 2, 2, 5, 6), dtype, gate)
    return arguments


def gated_inputs(dtype=torch.float64):
    q, k, u, v, _ = flash_inputs(dtype=dtype)
    return [q, k, u, v, torch.randn(4, 6, 2, dtype=dtype), torch.randn(4, 6, dtype=dtype)]


FUNCTIONS = {"flash_mhf": (flash_mhf, flash_inputs), "gated_mhf": (gated_mhf, gated_inputs)}


def by_differences(function, inputs, tangents):
    ahead, behind = (
        function(*(x + sign * STEP * t for x, t in zip(inputs, tangents, strict=True))) for sign in (1, -1)
    )
    return (ahead - behind) / (2 * STEP)


def flat(tree) -> torch.Tensor:
    return torch.cat([x.flatten() for x in torch.utils._pytree.tree_leaves(tree)])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_forward_mode_of_every_argument_against_differences(name, backend):
    function, make = FUNCTIONS[name]
    inputs = make()
    for i in range(len(inputs)):
        tangents = [torch.randn_like(x) if i == j else torch.zeros_like(x) for j, x in enumerate(inputs)]
        want = by_differences(function, inputs, tangents)
        assert want.norm() > 0
        _, got = jvp(lambda *x: function(*x, backend=backend), tuple(inputs), tuple(tangents))
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)
        with forward_ad.dual_level():
            duals = [
                forward_ad.make_dual(x, t) if i == j else x
                for j, (x, t) in enumerate(zip(inputs, tangents, strict=True))
            ]
            got = forward_ad.unpack_dual(function(*duals, backend=backend)).tangent
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradcheck_in_every_mode(name, backend):
    function, make = FUNCTIONS[name]
    inputs = [x.requires_grad_() for x in make()]

    def call(*x):
        return function(*x, backend=backend)

    checks = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True, **checks)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True, check_fwd_over_rev=True, check_batched_grad=True)


def jacobian(function, x):
    return torch.autograd.functional.jacobian(function, x)


def second(function, x):
    return torch.autograd.functional.hessian(lambda x: function(x).square().sum(), x)


def square(function):
    return lambda x: function(x).square().sum()


# The transform, and the same by plain autograd.
TRANSFORMS = {
    "jacrev": (lambda f, x: jacrev(f)(x), jacobian),
    "jacfwd": (lambda f, x: jacfwd(f)(x), jacobian),
    "vjp": (lambda f, x: vjp(f, x)[1](x)[0], lambda f, x: torch.autograd.functional.vjp(f, x, x)[1]),
    "linearize": (lambda f, x: linearize(f, x)[1](x), lambda f, x: by_differences(f, [x], [x])),
    "hessian": (lambda f, x: hessian(square(f))(x), second),
    "jacrev of jacrev": (lambda f, x: jacrev(jacrev(square(f)))(x), second),
    "jacrev of jacfwd": (lambda f, x: jacrev(jacfwd(square(f)))(x), second),
    "jacfwd of jacfwd": (lambda f, x: jacfwd(jacfwd(square(f)))(x), second),
    "jvp of grad": (
        lambda f, x: jvp(grad(square(f)), (x,), (x,))[1],
        lambda f, x: torch.autograd.functional.hvp(square(f), x, x)[1],
    ),
    "grad of vmap": (
        lambda f, x: grad(lambda x: vmap(f)(x).square().sum())(x),
        lambda f, x: torch.autograd.functional.vjp(square(f), x)[1],
    ),
    "jacobian, vectorized": (lambda f, x: torch.autograd.functional.jacobian(f, x, vectorize=True), jacobian),
    "jacobian, forward mode": (
        lambda f, x: torch.autograd.functional.jacobian(f, x, vectorize=True, strategy="forward-mode"),
        jacobian,
    ),
    "hessian, vectorized": (
        lambda f, x: torch.autograd.functional.hessian(square(f), x, vectorize=True),
        second,
    ),
}


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr")
@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS.keys())
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_the_layer_under_a_transform(transform, options):
    if transform == "hessian, vectorized" and options.get("recompute_q"):
        pytest.skip("not a transform: a second backward, which selective activation checkpointing does not support")
    mine, plain = TRANSFORMS[transform]
    layer = make_layer(**options)
    x = torch.randn(2, 16, dtype=torch.float64)
    without_recomputation = make_layer(**{**options, "recompute_q": False})
    without_recomputation.load_state_dict(layer.state_dict())
    torch.testing.assert_close(mine(layer, x), plain(without_recomputation, x), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS.keys())
def test_gradients_per_sample_of_every_parameter(options):
    layer = make_layer(**options)
    parameters = {name: x.detach() for name, x in layer.named_parameters()}
    x = torch.randn(3, 2, 16, dtype=torch.float64)

    def loss(parameters, x):
        return functional_call(layer, parameters, (x,)).square().sum()

    got = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for i, row in enumerate(x):
        want = torch.autograd.grad(layer(row).square().sum(), list(layer.parameters()))
        for (name, per_sample), gradient in zip(got.items(), want, strict=True):
            torch.testing.assert_close(per_sample[i], gradient, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS.keys())
def test_an_ensemble_of_layers(options):
    layers = [make_layer(**options) for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(layers)
    x = torch.randn(2, 16, dtype=torch.float64)
    got = vmap(lambda p, b, x: functional_call(layers[0], (p, b), (x,)), in_dims=(0, 0, None))(parameters, buffers, x)
    torch.testing.assert_close(got, torch.stack([layer(x) for layer in layers]))


IN_DIMS = {
    "flash_mhf": [
        (0, None, None, None, None),
        (None, None, None, None, 1),
        (1, None, None, None, 2),
        (None, 0, 0, 0, None),
        (None, None, 2, None, None),
        (2, 1, 0, 4, 3),
    ],
    "gated_mhf": [
        (0, None, None, None, None, None),
        (None, None, None, None, 1, None),
        (None, None, None, None, None, 2),
        (1, 0, 0, 0, None, None),
        (3, 4, 0, 1, 2, 0),
    ],
}


@pytest.mark.parametrize(
    ("name", "in_dims"), [(name, dims) for name in IN_DIMS for dims in IN_DIMS[name]], ids=lambda x: str(x)
)
def test_vmap_is_a_loop(name, in_dims):
    """Outputs, and gradients with every choice of what is differentiated."""
    function, make = FUNCTIONS[name]
    samples = [[torch.randn_like(x) for x in make()] for _ in range(3)]
    batched = [
        samples[0][i] if dim is None else torch.stack([sample[i] for sample in samples], dim)
        for i, dim in enumerate(in_dims)
    ]
    rows = [[x if dim is None else x.select(dim, b) for x, dim in zip(batched, in_dims, strict=True)] for b in range(3)]
    torch.testing.assert_close(vmap(function, in_dims)(*batched), torch.stack([function(*row) for row in rows]))
    for argnums in [*itertools.combinations(range(len(in_dims)), 1), tuple(range(len(in_dims)))]:
        derivative = grad(lambda *x: function(*x).square().sum(), argnums)
        want = zip(*(derivative(*row) for row in rows), strict=True)
        for got, each in zip(vmap(derivative, in_dims)(*batched), want, strict=True):
            torch.testing.assert_close(got, torch.stack(each))


def test_vmap_of_vmap():
    q, k, u, v, gate = flash_inputs()
    several_q, several_k = torch.stack([q, 2 * q]), torch.stack([k, 2 * k, 3 * k])
    function = vmap(vmap(lambda q, k: flash_mhf(q, k, u, v, gate), (None, 0)), (0, None))
    want = torch.stack([torch.stack([flash_mhf(q, k, u, v, gate) for k in several_k]) for q in several_q])
    torch.testing.assert_close(function(several_q, several_k), want)


def test_batched_gradients_of_batched_gradients():
    """The older vmap, nested."""
    inputs = [x.requires_grad_() for x in flash_inputs()]
    out = flash_mhf(*inputs)
    vectors = torch.randn(2, 4, *out.shape, dtype=out.dtype)

    def rows(vector):
        return torch.autograd.grad(out, inputs, vector, is_grads_batched=True, retain_graph=True)

    got = torch._vmap_internals._vmap(rows)(vectors)
    for i, j in itertools.product(range(2), range(4)):
        want = torch.autograd.grad(out, inputs, vectors[i, j], retain_graph=True)
        torch.testing.assert_close([x[i, j] for x in got], list(want))


class Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names += [str(function)] if str(function).startswith("flashmhf") else []
        return function(*args, **(kwargs or {}))


def test_a_batch_is_one_call_and_weights_are_not_copied_for_tokens():
    q, k, u, v, gate = flash_inputs()
    with Calls() as calls:
        vmap(lambda q: flash_mhf(q, k, u, v, gate))(torch.stack([q, q, q]))
        vmap(grad(lambda k: flash_mhf(q, k, u, v, gate).sum()))(torch.stack([k, k, k]))
    operators = ["flashmhf.flash_mhf.default", "flashmhf.flash_mhf.default", "flashmhf.flash_mhf_backward.default"]
    assert calls.names == operators


@pytest.mark.parametrize("transform", ["jvp", "vmap", "per sample"])
@pytest.mark.parametrize("backend", ["triton", "onednn"])
def test_on_backends_without_float64(backend, transform):
    if backend == "onednn" and (reason := backends.backends()[backend]):
        pytest.skip(reason)
    layer = make_layer(backend, torch.float32)
    expected = make_layer("reference", torch.float32)
    expected.load_state_dict(layer.state_dict())
    x = torch.randn(2, 1, 16)
    run = {
        "jvp": lambda layer: jvp(layer, (x,), (x,)),
        "vmap": lambda layer: vmap(layer)(x),
        "per sample": lambda layer: vmap(
            grad(lambda p, x: functional_call(layer, p, (x,)).square().sum()), in_dims=(None, 0)
        )(dict(layer.named_parameters()), x),
    }[transform]
    torch.testing.assert_close(flat(run(layer)), flat(run(expected)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_in_16_bits(name, dtype):
    function, make = FUNCTIONS[name]
    inputs = make(dtype=dtype)
    inputs[4:] = [x.float() for x in inputs[4:]]  # as under autocast
    exact = [x.double() for x in inputs]
    (out, got), (_, want) = (jvp(function, tuple(x), tuple(x)) for x in (inputs, exact))
    assert (out.dtype, got.dtype) == (dtype, dtype)
    assert (got - want).norm() < 4 * torch.finfo(dtype).eps * want.norm()
    got, want = (grad(lambda *y: jvp(function, y, y)[1].sum().float())(*x) for x in (inputs, exact))
    assert (got - want).norm() < 8 * torch.finfo(dtype).eps * want.norm()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_autocast_casts_q_and_parameters_and_nothing_in_the_formula(name):
    function, make = FUNCTIONS[name]
    inputs = make(dtype=torch.float32)
    low = [*(x.bfloat16() for x in inputs[:4]), *inputs[4:]]
    want = jvp(function, tuple(low), tuple(low))
    with torch.autocast("cpu", torch.bfloat16):
        got = jvp(function, tuple(inputs), tuple(inputs))
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("transform", ["jvp", "per sample", "hessian"])
@pytest.mark.parametrize("recompute_q", [False, True])
def test_compiled(transform, recompute_q):
    torch._dynamo.reset()
    layer = make_layer(recompute_q=recompute_q)
    parameters = dict(layer.named_parameters())
    x = torch.randn(2, 16, dtype=torch.float64)

    def loss(parameters, x):
        return functional_call(layer, parameters, (x,)).square().sum()

    function = {
        "jvp": lambda x: jvp(layer, (x,), (x,))[1],
        "per sample": lambda x: vmap(grad(loss), in_dims=(None, 0))(parameters, x),
        "hessian": lambda x: hessian(lambda x: layer(x).square().sum())(x),
    }[transform]
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(flat(compiled(x)), flat(function(x)))


def test_a_compiled_dual_level():
    torch._dynamo.reset()
    layer = make_layer().requires_grad_(False)

    def tangent(x):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(layer(forward_ad.make_dual(x, x))).tangent

    x = torch.randn(2, 16, dtype=torch.float64)
    torch.testing.assert_close(torch.compile(tangent, backend="aot_eager")(x), tangent(x))


def test_what_is_wrong_with_one_sample_is_named():
    q, k, u, v, gate = flash_inputs()
    with pytest.raises(ValueError, match=r"gate: expected shape \(3, 4, 2\), got \(3, 4, 1\)"):
        vmap(flash_mhf, (None, 0, 0, 0, None))(q, *(torch.stack([x, x]) for x in (k, u, v)), gate[..., :1])
    with pytest.raises(ValueError, match=r"backend: expected one of .* got 'cuda'"):
        jvp(lambda q: flash_mhf(q, k, u, v, gate, backend="cuda"), (q,), (q,))


def test_no_grad_inside_a_transform_is_respected():
    q, *rest = flash_inputs()

    def loss(q):
        with torch.no_grad():
            constant = flash_mhf(q, *rest)
        return (constant * flash_mhf(q, *rest)).sum()

    want = grad(lambda q: (flash_mhf(q, *rest).detach() * flash_mhf(q, *rest)).sum())(q)
    torch.testing.assert_close(grad(loss)(q), want)
    torch.testing.assert_close(
        jacrev(grad(loss))(q), jacrev(grad(lambda q: (flash_mhf(q, *rest).detach() * flash_mhf(q, *rest)).sum()))(q)
    )
