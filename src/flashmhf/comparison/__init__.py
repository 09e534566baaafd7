"""Feed-forward layers against each other: same backbone, matched size, same data order, same seeds."""

from flashmhf.comparison.run import compare
from flashmhf.comparison.settings import Comparison

__all__ = ["Comparison", "compare"]
