"""The Trainer's overrides are hooks of the installed transformers, so that none of them silently stops being called."""

import inspect

from transformers import Trainer

from flashmhf.training.trainer import PretrainingTrainer

OWN = {"_plain_optimizer", "check_weights"}


def test_every_override_replaces_a_method_of_the_trainer_with_its_parameters():
    methods = {name: method for name, method in vars(PretrainingTrainer).items() if inspect.isfunction(method)}
    overrides = methods.keys() - OWN
    assert overrides <= {name for name, method in vars(Trainer).items() if inspect.isfunction(method)}
    for name in overrides - {"__init__"}:
        expected = list(inspect.signature(getattr(Trainer, name)).parameters)
        parameters = inspect.signature(methods[name]).parameters
        named = [each for each, parameter in parameters.items() if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
        assert named == expected[: len(named)], name
