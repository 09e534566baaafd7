"""The layers: formulas, options, initialisation, and what users of torch.nn expect."""

import copy
import math

import pytest
import torch
import torch.nn.functional as nnf
from torch.profiler import ProfilerActivity, profile

from flashmhf import FlashMHF
from flashmhf.layers import MHFFN, PKV, DenseMoE, HeadRMSNorm, SwiGLU
from flashmhf.ops import reference

OPTIONS = {
    "plain": {},
    "softmax": {"gate_type": "softmax"},
    "no gate": {"gate_type": None},
    "norm": {"q_norm": True},
    "grouped": {"num_kv_heads": 2},
    "no projections": {"projections": False},
    "bias": {"bias": True},
    "scaled": {"init": "scaled", "q_norm": True},
    "scales": {"score_scale": 2.5, "gate_scale": 1.7, "output_scale": 0.7},
    "scales, norm, no gate": {"score_scale": 2.5, "output_scale": 0.7, "q_norm": True, "gate_type": None},
}
LAYERS = {
    "FlashMHF": lambda **o: FlashMHF(32, 4, 3, 20, **o),
    "FlashMHF, norm": lambda **o: FlashMHF(32, 4, 3, 20, q_norm=True, **o),
    "MHFFN": lambda **o: MHFFN(32, 4, 50, **o),
    "DenseMoE": lambda **o: DenseMoE(32, 3, 20, **o),
    "PKV": lambda **o: PKV(32, 4, 50, **o),
    "SwiGLU": lambda **o: SwiGLU(32, 50, **o),
}


def formula(layer: FlashMHF, x: torch.Tensor) -> torch.Tensor:
    """The layer as in the paper, with the scales applied where they are documented to act."""
    q = x if layer.in_proj is None else layer.in_proj(x)
    q = q.unflatten(-1, (layer.num_heads, layer.head_dim))
    if layer.q_norm is not None:
        q = reference.head_norm(q, layer.q_norm.weight, layer.q_norm.eps)
    gate = (
        None
        if layer.gate_type is None
        else reference.head_gate(q, layer.gate_scale * layer.gate_weight, layer.gate_type)
    )
    groups = layer.num_heads // layer.num_kv_heads
    k, u, v = (layer._rows(name).repeat_interleave(groups, 0) for name in "kuv")
    m = layer.score_scale * torch.einsum("...hd,hefd->...hef", q, k)
    n = layer.score_scale * torch.einsum("...hd,hefd->...hef", q, u)
    p = nnf.silu(m) * n * (1.0 if gate is None else gate[..., None])
    out = layer.output_scale * torch.einsum("...hef,hefd->...hd", p, v).flatten(-2)
    return out if layer.out_proj is None else layer.out_proj(out)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_flashmhf_matches_the_formula(options):
    layer = FlashMHF(32, 4, 3, 20, dtype=torch.float64, **options)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, 5, 32, dtype=torch.float64, requires_grad=True)
    expected = formula(layer, x)
    torch.testing.assert_close(layer(x), expected)
    needed = [x, *layer.parameters()]
    grads = torch.autograd.grad(layer(x).square().sum(), needed)
    torch.testing.assert_close(grads, torch.autograd.grad(expected.square().sum(), needed))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_parameter_names_and_shapes(options):
    layer = FlashMHF(32, 4, 3, 20, **options)
    H_kv = options.get("num_kv_heads", 4)
    expected = dict.fromkeys("kuv", (H_kv * 3, 20, 8))
    if options.get("gate_type", "sigmoid") is not None:
        expected["gate_weight"] = (4, 8, 3)
    if options.get("q_norm"):
        expected["q_norm.weight"] = (4, 8)
    if options.get("projections", True):
        expected |= {"in_proj.weight": (32, 32), "out_proj.weight": (32, 32)}
    if options.get("bias"):
        expected |= {"in_proj.bias": (32,), "out_proj.bias": (32,)}
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == expected


def test_special_cases_match_the_layers_they_reduce_to():
    x = torch.randn(2, 5, 32)
    mhffn = MHFFN(32, 4, 50)
    torch.testing.assert_close(mhffn(x), formula(mhffn, x))
    moe = DenseMoE(32, 3, 20, init="scaled")
    experts = (moe.k, moe.u, moe.v)
    gate = torch.sigmoid(x @ moe.gate_weight[0])
    gate = gate / gate.sum(-1, keepdim=True)
    outs = [(nnf.silu(x @ k.T) * (x @ u.T)) @ v for k, u, v in zip(*experts, strict=True)]
    torch.testing.assert_close(moe(x), 3 * sum(gate[..., e : e + 1] * out for e, out in enumerate(outs)))
    swiglu = SwiGLU(32, 50)
    single = FlashMHF(32, 1, 1, 50, gate_type=None, projections=False)
    with torch.no_grad():
        single.k[0].copy_(swiglu.gate_proj.weight)
        single.u[0].copy_(swiglu.up_proj.weight)
        single.v[0].copy_(swiglu.down_proj.weight.T)
    torch.testing.assert_close(single(x), swiglu(x))


