"""transformers.TrainingArguments from flags: this package's defaults, and one line on what does not fit."""

import pytest

from flashmhf.errors import InputError
from flashmhf.training.arguments import parse_arguments


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


def test_fsdp_by_flags_requires_a_gpu(tmp_path):
    with pytest.raises(InputError, match="fsdp: expected a GPU, got the CPU"):
        parse_arguments(["--fsdp", "--use-cpu", "true"], str(tmp_path))
