"""Bootstrap intervals of ratios of sums over documents, such as nats a token and bits a byte."""

import numpy as np

LEVEL = 0.95
RESAMPLES = 2000
ELEMENTS = 2**22  # drawn at once


def ratio_interval(numerators: np.ndarray, denominators: np.ndarray, *, seed: int = 0) -> tuple[float, float] | None:
    """The percentile interval of mean over r of sum over n of numerators[r, n], divided by sum over n of denominators.

    Documents are drawn with replacement, the same ones in every row and in the denominator; with more than one row
    (repeated runs), so are the rows.

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
    generator = np.random.default_rng(seed)
    step = max(1, ELEMENTS // count)
    ratios = []
    for begin in range(0, RESAMPLES, step):
        number = min(step, RESAMPLES - begin)
        drawn = generator.integers(count, size=(number, count))
        totals = np.stack([row[drawn].sum(1) for row in values], axis=1)  # (number, R)
        chosen = generator.integers(rows, size=(number, rows))
        mean_totals = np.take_along_axis(totals, chosen, axis=1).mean(1)
        ratios.append(mean_totals / sizes[drawn].sum(1))
    low, high = np.quantile(np.concatenate(ratios), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
