"""The operators' autograd registration: modes, profilers, transforms and tensor subclasses still see each call."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flashmhf.ops import gated_mhf as module
from flashmhf.ops.flash_mhf import flash_mhf
from flashmhf.ops.gated_mhf import gated_mhf


def leaves(T: int = 3) -> list[torch.Tensor]:
    shapes = [(T, 2, 4), *[(1, 2, 5, 4)] * 3, (2, 4, 2), (2, 4)]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def loss(*inputs: torch.Tensor) -> torch.Tensor:
    return gated_mhf(*inputs).square().sum()


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_both_operators():
    with Seen() as seen:
        loss(*leaves()).backward()
    operators = [name for name in seen.names if name.startswith("flashmhf")]
    assert operators == ["flashmhf.gated_mhf.default", "flashmhf.gated_mhf_backward.default"]


def test_a_profiler_sees_both_operators():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        loss(*leaves()).backward()
    names = {event.key for event in profile.key_averages()}
    assert {"flashmhf::gated_mhf", "flashmhf::gated_mhf_backward"} <= names


class Logged(torch.Tensor):
    """Records the functions that it is passed to."""

    names: list[str] = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.names.append(str(function))
        return super().__torch_function__(function, types, args, kwargs or {})


def test_a_tensor_subclass_sees_the_operator():
    q, *rest = leaves()
    out = flash_mhf(q.detach().as_subclass(Logged), *rest[:3])
    assert isinstance(out, Logged)
    assert any("flash_mhf" in name for name in Logged.names)


@pytest.mark.parametrize("changed", range(6))
def test_saved_tensors_may_be_unpacked_with_other_strides(changed):
    inputs = leaves()
    expected = torch.autograd.grad(loss(*inputs), inputs)
    address = inputs[changed].data_ptr()

    def pack(x: torch.Tensor) -> torch.Tensor:
        return x.detach().transpose(-1, -2).clone().transpose(-1, -2) if x.data_ptr() == address else x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = loss(*inputs)
    torch.testing.assert_close(torch.autograd.grad(result, inputs), expected)


def test_without_gradients_nothing_is_saved():
    inputs = leaves()
    with torch.no_grad():
        assert gated_mhf(*inputs).grad_fn is None
    assert gated_mhf(*(x.detach() for x in inputs)).grad_fn is None
    with torch.inference_mode():
        assert gated_mhf(*inputs).is_inference()


def test_any_single_input_may_require_a_gradient():
    for needed in range(6):
        inputs = [x.detach().requires_grad_(i == needed) for i, x in enumerate(leaves())]
        loss(*inputs).backward()
        assert [x.grad is not None for x in inputs] == [i == needed for i in range(6)]


def test_a_plain_call_is_dispatched_once(monkeypatch):
    """This is what makes it fast; under a mode it goes through the dispatcher again."""
    redispatched = []
    operator = torch.ops.flashmhf.gated_mhf.default
    redispatch = operator.redispatch
    monkeypatch.setattr(operator, "redispatch", lambda *inputs: redispatched.append(1) or redispatch(*inputs))
    assert module._GATED_MHF is operator
    loss(*leaves())
    assert not redispatched
    with Seen():
        loss(*leaves())
    assert redispatched
