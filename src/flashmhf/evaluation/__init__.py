"""What a trained model is worth: its loss on documents, differences to another model, downstream tasks."""

from flashmhf.evaluation.loss import (
    IGNORED,
    DocumentLoss,
    Evaluation,
    PositionLoss,
    check_context_length,
    check_vocabulary,
    evaluate,
    split_windows,
)

__all__ = [
    "IGNORED",
    "DocumentLoss",
    "Evaluation",
    "PositionLoss",
    "check_context_length",
    "check_vocabulary",
    "evaluate",
    "split_windows",
]
