"""From a SOURCE of text to blocks of tokens: documents, tokens, fixed blocks with separators between documents.

A SOURCE is `stdlib` (the Python standard library of this machine), a file or folder of .txt, .jsonl or .parquet
(compressed too), or the id of a dataset on the Hub, `owner/name` or `owner/name:subset`.
"""

from flashmhf.data.blocks import TokenBlocks, stream_blocks
from flashmhf.data.corpus import Corpus, load_corpus
from flashmhf.data.faults import REFUSE, SKIP, BadData
from flashmhf.data.tokens import tokenize

__all__ = ["REFUSE", "SKIP", "BadData", "Corpus", "TokenBlocks", "load_corpus", "stream_blocks", "tokenize"]
