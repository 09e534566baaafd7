"""transformers.TrainingArguments from flags: this package's defaults, and one line on what does not fit."""

import argparse

import pytest
import torch

from flashmhf.errors import InputError
from flashmhf.training.arguments import DEFAULTS, DEPENDENT, _complete, parse_arguments

UNGIVEN = {"load_best_model_at_end": False, "use_cpu": False, "fp16": False}


def test_flags_of_the_trainer_have_defaults_and_are_checked(tmp_path):
    arguments = parse_arguments(["--max-steps", "7", "--adam_beta2", "0.9", "--seed=3"], str(tmp_path))
    assert (arguments.max_steps, arguments.adam_beta2, arguments.seed, arguments.weight_decay) == (7, 0.9, 3, 0.1)
    assert arguments.lr_scheduler_kwargs == {"min_lr_rate": 0.1}
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


@pytest.mark.parametrize(
    ("given", "bf16"), [({}, True), ({"fp16": True}, False), ({"use_cpu": True}, False), ({"bf16": False}, False)]
)
def test_bfloat16_is_the_default_of_a_gpu_unless_something_else_is_asked_for(monkeypatch, given, bf16):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    values = argparse.Namespace(**{**dict.fromkeys(DEPENDENT), **DEFAULTS, **UNGIVEN, **given})
    _complete(values)
    assert values.bf16 == bf16


def test_fsdp_by_flags_requires_a_gpu(tmp_path):
    with pytest.raises(InputError, match="fsdp: expected a GPU, got the CPU"):
        parse_arguments(["--fsdp", "--use-cpu", "true"], str(tmp_path))
