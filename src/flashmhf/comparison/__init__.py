"""Feed-forward layers compared: same backbone, matched size, same data order, same seeds."""

from flashmhf.comparison.results import ComparisonResult, read_comparison
from flashmhf.comparison.run import compare
from flashmhf.comparison.settings import Comparison

__all__ = ["Comparison", "ComparisonResult", "compare", "read_comparison"]
