"""From a SOURCE of text to blocks of tokens: documents, tokens, fixed blocks with separators between documents.

A SOURCE is `stdlib` (the Python standard library of this machine), a file or folder of .txt, .jsonl or .parquet
(compressed too), or the id of a dataset on the Hub, `owner/name` or `owner/name:subset`.
Training also takes several by weight, `0.7*SOURCE,0.3*SOURCE`.
"""

from flashmhf.data.blocks import TokenBlocks
from flashmhf.data.corpus import Corpus, load_corpus, text_hash
from flashmhf.data.faults import REFUSE, SKIP, BadData
from flashmhf.data.mixing import Recipe, TrainingData, load_blocks
from flashmhf.data.splits import beginnings, load_documents
from flashmhf.data.tokens import tokenize

__all__ = [
    "REFUSE",
    "SKIP",
    "BadData",
    "Corpus",
    "Recipe",
    "TokenBlocks",
    "TrainingData",
    "beginnings",
    "load_blocks",
    "load_corpus",
    "load_documents",
    "text_hash",
    "tokenize",
]
