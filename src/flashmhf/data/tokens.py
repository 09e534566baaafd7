"""Documents as token ids in a memory-mapped cache, written once by as many processes as there are cores."""

import hashlib
from collections.abc import Iterator

import datasets
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from flashmhf.data.tokenizer import encode_documents, tokenizer_key
from flashmhf.data.workers import count_workers, rows_at_once

BATCH_CHARACTERS = 2**22  # encoded at once: a tokenizer needs up to a hundred bytes for one
VERSION = 1  # of what is written; a new one leaves old caches alone


def tokenize(documents: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Replaces the text by the columns "input_ids" (the separator at the end included) and "bytes" (of the text).

    Documents that are in files come back as memory-mapped files in the cache of `datasets`, whose name is a hash of
    their content and of the tokenizer. They are written beside and renamed, so what is there is whole.
    """
    id_type = "uint16" if len(tokenizer) <= 2**16 else "int32"

    def encode(batch: dict[str, list[str]]) -> dict[str, list]:
        ids = [one.astype(id_type) for part in _parts(batch["text"]) for one in encode_documents(tokenizer, part)]
        return {"input_ids": ids, "bytes": [len(text.encode()) for text in batch["text"]]}

    features = datasets.Features(
        {"input_ids": datasets.List(datasets.Value(id_type)), "bytes": datasets.Value("int64")}
    )
    key = f"{VERSION} {documents._fingerprint} {tokenizer_key(tokenizer)}"
    workers = count_workers(documents.data.nbytes if documents.cache_files else 0, len(documents))
    return documents.map(
        encode,
        batched=True,
        batch_size=rows_at_once(documents),
        remove_columns=documents.column_names,
        features=features,
        num_proc=workers if workers > 1 else None,
        new_fingerprint=hashlib.blake2b(key.encode(), digest_size=16).hexdigest(),
        desc="tokenizing",
    )


def _parts(texts: list[str]) -> Iterator[list[str]]:
    """The same texts, so many at once as bounds the memory."""
    part: list[str] = []
    characters = 0
    for text in texts:
        if part and characters + len(text) > BATCH_CHARACTERS:
            yield part
            part, characters = [], 0
        part.append(text)
        characters += len(text)
    if part:
        yield part
