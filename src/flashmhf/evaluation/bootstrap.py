"""Bootstrap intervals of ratios of sums over documents, such as nats/token and bits/byte."""

import math

import numpy as np

LEVEL = 0.95
NORMAL = 1.959964  # its 97.5 % quantile
RESAMPLES = 2000
ELEMENTS = 2**22  # drawn at once
RUN_DRAWS = 16  # of the runs, for each draw of the documents


def ratio_interval(numerators: np.ndarray, denominators: np.ndarray, *, seed: int = 0) -> tuple[float, float] | None:
    """The percentile interval of mean over r of sum over n of numerators[r, n], divided by sum over n of denominators.

    Documents are drawn with replacement, the same ones in every row and in the denominator; the draws are spread by
    sqrt(N / (N - 1)) t / z, Student's t against the normal, without which few documents would claim too much. To each
    is added what rows that stand for repeated runs leave open about their mean: t with R - 1 degrees of freedom times
    its standard error. (Two or three rows drawn with replacement would never leave the range of those rows.)

    Args:
        numerators: (N,), or (R, N): one value a document.
        denominators: (N,), each above 0.
        seed: of the draws.

    Returns:
        The ends of the 95 % interval, or None for fewer than two documents.
    """
    values = np.atleast_2d(np.asarray(numerators, dtype=np.float64))
    sizes = np.asarray(denominators, dtype=np.float64)
    assert values.shape[1] == len(sizes)
    assert (sizes > 0).all()
    rows, count = values.shape
    if count < 2:
        return None
    means = values.mean(0)
    generator = np.random.default_rng(seed)
    step = max(1, ELEMENTS // count)
    ratios = []
    for begin in range(0, RESAMPLES, step):
        number = min(step, RESAMPLES - begin)
        drawn = generator.integers(count, size=(number, count))
        ratios.append(means[drawn].sum(1) / sizes[drawn].sum(1))
    found = means.sum() / sizes.sum()
    draws = found + (np.concatenate(ratios) - found) * math.sqrt(count / (count - 1)) * student_t(count - 1) / NORMAL
    if rows > 1:
        error = (values.sum(1) / sizes.sum()).std(ddof=1) / math.sqrt(rows)
        draws = draws + error * generator.standard_t(rows - 1, size=(RUN_DRAWS, RESAMPLES))
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def student_t(degrees: int) -> float:
    """The 97.5 % quantile of Student's t, to 1 %: exact for 1 and 2, else by Cornish and Fisher's expansion."""
    if degrees <= 2:
        return (12.7062, 4.3027)[degrees - 1]
    z = NORMAL
    terms = ((z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384)
    return z + sum(term / degrees**power for power, term in enumerate(terms, 1))
