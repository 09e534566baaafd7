"""Documents as token ids in a memory-mapped cache, written once, by one process per core."""

from collections.abc import Iterator
from pathlib import Path

import datasets
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from flashmhf.data.cache import cached
from flashmhf.data.fingerprints import short_hash
from flashmhf.data.tokenizer import encode_documents, tokenizer_key
from flashmhf.data.workers import count_workers, rows_at_once

BATCH_CHARACTERS = 2**22  # encoded at once: a tokenizer needs up to 100 bytes for each
VERSION = 2  # of the format; a new version does not read old caches


def tokenize(documents: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Replaces the text with the columns "input_ids" (with an EOS token at the end) and "bytes" (of the text).

    Documents from files become memory-mapped files in the cache, see `data.cache`, by a hash of their content and the
    tokenizer.
    """
    id_type = "uint16" if len(tokenizer) <= 2**16 else "int32"

    def encode(batch: dict[str, list[str]]) -> dict[str, list]:
        ids = [one.astype(id_type) for part in _parts(batch["text"]) for one in encode_documents(tokenizer, part)]
        return {"input_ids": ids, "bytes": [len(text.encode()) for text in batch["text"]]}

    features = datasets.Features(
        {"input_ids": datasets.List(datasets.Value(id_type)), "bytes": datasets.Value("int64")}
    )
    options = {
        "batched": True,
        "batch_size": rows_at_once(documents),
        "remove_columns": documents.column_names,
        "features": features,
        "desc": "tokenizing",
    }
    if not documents.cache_files:
        return documents.map(encode, **options)
    workers = count_workers(documents.data.nbytes, len(documents))

    def build(folder: Path) -> Dataset:
        return documents.map(
            encode,
            cache_file_name=str(folder / "tokens.arrow"),
            load_from_cache_file=False,
            num_proc=workers if workers > 1 else None,
            new_fingerprint=folder.name,
            **options,
        )

    return cached(short_hash("tokens", VERSION, documents._fingerprint, tokenizer_key(tokenizer)), build)


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
