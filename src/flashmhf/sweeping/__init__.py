"""Learning rate and warm-up swept by successive halving, with equal effort for every contender."""

from flashmhf.sweeping.results import TuningResult, read_tuning
from flashmhf.sweeping.run import sweep
from flashmhf.sweeping.settings import Sweep

__all__ = ["Sweep", "TuningResult", "read_tuning", "sweep"]
