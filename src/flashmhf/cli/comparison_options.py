"""Options that `compare` and `sweep` share, and how they are read."""

from collections.abc import Callable
from typing import Annotated, TypeVar

import typer

from flashmhf.data.config import DataConfig

N = TypeVar("N", int, float)

Variants = Annotated[str, typer.Option(help="Of flashmhf, mhffn, pkv, dense_moe, swiglu.")]
Seeds = Annotated[
    str, typer.Option(help="Each fixes initial weights and the data's order. A verdict requires three or more.")
]
Match = Annotated[str, typer.Option(help="What is equal: parameters or flops.")]
Depth = Annotated[str, typer.Option(help="same, or paper: 5 layers with several heads for 6 without.")]
Jobs = Annotated[
    str,
    typer.Option(metavar="auto|N", help="Runs at a time; auto: one per GPU, or on a CPU one per core if they fit."),
]

AUTO = "auto"
DECIDED = ("streaming", "config", "tensor-parallel")  # options of `flashmhf train` that a comparison decides
VALIDATION_TOKENS = DataConfig.validation_tokens // 4  # for each of many short runs


def check_flags(flags: tuple[str, ...], output_dir: str, instead: dict[str, str] | None = None) -> None:
    """Raises InputError for a flag that TrainingArguments does not have or that the command decides.

    Args:
        flags: of the command line.
        output_dir: the command's.
        instead: further flags that it decides, and what is expected in their place.
    """
    from flashmhf.errors import InputError
    from flashmhf.training.arguments import parse_arguments

    given = {flag.partition("=")[0].removeprefix("--").replace("_", "-") for flag in flags if flag.startswith("--")}
    for name, expected in {**dict.fromkeys(DECIDED, "nothing, since the command decides"), **(instead or {})}.items():
        if name in given:
            raise InputError(f"{name}: expected {expected}, got a value")
    arguments, defaults = (parse_arguments(chosen, output_dir) for chosen in (list(flags), []))
    for name in ("seed", "data_seed", "logging_steps", "logging_strategy"):
        if getattr(arguments, name) != getattr(defaults, name):
            expected = "--seeds" if "seed" in name else "nothing, since every step is logged"
            raise InputError(f"{name.replace('_', '-')}: expected {expected}, got {getattr(arguments, name)}")


def split(values: str) -> tuple[str, ...]:
    """At commas."""
    return tuple(value.strip() for value in values.split(",") if value.strip())


def whole_numbers(option: str, text: str) -> tuple[int, ...]:
    """Of an option such as "0,1,2"."""
    return tuple(_number(int, option, number) for number in split(text))


def numbers(option: str, text: str) -> tuple[float, ...]:
    """Of an option such as "1e-3,2e-3"."""
    return tuple(_number(float, option, number) for number in split(text))


def read_jobs(text: str) -> int | None:
    """None for auto."""
    from flashmhf.errors import InputError

    if text == AUTO:
        return None
    if not (text.isdecimal() and int(text) > 0):
        raise InputError(f"jobs: expected auto or a number of at least 1, got {text}")
    return int(text)


def rates_by_variant(option: str, text: str, variants: tuple[str, ...]) -> dict[str, tuple[float, ...]]:
    """Of an option such as "1e-3,2e-3", for every variant, or "swiglu=1e-3/2e-3,flashmhf=1e-3"."""
    if "=" not in text:
        rates = numbers(option, text)
        return dict.fromkeys(variants, rates) if rates else {}
    pairs = (pair.partition("=") for pair in split(text))
    return {name: tuple(_number(float, option, rate) for rate in rates.split("/")) for name, _, rates in pairs}


def _number(kind: Callable[[str], N], option: str, text: str) -> N:
    from flashmhf.errors import InputError

    try:
        return kind(text)
    except ValueError as error:
        what = "a whole number" if kind is int else "a number"
        raise InputError(f"{option}: expected {what}, got {text!r}") from error
