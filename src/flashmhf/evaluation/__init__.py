"""How good a trained model is: its loss on documents, differences between models, downstream tasks, samples, heads."""

import importlib
from typing import TYPE_CHECKING, Any

# Imported when first used: `flashmhf generate` needs no `datasets`.
_HOMES = {
    "DocumentLoss": "flashmhf.evaluation.loss",
    "Evaluation": "flashmhf.evaluation.loss",
    "PositionLoss": "flashmhf.evaluation.loss",
    "TokenizedDocuments": "flashmhf.evaluation.loss",
    "evaluate": "flashmhf.evaluation.loss",
    "evaluate_tokenized": "flashmhf.evaluation.loss",
    "split_windows": "flashmhf.evaluation.windows",
}

__all__ = [
    "DocumentLoss",
    "Evaluation",
    "PositionLoss",
    "TokenizedDocuments",
    "evaluate",
    "evaluate_tokenized",
    "split_windows",
]

if TYPE_CHECKING:
    from flashmhf.evaluation.loss import (
        DocumentLoss,
        Evaluation,
        PositionLoss,
        TokenizedDocuments,
        evaluate,
        evaluate_tokenized,
    )
    from flashmhf.evaluation.windows import split_windows


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
