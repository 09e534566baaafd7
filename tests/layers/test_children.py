"""What users do to a layer's parameters and children: it takes effect, or the layer computes as before."""

import copy
import io
import pickle

import accelerate
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from flashmhf import FlashMHF
from flashmhf.layers import HeadRMSNorm
from flashmhf.layers.plain import is_plain


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def make(**options: object) -> FlashMHF:
    layer = FlashMHF(32, 4, 3, 20, **{"q_norm": True, "init": "scaled"} | options)
    nn.init.uniform_(layer.q_norm.weight, 0.5, 1.5)
    return layer


def double(layer: FlashMHF, name: str) -> None:
    with torch.no_grad():
        layer.get_parameter(name).mul_(2)


def half_mask(weight: Tensor) -> Tensor:
    return (torch.arange(weight.numel()).view(weight.shape) % 2).to(weight.dtype)


def mask(layer: FlashMHF, name: str) -> None:
    weight = layer.get_parameter(name)
    with torch.no_grad():
        weight.mul_(half_mask(weight))


def owner(layer: FlashMHF, name: str) -> tuple[nn.Module, str]:
    path, _, own = name.rpartition(".")
    return layer.get_submodule(path), own


PARAMETERS = ["k", "u", "v", "gate_weight", "q_norm.weight", "in_proj.weight", "out_proj.weight"]
CHANGES = {
    "parametrize": (lambda layer, name: parametrize.register_parametrization(*owner(layer, name), Doubled()), double),
    "prune": (
        lambda layer, name: prune.custom_from_mask(*owner(layer, name), half_mask(layer.get_parameter(name))),
        mask,
    ),
    "weight_norm": (lambda layer, name: parametrizations.weight_norm(*owner(layer, name)), lambda layer, name: None),
}


@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("recompute_q", [False, True])
def test_a_changed_parameter_is_used(change, name, recompute_q):
    layer = make(recompute_q=recompute_q)
    changed, expected = copy.deepcopy(layer), copy.deepcopy(layer)
    CHANGES[change][0](changed, name)
    CHANGES[change][1](expected, name)
    x = torch.randn(5, 32, requires_grad=True)
    torch.testing.assert_close(changed(x), expected(x), atol=1e-6, rtol=1e-5)
    grads = [torch.autograd.grad(module(x).square().sum(), x)[0] for module in (changed, expected)]
    torch.testing.assert_close(grads[0], grads[1], atol=1e-5, rtol=1e-5)
    changed(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in changed.parameters())


@pytest.mark.parametrize("name", ["q_norm", "in_proj", "out_proj"])
@pytest.mark.parametrize("options", [{}, {"score_scale": 1.0}, {"recompute_q": True}, {"gate_type": None}], ids=str)
def test_hooks_of_children_see_and_replace_values(name, options):
    layer, x = make(**options), torch.randn(2, 5, 32, requires_grad=True)
    expected, seen = layer(x), []
    child = layer.get_submodule(name)
    forward = child.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0].shape, output.shape)))
    before = child.register_forward_pre_hook(lambda module, inputs: seen.append("before"))
    backward = child.register_full_backward_hook(lambda module, *gradients: seen.append("backward"))
    torch.testing.assert_close(layer(x), expected)
    shape = (2, 5, 4, 8) if name == "q_norm" else (2, 5, 32)
    assert seen == ["before", (shape, shape)]
    layer(x).sum().backward()
    assert seen[-1] == "backward"
    for hook in (forward, before, backward):
        hook.remove()
    child.register_forward_hook(lambda module, inputs, output: output * 0)
    assert layer(x).abs().max() == 0
    child._forward_hooks.clear()
    assert torch.equal(layer(x), expected)


def test_a_child_with_another_forward_is_called():
    layer, x = make(), torch.randn(5, 32)
    doubled = copy.deepcopy(layer)
    double(doubled, "q_norm.weight")
    plain = layer.q_norm.forward
    layer.q_norm.forward = lambda q: 2 * plain(q)
    torch.testing.assert_close(layer(x), doubled(x))
    assert not is_plain(layer.q_norm, HeadRMSNorm)
    assert is_plain(doubled.q_norm, HeadRMSNorm)


def test_a_hook_for_all_modules_sees_the_norm():
    layer, seen = make(), []
    with_hook = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    try:
        layer(torch.randn(5, 32))
    finally:
        with_hook.remove()
    assert HeadRMSNorm in seen


def to_disk(layer: nn.Module, folder: str) -> nn.Module:
    return accelerate.disk_offload(layer, folder, execution_device=torch.device("cpu"))


def to_cpu(layer: nn.Module, folder: str) -> nn.Module:
    return accelerate.cpu_offload(layer, execution_device=torch.device("cpu"))


@pytest.mark.parametrize("offload", [to_disk, to_cpu])
@pytest.mark.parametrize("options", [{}, {"recompute_q": True}, {"bias": True}, {"projections": False}], ids=str)
def test_offloaded_layers_compute_the_same(tmp_path, offload, options):
    layer, x = make(**options), torch.randn(5, 32)
    with torch.no_grad():
        expected = layer(x)
        offloaded = offload(copy.deepcopy(layer), str(tmp_path))
        assert all(parameter.is_meta for parameter in offloaded.parameters())
        torch.testing.assert_close(offloaded(x), expected)


def through_torch_save(layer: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), through_torch_save])
def test_copies_have_their_own_weights(copied):
    layer, x = make(), torch.randn(5, 32)
    expected = layer(x)
    other = copied(layer)
    assert torch.equal(other(x), expected)
    for name in PARAMETERS:
        double(layer, name)
    assert torch.equal(other(x), expected)
    for name in PARAMETERS:
        double(other, name)
    assert torch.equal(other(x), layer(x))


def test_functional_call_uses_the_given_parameters():
    layer, x = make(), torch.randn(5, 32)
    doubled = copy.deepcopy(layer)
    for name in PARAMETERS:
        double(doubled, name)
    values = dict(doubled.named_parameters())
    assert torch.equal(torch.func.functional_call(layer, values, (x,)), doubled(x))


class Quantised(Tensor):
    """Like torchao's: 8 bits and a scale, and hardly any operator."""

    @staticmethod
    def __new__(cls, values: Tensor, scale: float) -> "Quantised":
        return Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.float32)

    def __init__(self, values: Tensor, scale: float) -> None:
        self.values, self.scale = values, scale

    def dequantize(self) -> Tensor:
        return self.values.float() * self.scale

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), options=None):
        if function is torch.ops.aten.detach.default:
            return cls(arguments[0].values, arguments[0].scale)
        raise NotImplementedError(function)


@pytest.mark.parametrize("name", ["k", "u", "v", "gate_weight", "q_norm.weight"])
def test_a_quantised_parameter_is_dequantised(name):
    layer, x = make().requires_grad_(False), torch.randn(5, 32)
    rounded = copy.deepcopy(layer)
    weight, (module, own) = layer.get_parameter(name), owner(layer, name)
    scale = weight.abs().max().item() / 127
    values = (weight / scale).round().to(torch.int8)
    setattr(module, own, nn.Parameter(Quantised(values, scale), requires_grad=False))
    with torch.no_grad():
        rounded.get_parameter(name).copy_(values.float() * scale)
    assert torch.equal(layer(x), rounded(x))
