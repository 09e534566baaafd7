"""The fused loss, with stand-ins in plain PyTorch for the libraries, which require a GPU."""

import copy
import inspect
import io
import json
import math
import pickle
import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
import torch
from accelerate import Accelerator, disk_offload
from accelerate.state import AcceleratorState
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import flashmhf.training.run
from flashmhf.data.config import DataConfig
from flashmhf.errors import InputError
from flashmhf.models.fused_loss import choose_linear_loss, fuse_loss, use_fused_loss
from flashmhf.training.arguments import parse_arguments
from flashmhf.training.config import TrainConfig
from flashmhf.training.run import train
from tiny import tiny_model

called_in: list[torch.dtype] = []


class LigerFusedLinearCrossEntropyLoss(nn.Module):
    """liger-kernel 0.8.5's arguments."""

    def __init__(self, ignore_index=-100, reduction="mean", accum_dtype=None):
        super().__init__()
        self.options = {"ignore_index": ignore_index, "reduction": reduction}
        assert accum_dtype == torch.float32

    def forward(self, lin_weight, _input, target, bias=None):
        called_in.append(_input.dtype)
        assert lin_weight.dtype == _input.dtype
        assert not torch.is_autocast_enabled("cpu")
        return cross_entropy((_input @ lin_weight.t()).float(), target, **self.options)


def linear_cross_entropy(
    e, c, targets, ignore_index=-100, softcap=None, reduction="mean", shift=False, filter_eps="high"
):
    """cut-cross-entropy 25.1.1's arguments."""
    called_in.append(e.dtype)
    assert e.shape[:-1] == targets.shape
    assert filter_eps is None
    return cross_entropy((e @ c.t()).float(), targets, ignore_index=ignore_index, reduction=reduction)


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch):
    called_in.clear()
    for name in ("liger_kernel", "cut_cross_entropy"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr("flashmhf.models.fused_loss.find_spec", lambda name: sys.modules.get(name))


def install(monkeypatch, library: str) -> None:
    for name in ("liger_kernel", "liger_kernel.transformers") if library == "liger_kernel" else (library,):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.LigerFusedLinearCrossEntropyLoss = LigerFusedLinearCrossEntropyLoss
        module.linear_cross_entropy = linear_cross_entropy
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture(params=["liger_kernel", "cut_cross_entropy"])
def installed(request, monkeypatch):
    install(monkeypatch, request.param)


@pytest.fixture
def model() -> nn.Module:
    return tiny_model(num_hidden_layers=2, num_subnetworks=3)


def loss_and_gradients(model, labels, **options):
    model.zero_grad()
    tokens = torch.arange(24).view(2, 12) * 11 % 320
    out = model(input_ids=tokens, labels=labels, use_cache=False, **options)
    out.loss.backward()
    return out, [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("num_items", [None, 37, torch.tensor(50)])
@pytest.mark.parametrize("autocast", [False, True])
def test_loss_and_gradients_equal_those_from_logits(installed, model, num_items, autocast):
    labels = torch.arange(24).view(2, 12) * 11 % 320
    labels[0, 3:6] = -100
    options = {} if num_items is None else {"num_items_in_batch": num_items}
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        expected, expected_grads = loss_and_gradients(model, labels, **options)
        fuse_loss(model, choose_linear_loss("on", "cuda", True))
        found, grads = loss_and_gradients(model, labels, **options)
    assert called_in == [torch.bfloat16 if autocast else torch.float32]
    assert found.logits is None
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(grads, expected_grads)


def test_logits_are_returned_without_labels_or_in_evaluation(installed, model):
    fuse_loss(model, choose_linear_loss("auto", "cuda", True))
    tokens = torch.arange(12)[None]
    assert model(tokens).logits.shape == (1, 12, 320)
    model.eval()
    assert model(tokens, labels=tokens).logits.shape == (1, 12, 320)
    assert model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=2).shape == (1, 14)
    assert not called_in


def start(run: TrainConfig, folder: Path, *flags: str, resume: bool = False, **changes) -> list[float]:
    base = ["--max-steps", "4", "--learning-rate", "1e-2", "--logging-steps", "1", "--report-to", "none"]
    base += ["--disable-tqdm", "true", "--per-device-train-batch-size", "2", "--save-steps", "2", "--eval-steps", "2"]
    train(replace(run, **changes), parse_arguments([*base, *flags], str(folder)), resume=resume)
    rows = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [row.get("loss", row.get("eval_loss")) for row in rows if "loss" in row or "eval_loss" in row]


@pytest.mark.parametrize("flags", [(), ("--gradient-accumulation-steps", "3"), ("--bf16", "true")], ids=str)
def test_training_equals_that_with_logits(corpus_folder, model_file, tmp_path, monkeypatch, flags):
    run = TrainConfig(
        model=str(model_file), data=DataConfig(source=str(corpus_folder), context_length=32, validation_tokens=320)
    )
    expected = start(run, tmp_path / "plain", *flags)
    assert not called_in
    install(monkeypatch, "liger_kernel")
    monkeypatch.setattr(
        flashmhf.training.run,
        "use_fused_loss",
        lambda model, choice, _, half: use_fused_loss(model, choice, "cuda", half),
    )
    assert start(run, tmp_path / "fused", *flags) == pytest.approx(expected, rel=1e-5)
    assert len(called_in) == (12 if "3" in flags else 4)
    start(run, tmp_path / "off", fused_loss="off")
    assert len(called_in) == (12 if "3" in flags else 4)


def test_auto_uses_a_library_where_one_can_run(monkeypatch, caplog):
    assert choose_linear_loss("auto", "cuda", True) is None
    install(monkeypatch, "cut_cross_entropy")
    assert choose_linear_loss("auto", "cpu", True) is None
    assert choose_linear_loss("auto", "cuda", False) is None  # it has no gradient in float32
    with caplog.at_level("INFO", "flashmhf"):
        assert choose_linear_loss("auto", "cuda", True) is not None
        install(monkeypatch, "liger_kernel")
        assert choose_linear_loss("auto", "cuda", False) is not None
    assert [record.message.split(";")[0] for record in caplog.records] == [
        "using the fused loss of cut-cross-entropy",
        "using the fused loss of liger-kernel",
    ]
    assert choose_linear_loss("off", "cuda", True) is None


def test_invalid_choices_are_errors(monkeypatch):
    with pytest.raises(InputError, match="fused-loss: expected one of auto, on, off, got 'yes'"):
        choose_linear_loss("yes", "cuda", True)
    with pytest.raises(InputError, match="fused-loss: expected a GPU, got cpu"):
        choose_linear_loss("on", "cpu", True)
    wanted = "fused-loss: expected liger-kernel, or cut-cross-entropy and --bf16 or --fp16, got "
    with pytest.raises(InputError, match=wanted + "neither"):
        choose_linear_loss("on", "cuda", True)
    install(monkeypatch, "cut_cross_entropy")
    with pytest.raises(InputError, match=wanted + "the latter with float32"):
        choose_linear_loss("on", "cuda", False)


def test_other_model_families_are_not_fused(installed):
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9))
    with pytest.raises(InputError, match="fused-loss: expected a model of the Llama family, got GPT2LMHeadModel"):
        use_fused_loss(model, "on", "cuda", True)
    use_fused_loss(model, "auto", "cuda", True)
    tokens = torch.arange(5)[None]
    assert model(tokens, labels=tokens).logits.shape == (1, 5, 9)
    assert not called_in