def test_pkv_is_attention_over_parameters():
    layer = PKV(32, 4, 50, init="scaled").double()
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    q = layer.in_proj(x).unflatten(-1, (4, 8))
    weights = (torch.einsum("blhd,hsd->blhs", q, layer.k) / math.sqrt(8)).softmax(-1)
    expected = layer.out_proj(torch.einsum("blhs,hsd->blhd", weights, layer.v).flatten(-2))
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())
@pytest.mark.parametrize("lead", [(), (0,), (7,), (2, 0), (2, 3), (2, 3, 4)])
def test_any_leading_dimensions(make, lead):
    layer = make(init="scaled")
    x = torch.randn(*lead, 32, requires_grad=True)
    y = layer(x)
    assert y.shape == x.shape
    y.sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())
def test_state_dict_copies_and_moves(make):
    layer = make(init="scaled")
    x = torch.randn(3, 32)
    other = make(init="scaled")
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert all(p.dtype == torch.bfloat16 for p in copy.deepcopy(layer).to(torch.bfloat16).parameters())
    assert layer.to(torch.float64)(x.double()).dtype == torch.float64
    on_meta = make(device="meta", dtype=torch.float16)
    assert all(p.is_meta and p.dtype == torch.float16 for p in on_meta.parameters())
    materialised = on_meta.to_empty(device="cpu")
    materialised.reset_parameters()
    assert all(p.isfinite().all() for p in materialised.parameters())


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())
def test_compile_full_graph(make):
    torch._dynamo.reset()
    layer = make(init="scaled")
    x = torch.randn(2, 5, 32)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    needed = list(layer.parameters())
    grads = torch.autograd.grad(compiled(x).square().sum(), needed)
    torch.testing.assert_close(grads, torch.autograd.grad(layer(x).square().sum(), needed))


def test_autocast_trains_float32_parameters():
    layer = FlashMHF(32, 4, 3, 20, q_norm=True, init="scaled")
    x = torch.randn(2, 5, 32)
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert (y.float() - exact).norm() < 0.02 * exact.norm()
    y.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in layer.parameters())


def test_reference_initialisation():
    torch.manual_seed(0)
    layer = FlashMHF(256, 4, 3, 192, q_norm=True)
    for name in "kuv":
        assert abs(getattr(layer, name).std().item() - 0.02) < 3e-4
    assert abs(layer.gate_weight.std().item() - 0.02) < 2e-3
    bound = 0.707 * math.sqrt(6 / 512)
    for projection in (layer.in_proj, layer.out_proj):
        assert abs(projection.weight.max().item() - bound) < 1e-3
        assert abs(projection.weight.std().item() - bound / math.sqrt(3)) < 1e-3
    assert torch.equal(layer.q_norm.weight, torch.ones(4, 64))
    assert (layer.score_scale, layer.gate_scale, layer.output_scale) == (1.0, 1.0, 1.0)


def test_scaled_initialisation_does_not_depend_on_heads_and_subnetworks():
    """Outputs start equally large for any number of heads, sub-networks and rows."""
    x = torch.randn(512, 256)
    sizes = [(2, 3, 128), (4, 3, 192), (8, 6, 96), (4, 1, 600)]
    outputs = []
    for heads, subnetworks, width in sizes:
        layer = FlashMHF(256, heads, subnetworks, width, init="scaled", q_norm=True)
        assert (layer.score_scale, layer.gate_scale, layer.output_scale) == (heads, heads, subnetworks)
        outputs.append(layer(x).std().item())
    assert max(outputs) < 1.5 * min(outputs)


def test_extra_repr_names_the_sizes():
    text = repr(FlashMHF(32, 4, 3, 20, num_kv_heads=2, gate_type="softmax", q_norm=True, init="scaled"))
    for part in (
        "hidden_size=32, num_heads=4, num_subnetworks=3, subnetwork_size=20, gate_type='softmax'",
        "num_kv_heads=2",
        "score_scale=4, gate_scale=4, output_scale=3",
        "(q_norm): HeadRMSNorm((4, 8), eps=1e-06)",
    ):
        assert part in text


