"""flashmhf tokenizer: train a byte-level BPE on a source of text."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flashmhf.cli.early_checks import check_data
from flashmhf.cli.output import BadData, Json, TextColumn, check_folder, emit, results_only
from flashmhf.console import progress_bar
from flashmhf.data.config import DataConfig

if TYPE_CHECKING:
    from datasets import Dataset

BATCH = 16  # documents


def tokenizer(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Like --data of the other commands.")],
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A new or empty folder for it.")],
    vocab_size: Annotated[int, typer.Option(help="Tokens, including the special ones.")] = 8192,
    text_column: TextColumn = DataConfig.text_column,
    bad_data: BadData = DataConfig.bad_data,
    json: Json = False,
) -> None:
    """Train a byte-level BPE tokenizer on the training documents of SOURCE."""
    check_data(source)
    with results_only():
        from flashmhf.data.corpus import load_corpus
        from flashmhf.data.tokenizer import train_bpe
        from flashmhf.errors import InputError
        from flashmhf.new_folder import new_folder

        path = Path(folder)
        check_folder("DIR", folder)
        if path.exists() and any(path.iterdir()):
            raise InputError(f"DIR: expected a new or empty folder, got {folder}")
        corpus = load_corpus(source, text_column=text_column, bad_data=bad_data)
        with progress_bar("reading", note="documents") as progress:
            trained = train_bpe(_texts(corpus.train, progress), vocab_size)
        with new_folder("DIR", path) as unfinished:
            trained.save_pretrained(unfinished)
        sample = corpus.validation[0]["text"][:100_000]
        bytes_per_token = len(sample.encode()) / max(len(trained(sample)["input_ids"]), 1)
    result = {"folder": folder, "vocab_size": len(trained), "validation_bytes_per_token": bytes_per_token}
    emit(result, f"{folder}: {len(trained):,} tokens, {bytes_per_token:.2f} bytes/token on validation text", json)


def _texts(documents: "Dataset", progress: Callable[[int, int], None]) -> Iterator[str]:
    read = 0
    for batch in documents.iter(BATCH):
        yield from batch["text"]
        read += len(batch["text"])
        progress(read, len(documents))
