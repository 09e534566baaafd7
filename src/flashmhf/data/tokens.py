"""Documents as token ids in a memory-mapped cache, written once, by one process per core."""

import hashlib
from collections.abc import Iterator

import datasets
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from flashmhf.data.tokenizer import encode_documents, tokenizer_key
from flashmhf.data.workers import count_workers, rows_at_once

BATCH_CHARACTERS = 2**22  # encoded at once: a tokenizer needs up to 100 bytes for each
VERSION = 1  # of the format; a new version does not read old caches


def tokenize(documents: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Replaces the text with the columns "input_ids" (with an EOS token at the end) and "bytes" (of the text).

    Documents from files become memory-mapped files in the cache of `datasets`, named by a hash of their content and
    the tokenizer. They are written under another name and renamed, so the cache never holds incomplete ones.
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
    """The same texts in groups of bounded size."""
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
