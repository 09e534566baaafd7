"""Bootstrap intervals of ratios of sums over documents, such as nats/token and bits/byte."""

import math

import numpy as np

LEVEL = 0.95
NORMAL = 1.959964  # the normal distribution's 97.5 % quantile
RESAMPLES = 2000
MAX_ELEMENTS = 2**22  # per call of the generator
RUN_DRAWS = 16  # of the runs, per draw of the documents


def ratio_interval(numerators: np.ndarray, denominators: np.ndarray, *, seed: int = 0) -> tuple[float, float] | None:
    """The percentile interval of the mean over r of sum_n numerators[r, n] / sum_n denominators[n].

    Documents are drawn with replacement, the same ones in every row and in the denominator. The draws are widened by
    sqrt(N / (N - 1)) t / z (Student's t over the normal quantile), since percentiles of few documents are too narrow.
    Rows are repeated runs, and their mean is uncertain, too: each draw gets t with R - 1 degrees of freedom times the
    standard error of that mean. (Drawing two or three rows with replacement would never leave their range.)

    Args:
        numerators: (N,), or (R, N): one value per document.
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
    step = max(1, MAX_ELEMENTS // count)
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
    """The 97.5 % quantile of Student's t, to 1 %: exact for 1 and 2, otherwise Cornish and Fisher's expansion.

    `scipy.stats.t.ppf` has all digits, but no dependency of this package brings scipy, which is 100 MB, and the draws
    themselves vary by more than 1 %.
    """
    if degrees <= 2:
        return (12.7062, 4.3027)[degrees - 1]
    z = NORMAL
    terms = ((z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384)
    return z + sum(term / degrees**power for power, term in enumerate(terms, 1))
