"""What is read from the source of TrainingArguments agrees with the class, and with this package's defaults."""

import dataclasses

import pytest
from transformers import TrainingArguments

from flashmhf.errors import InputError
from flashmhf.training.arguments import parse_arguments
from flashmhf.training.flags import ELSEWHERE, IN_WORDS, check_known, shown_defaults, transformers_defaults


def test_every_field_and_no_other_is_found():
    assert list(transformers_defaults()) == [field.name for field in dataclasses.fields(TrainingArguments)]


def test_the_shown_defaults_are_those_of_a_run(tmp_path):
    arguments = parse_arguments([], str(tmp_path / "run"))
    other = {}
    for name, shown in shown_defaults().items():
        value = getattr(arguments, name)
        value = value[0] if isinstance(value, list) and value else value
        if shown and str(getattr(value, "value", value)).lower() != shown and name not in IN_WORDS:
            other[name] = value
    assert other == {"include_num_input_tokens_seen": "all", "do_eval": True}  # TrainingArguments changes them
    assert shown_defaults()["weight_decay"] == "0.1"
    assert shown_defaults()["save_steps"] == "500"
    assert shown_defaults()["learning_rate"].startswith(f"{arguments.learning_rate:g};")


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--lr", "--learning-rate"),
        ("--max-step", "--max-steps"),
        ("--max_step=3", "--max-steps"),
        ("--batch-size", "--per-device-train-batch-size"),
        ("--contxt-length", "--context-length"),
        ("--weight-decy", "--weight-decay"),
    ],
)
def test_the_nearest_flag_is_suggested(flag, meant):
    with pytest.raises(InputError) as caught:
        check_known(["--seed", "1", flag, "9"], ["context_length"])
    assert str(caught.value).endswith(f"got {flag!r}; did you mean {meant}?")


def test_known_flags_pass():
    check_known(["--max-steps", "-1", "--max_steps=3", "--no_dataloader_pin_memory", "--data", "x"], ["data"])


def test_names_of_other_programs_mean_flags_that_exist():
    own = {"context-length", "data", "output-dir"}
    known = own | {name.replace("_", "-") for name in transformers_defaults()}
    assert set(ELSEWHERE.values()) <= known
    assert not set(ELSEWHERE) & known
