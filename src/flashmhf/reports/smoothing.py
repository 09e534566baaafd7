"""Smoothed curves that do not lag behind the raw ones and start where they do."""

from collections.abc import Sequence

import numpy as np

MIN_POINTS = 40  # shorter curves stay as they are
SHARE = 40  # a value is the mean of about a twentieth of the curve: this part of it on each side


def smoothed(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Means over as many values before as after each; fewer near the beginning, whose first value stays as it is.

    The last values, whose mean is what a reader looks for, are averaged with those before them.
    """
    found = np.asarray(values, dtype=float)
    number = len(found)
    if number < MIN_POINTS:
        return found
    at = np.arange(number)
    radius = np.minimum(number // SHARE, at)
    begin, end = at - radius, np.minimum(at + radius + 1, number)
    sums = np.concatenate(([0.0], np.cumsum(found)))
    return (sums[end] - sums[begin]) / (end - begin)


def outline(values: np.ndarray, most: int) -> np.ndarray:
    """Indices of at most `most` values with both ends: the lowest and the highest of every stretch, so spikes stay."""
    number = len(values)
    if number <= most:
        return np.arange(number)
    stretches = np.array_split(np.arange(number), most // 2 - 1)
    kept = [at[pick(values[at])] for at in stretches for pick in (np.argmin, np.argmax)]
    return np.unique([0, *kept, number - 1])