TOKENS = torch.arange(24).view(2, 12) * 11 % 320


def biased(model: nn.Module) -> None:
    head = nn.Linear(32, 320)
    head.weight = model.lm_head.weight
    model.lm_head = head


def with_adapter(model: nn.Module) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, model)


def hooked(model: nn.Module) -> None:
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits.tanh())


def parametrized(model: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(model.lm_head)


def another_loss(model: nn.Module) -> None:
    model.loss_function = lambda logits, **_: logits.square().mean()


# Changes of the model, and arguments, with which the loss is not that of the output layer's weight alone.
NOT_FUSED = {
    "bias": (biased, {}),
    "adapter": (with_adapter, {}),
    "hook": (hooked, {}),
    "parametrisation": (parametrized, {}),
    "another loss function": (another_loss, {}),
    "shift_labels": (lambda model: None, {"shift_labels": TOKENS}),
    "ignore_index": (lambda model: None, {"ignore_index": 11}),
    "tuple": (lambda model: None, {"return_dict": False}),
}


@pytest.mark.parametrize("case", NOT_FUSED)
def test_other_losses_are_those_from_logits(installed, model, case):
    change, options = NOT_FUSED[case]
    change(model)
    torch.manual_seed(0)
    expected = model(TOKENS, labels=TOKENS, **options)
    fuse_loss(model, choose_linear_loss("on", "cuda", True))
    torch.manual_seed(0)
    found = model(TOKENS, labels=TOKENS, **options)
    assert not called_in
    assert torch.equal(found[0], expected[0])
    assert type(found) is type(expected)


def test_labels_by_position_and_further_outputs(installed, model):
    expected = model(TOKENS, None, None, None, None, TOKENS)
    fuse_loss(model, choose_linear_loss("on", "cuda", True))
    assert torch.equal(model(TOKENS, None, None, None, None, TOKENS).loss, expected.loss)
    found = model(TOKENS, labels=TOKENS, output_hidden_states=True)
    assert called_in
    assert len(found.hidden_states) == 3
    assert (
        list(inspect.signature(model.forward).parameters) == list(inspect.signature(type(model).forward).parameters)[1:]
    )


def copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def copied_after_preparing(model: nn.Module) -> nn.Module:
    """accelerate wraps the method once more."""
    AcceleratorState._reset_state(reset_partial_state=True)
    prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model)
    AcceleratorState._reset_state(reset_partial_state=True)
    return copy.deepcopy(prepared)


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("make_copy", [copied, copied_after_preparing, pickled, saved])
def test_copies_compute_with_their_own_weights(installed, model, make_copy):
    fuse_loss(model, choose_linear_loss("on", "cuda", True))
    other = make_copy(model)
    before = other(TOKENS, labels=TOKENS).loss
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(other(TOKENS, labels=TOKENS).loss, before)
    assert model(TOKENS, labels=TOKENS).loss.item() == pytest.approx(math.log(320))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert other(TOKENS, labels=TOKENS).loss.item() == pytest.approx(math.log(320))


def test_an_offloaded_model_computes_the_same(installed, model, tmp_path):
    fuse_loss(model, choose_linear_loss("on", "cuda", True))
    with torch.no_grad():
        expected = model(TOKENS, labels=TOKENS).loss
        offloaded = disk_offload(copy.deepcopy(model), str(tmp_path), execution_device=torch.device("cpu"))
        torch.testing.assert_close(offloaded(TOKENS, labels=TOKENS).loss, expected)


def test_a_model_with_another_forward_is_not_fused(installed):
    class Capped(LlamaForCausalLM):
        def forward(self, *args, **options):
            return super().forward(*args, **options)

    model = Capped(LlamaConfig(hidden_size=8, num_attention_heads=1, num_hidden_layers=1, vocab_size=9))
    with pytest.raises(InputError, match="fused-loss: expected a model of the Llama family, got Capped"):
        use_fused_loss(model, "on", "cuda", True)
    use_fused_loss(model, "auto", "cuda", True)
    assert "forward" not in vars(model)
