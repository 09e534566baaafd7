"""How good a trained model is: its loss on documents, differences between models, downstream tasks, samples, heads."""

from flashmhf.evaluation.loss import (
    DocumentLoss,
    Evaluation,
    PositionLoss,
    TokenizedDocuments,
    evaluate,
    evaluate_tokenized,
)
from flashmhf.evaluation.windows import split_windows

__all__ = [
    "DocumentLoss",
    "Evaluation",
    "PositionLoss",
    "TokenizedDocuments",
    "evaluate",
    "evaluate_tokenized",
    "split_windows",
]
