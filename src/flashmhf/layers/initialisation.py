"""Initialisation of the layers: standard deviations and scales, and the checks of their arguments."""

import math
from typing import NamedTuple

from torch import nn

INITS = ("reference", "scaled")
REFERENCE_STD = 0.02
REFERENCE_GAIN = 0.707  # of the Xavier-uniform projections
SCALED_SCORE_RMS = 0.64  # RMS of M, N and the gate's logits at initialisation, for inputs of unit RMS
SCALED_PKV_KEY_RMS = 1.0  # RMS of PKV's logits
SCALED_PKV_VALUE_STD = 1.0
SCALED_OUTPUT_GAIN = 2.5  # times 1 / sqrt(d_ff): standard deviation of V and of a down-projection


class Scales(NamedTuple):
    """Multipliers of a FlashMHF layer: on its scores M and N, on its gate's logits, and on its output."""

    score: float
    gate: float
    output: float


def default_scales(init: str, num_heads: int, num_subnetworks: int, gate_type: str | None) -> Scales:
    """The default scales of a FlashMHF layer.

    A head's rows have a fan-in of head_dim = hidden_size / num_heads, so one Adam step changes a score, or a logit of
    the gate, num_heads times less than in a SwiGLU; and the gate divides the output, and with it the effect of a step,
    by num_subnetworks. The scales of "scaled" compensate both.
    """
    if init == "reference":
        return Scales(1.0, 1.0, 1.0)
    if gate_type is None:
        return Scales(float(num_heads), 1.0, 1.0)
    return Scales(float(num_heads), float(num_heads), float(num_subnetworks))


def init_projections(*projections: nn.Linear | None) -> None:
    for projection in projections:
        if projection is not None:
            nn.init.xavier_uniform_(projection.weight, gain=REFERENCE_GAIN)
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)


def check_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool):
            raise ValueError(f"{name}: expected an integer, got {size!r}")
        if size < 1:
            raise ValueError(f"{name}: expected at least 1, got {size}")


def check_flags(**flags: bool) -> None:
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise ValueError(f"{name}: expected True or False, got {flag!r}")


def check_epsilon(**values: float) -> None:
    for name, value in values.items():
        if not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise ValueError(f"{name}: expected a number of at least 0, got {value!r}")


def check_scales(**scales: float | None) -> None:
    for name, scale in scales.items():
        if scale is None:
            continue
        if not isinstance(scale, int | float) or not math.isfinite(scale) or scale == 0:
            raise ValueError(f"{name}: expected a finite number other than 0, got {scale!r}")


def check_multiple(name: str, size: int, divisor_name: str, divisor: int) -> None:
    if size % divisor != 0:
        raise ValueError(f"{name}: expected a multiple of {divisor_name} {divisor}, got {size}")


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(str, choices))}, got {value!r}")
