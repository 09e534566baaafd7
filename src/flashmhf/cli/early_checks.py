"""What a command refuses before it imports anything heavy: misspelt flags and presets, paths to nothing."""

from collections.abc import Iterable, Mapping
from typing import Any

from flashmhf.data.config import parse_sources
from flashmhf.names import check_exists, check_model


def check_training(options: Mapping[str, Any], flags: Iterable[str], models: Iterable[str]) -> None:
    """Raises InputError for what `train`, `compare` or `sweep` cannot be run with.

    Args:
        options: the command's own.
        flags: the others, for transformers.TrainingArguments.
        models: presets, files or folders.
    """
    from flashmhf.training.flags import check_known

    check_known(flags, options)
    for model in models:
        check_model(model)
    check_data(options["data"])
    check_tokenizer(options["tokenizer"])


def check_data(data: str | None) -> None:
    """Raises InputError for a SOURCE, or one of several, that is a path to nothing."""
    for _, source in parse_sources(data or ""):
        check_exists("data", source)


def check_tokenizer(tokenizer: str | None) -> None:
    """Raises InputError for a path to nothing."""
    check_exists("tokenizer", tokenizer or "")
