"""Which text is read and how it becomes blocks. Imports nothing heavy: the command line takes defaults from here."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

from flashmhf.errors import InputError

FORM = "SOURCE or WEIGHT*SOURCE,WEIGHT*SOURCE,..."
REFUSE, SKIP = "refuse", "skip"  # what happens to corrupt records


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How text becomes blocks of tokens.

    Args:
        source: a SOURCE, or several by weight, see `flashmhf.data`.
        tokenizer: `bytes`, a folder or a Hub id.
        context_length: tokens per block.
        text_column: of .jsonl, .parquet or Hub data.
        streaming: read the data as it is needed; a stream that ends starts again.
        validation_tokens: at most this many are used for validation, by the weights.
        document_mask: give blocks positions that keep attention within a document.
        bad_data: `skip` or `refuse` corrupt records.
    """

    source: str = "stdlib"
    tokenizer: str = "bytes"
    context_length: int = 512
    text_column: str = "text"
    streaming: bool = False
    validation_tokens: int = 2**19
    document_mask: bool = False
    bad_data: str = REFUSE

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """From a command's options by name, such as "context_length"; the source is "data". Ignores other names."""
        names = {field.name: _option(field.name) for field in fields(cls)}
        return cls(**{name: options[option] for name, option in names.items() if option in options})

    def options(self) -> dict[str, Any]:
        """The inverse of `from_options`."""
        return {_option(field.name): getattr(self, field.name) for field in fields(self)}


def _option(name: str) -> str:
    return "data" if name == "source" else name


def parse_sources(data: str) -> list[tuple[float, str]]:
    """(weight, SOURCE) pairs of `0.7*A,0.3*B`, or one of weight 1.

    Raises:
        InputError: a weight is not a number or is negative, or all are 0.
    """
    if "*" not in data or Path(data).exists():
        return [(1.0, data)]
    pairs = []
    for part in re.split(r",(?=[^,*]*\*)", data):
        text, star, source = part.partition("*")
        try:
            weight = float(text)
        except ValueError:
            weight = math.nan
        if not (star and source.strip() and math.isfinite(weight) and weight >= 0):
            raise InputError(f"data: expected {FORM} with weights of at least 0, got {part.strip()!r}")
        pairs.append((weight, source.strip()))
    used = [pair for pair in pairs if pair[0] > 0]
    if not used:
        raise InputError(f"data: expected {FORM} with a weight above 0, got {data!r}")
    return used
