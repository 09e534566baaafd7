"""From a SOURCE of text to blocks of tokens: documents, token ids, blocks of a fixed length.

An EOS token ends each document. The text of a special token in a document, such as <|endoftext|>, becomes that token.

A SOURCE is `stdlib` (the Python standard library of this machine), a file or folder of .txt, .jsonl or .parquet
(compressed too), or the id of a dataset on the Hub, `owner/name` or `owner/name:subset`.
Training also takes several SOURCEs by weight, `0.7*SOURCE,0.3*SOURCE`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from flashmhf.data.config import DataConfig

# Imported when first used: the command line takes its defaults from `DataConfig` without loading `datasets`.
_HOMES = {
    "Corpus": "flashmhf.data.corpus",
    "TrainingData": "flashmhf.data.mixing",
    "load_blocks": "flashmhf.data.mixing",
    "load_corpus": "flashmhf.data.corpus",
    "load_documents": "flashmhf.data.splits",
    "load_tokenizer": "flashmhf.data.tokenizer",
}

__all__ = ["Corpus", "DataConfig", "TrainingData", "load_blocks", "load_corpus", "load_documents", "load_tokenizer"]

if TYPE_CHECKING:
    from flashmhf.data.corpus import Corpus, load_corpus
    from flashmhf.data.mixing import TrainingData, load_blocks
    from flashmhf.data.splits import load_documents
    from flashmhf.data.tokenizer import load_tokenizer


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
