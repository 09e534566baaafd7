"""Which text is read and how it becomes blocks. Imports nothing heavy: the command line gets its defaults from here."""

from dataclasses import dataclass

REFUSE, SKIP = "refuse", "skip"  # what becomes of records that cannot be read


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How text becomes blocks of tokens.

    Args:
        source: a SOURCE, or several by weight, see `flashmhf.data`.
        tokenizer: `bytes`, a folder or a Hub id.
        context_length: tokens in a block.
        text_column: of .jsonl, .parquet or Hub data.
        streaming: read the data as it is needed; a stream that ends starts again.
        validation_tokens: at most so many are used for validation, by the weights.
        document_mask: give blocks positions that keep attention within a document.
        bad_data: `skip` or `refuse` what cannot be read.
    """

    source: str = "stdlib"
    tokenizer: str = "bytes"
    context_length: int = 512
    text_column: str = "text"
    streaming: bool = False
    validation_tokens: int = 2**19
    document_mask: bool = False
    bad_data: str = REFUSE