nan = float("nan")
BAD = {
    "hidden_size: expected a multiple of num_heads 5, got 32": lambda: FlashMHF(32, 5, 1, 8),
    "num_heads: expected a multiple of num_kv_heads 3, got 4": lambda: FlashMHF(32, 4, 1, 8, num_kv_heads=3),
    "num_subnetworks: expected at least 1, got 0": lambda: FlashMHF(32, 4, 0, 8),
    "gate_type: expected one of sigmoid, softmax, None, got 'relu'": lambda: FlashMHF(32, 4, 1, 8, gate_type="relu"),
    "init: expected one of reference, scaled, got 'zero'": lambda: FlashMHF(32, 4, 1, 8, init="zero"),
    "backend: expected one of auto, .*, got 'cuda'": lambda: FlashMHF(32, 4, 1, 8, backend="cuda"),
    "num_heads: expected an integer, got 4.0": lambda: FlashMHF(32, 4.0, 1, 8),
    "num_subnetworks: expected an integer, got True": lambda: FlashMHF(32, 4, True, 8),
    "intermediate_size: expected an integer, got '8'": lambda: SwiGLU(32, "8"),
    "q_norm: expected True or False, got 'no'": lambda: FlashMHF(32, 4, 1, 8, q_norm="no"),
    "bias: expected True or False, got None": lambda: PKV(32, 4, 8, bias=None),
    "bias: expected False without projections, got True": lambda: DenseMoE(32, 4, 8, bias=True),
    "gate_scale: expected none without a gate, got 2.0": lambda: MHFFN(32, 4, 8, gate_scale=2.0),
    "score_scale: expected a finite number other than 0, got 0": lambda: FlashMHF(32, 4, 1, 8, score_scale=0),
    "output_scale: expected a finite number other than 0, got nan": lambda: FlashMHF(32, 4, 1, 8, output_scale=nan),
    "norm_eps: expected a number of at least 0, got nan": lambda: FlashMHF(32, 4, 1, 8, norm_eps=nan),
    "norm_eps: expected a number of at least 0, got '1e-6'": lambda: FlashMHF(32, 4, 1, 8, norm_eps="1e-6"),
    "num_slots: expected at least 1, got 0": lambda: PKV(32, 4, 0),
    "intermediate_size: expected at least 1, got -3": lambda: SwiGLU(32, -3),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    with pytest.raises(ValueError, match=message):
        BAD[message]()


@pytest.mark.parametrize(
    "make",
    [
        lambda: FlashMHF(32, 4, 1, 8, num_expert=2),
        lambda: MHFFN(32, 4, 8, gate_type="sigmoid"),
        lambda: DenseMoE(32, 4, 8, projections=True),
        lambda: DenseMoE(32, 4, 8, num_heads=4),
        lambda: PKV(32, 4, 8, q_norm=True),
        lambda: SwiGLU(32, 8, num_heads=4),
    ],
)
def test_options_that_a_layer_does_not_have_are_refused(make):
    with pytest.raises(TypeError, match=r"unexpected keyword argument|multiple values for"):
        make()


def test_a_named_backend_reaches_the_operator():
    layer = FlashMHF(32, 4, 1, 8, backend="hopper")
    with pytest.raises(ValueError, match="backend: 'hopper' cannot run here"):
        layer(torch.randn(3, 32))


def test_second_derivatives_of_the_layer():
    layer = FlashMHF(8, 2, 2, 3, q_norm=True, init="scaled", dtype=torch.float64)
    x = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(layer, (x,))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_recomputing_q_changes_no_result(options):
    layer = FlashMHF(32, 4, 3, 20, **options)
    x, dy = torch.randn(2, 50, 32, requires_grad=True), torch.randn(2, 50, 32)
    needed = [x, *layer.parameters()]
    expected = torch.autograd.grad(layer(x), needed, dy)
    layer.recompute_q = True
    torch.testing.assert_close(torch.autograd.grad(layer(x), needed, dy), expected)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), layer.requires_grad_(False)(x))


def test_recomputing_q_saves_the_memory_of_q():
    """After the forward S and the output are kept, and q unless it is recomputed."""
    x = torch.randn(1000, 64, requires_grad=True)

    def kept_bytes(**options) -> int:
        layer = FlashMHF(64, 4, 3, 40, q_norm=True, **options)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            out = layer(x)
        assert out.requires_grad
        events = profiler.profiler.kineto_results.events()
        return sum(event.nbytes() for event in events if event.name() == "[memory]")

    assert kept_bytes() == pytest.approx(3 * x.nbytes, rel=0.02)
    assert kept_bytes(recompute_q=True) == pytest.approx(2 * x.nbytes, rel=0.02)


def test_head_norm_matches_the_reference():
    norm = HeadRMSNorm(4, 8, eps=1e-3)
    torch.nn.init.normal_(norm.weight)
    q = torch.randn(3, 4, 8)
    torch.testing.assert_close(norm(q), reference.head_norm(q, norm.weight, 1e-3))
    assert norm(q.bfloat16()).dtype == torch.bfloat16
