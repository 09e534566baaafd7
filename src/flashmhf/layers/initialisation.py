"""Initialisation of the layers: standard deviations and scales, and the checks of their arguments."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

INITS = ("reference", "scaled")
REFERENCE_STD = 0.02
REFERENCE_GAIN = 0.707  # of the Xavier-uniform projections
SCALED_IN_GAIN = 1.0  # of W_in, which starts orthogonal: q has the RMS of x
SCALED_OUT_GAIN = 0.3  # of W_out, which starts orthogonal; found with Muon, AdamW prefers 0.707
SCALED_SCORE_RMS = 0.64  # RMS of M, N and the gate's logits at initialisation, for inputs of unit RMS
SCALED_HIDDEN_RMS = 0.23  # of SiLU(M) N, if M and N have that RMS
SCALED_PKV_KEY_RMS = 1.0  # RMS of PKV's logits
SCALED_PKV_WEIGHT_RMS = math.sqrt(math.e)  # of PKV's softmax weights, for such logits, times the number of slots
SCALED_PKV_VALUE_STD = 1.0
SCALED_OUTPUT_GAIN = 0.3  # times 1 / sqrt(d_ff): standard deviation of V and of a down-projection


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

    Args:
        init: "reference", whose scales are 1, or "scaled".
        num_heads: heads H.
        num_subnetworks: sub-networks E per head.
        gate_type: of the layer; None leaves gate and output at 1.
    """
    if init == "reference":
        return Scales(1.0, 1.0, 1.0)
    if gate_type is None:
        return Scales(float(num_heads), 1.0, 1.0)
    return Scales(float(num_heads), float(num_heads), float(num_subnetworks))


def init_projections(init: str, in_proj: nn.Linear | None, out_proj: nn.Linear | None) -> None:
    """W_in and W_out: Xavier-uniform with "reference", random orthogonal matrices with "scaled"; biases are zero.

    A random square matrix shrinks some directions of its input a hundred times and more, and the random matrix that
    follows does not restore them. An orthogonal one keeps all (docs/parametrisation.md).
    """
    for projection, gain in ((in_proj, SCALED_IN_GAIN), (out_proj, SCALED_OUT_GAIN)):
        if projection is None:
            continue
        if init == "scaled":
            init_orthogonal(projection.weight, std=gain / math.sqrt(projection.in_features))
        else:
            nn.init.xavier_uniform_(projection.weight, gain=REFERENCE_GAIN)
        if projection.bias is not None:
            nn.init.zeros_(projection.bias)


@torch.no_grad()
def init_orthogonal(weight: Tensor, std: float) -> None:
    """Fills each matrix of `weight` (..., m, n) with a random one whose rows, or columns if m > n, are orthogonal.

    The entries have the RMS `std`. Drawn in float32 if the weight's dtype is shorter, for which LAPACK has no QR.
    """
    if getattr(weight, "_is_hf_initialized", False):
        return  # transformers has loaded it; its guard on torch.nn.init sees neither the matrices nor the copies below
    gain = std * math.sqrt(max(weight.shape[-2:]))
    for matrix in weight.view(-1, *weight.shape[-2:]):
        if matrix.dtype in (torch.float32, torch.float64):
            nn.init.orthogonal_(matrix, gain=gain)
        else:
            drawn = torch.empty_like(matrix, dtype=torch.float32)
            nn.init.orthogonal_(drawn, gain=gain)
            matrix.copy_(drawn)


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
