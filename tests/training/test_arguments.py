"""transformers.TrainingArguments from flags: this package's defaults, and one line on what does not fit."""

import argparse

import pytest
import torch

from flashmhf.errors import InputError
from flashmhf.training.arguments import _complete, parse_arguments
from flashmhf.training.defaults import DEFAULTS, DEPENDENT
from flashmhf.training.precision import computes_bfloat16

UNGIVEN = {"load_best_model_at_end": False, "use_cpu": False, "fp16": False}


def test_flags_of_the_trainer_have_defaults_and_are_checked(tmp_path):
    arguments = parse_arguments(["--max-steps", "7", "--adam_beta2", "0.9", "--seed=3"], str(tmp_path))
    assert (arguments.max_steps, arguments.adam_beta2, arguments.seed, arguments.weight_decay) == (7, 0.9, 3, 0.1)
    assert arguments.lr_scheduler_type == DEFAULTS["lr_scheduler_type"]
    assert arguments.warmup_steps is None
    for flags, message in (
        (["--no-such-flag", "1"], "--no-such-flag"),
        (["--max-steps", "many"], "max.steps"),
        (["--lr-scheduler-type", "magic"], "magic"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            parse_arguments(flags, str(tmp_path))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", {"save_strategy": "steps", "save_steps": 500, "eval_steps": 500, "metric_for_best_model": None}),
        ("--lr-scheduler-type cosine_with_min_lr", {"lr_scheduler_kwargs": {"min_lr_rate": 0.1}}),
        ("--lr-scheduler-type cosine_warmup_with_min_lr", {"lr_scheduler_kwargs": {"min_lr_rate": 0.1}}),
        ("--lr-scheduler-type linear", {"lr_scheduler_kwargs": None}),
        ("--load-best-model-at-end true --eval-steps 70", {"save_steps": 70, "metric_for_best_model": "loss"}),
        ("--load-best-model-at-end true --eval-strategy epoch", {"save_strategy": "epoch"}),
        ("--eval-steps 70", {"save_steps": 500}),
        ("--eval-strategy epoch", {"save_strategy": "steps"}),
        ("--save-strategy best", {"metric_for_best_model": "loss", "greater_is_better": False}),
    ],
)
def test_defaults_fit_the_values_that_were_given(tmp_path, flags, expected):
    arguments = parse_arguments(flags.split(), str(tmp_path))
    assert {name: getattr(arguments, name) for name in expected} == expected


def test_the_learning_rate_fits_the_optimizer(tmp_path):
    rates = [parse_arguments([], str(tmp_path), **given).learning_rate for given in ({}, {"optimizer": "adamw"})]
    assert rates == [4e-3, 1e-3]
    assert parse_arguments(["--learning-rate", "0.5"], str(tmp_path), optimizer="adamw").learning_rate == 0.5


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("gpu", [True, False])
def test_bfloat16_is_the_default_of_a_device_that_computes_it(monkeypatch, gpu, native):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: gpu and native)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": native and not gpu})
    for given, bf16 in (({}, native), ({"fp16": True}, False), ({"bf16": False}, False), ({"bf16": True}, True)):
        values = {**dict.fromkeys(DEPENDENT), **DEFAULTS, **UNGIVEN, "use_cpu": not gpu, **given}
        namespace = argparse.Namespace(**values)
        _complete(namespace, {})
        assert namespace.bf16 == bf16
        _complete(resumed := argparse.Namespace(**values), {"bf16": False})
        assert resumed.bf16 == given.get("bf16", False)


@pytest.mark.parametrize("name", ["avx512_bf16", "amx_bf16", "bf16", "sve_bf16"])
def test_a_cpu_computes_bfloat16_with_its_instructions_and_the_library_that_uses_them(monkeypatch, name):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True, name: True})
    assert computes_bfloat16(use_cpu=True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not computes_bfloat16(use_cpu=True)


def test_fsdp_by_flags_requires_a_gpu(tmp_path):
    with pytest.raises(InputError, match="fsdp: expected a GPU, got the CPU"):
        parse_arguments(["--fsdp", "--use-cpu", "true"], str(tmp_path))
