"""What a trained model is worth: its loss on documents, differences to another model, downstream tasks."""

from flashmhf.evaluation.loss import (
    DocumentLoss,
    Evaluation,
    PositionLoss,
    evaluate,
    split_windows,
)

__all__ = [
    "DocumentLoss",
    "Evaluation",
    "PositionLoss",
    "evaluate",
    "split_windows",
]
