"""flashmhf tokenizer: train a byte-level BPE on a source of text."""

from pathlib import Path
from typing import Annotated

import typer

from flashmhf.cli.early_checks import check_data
from flashmhf.cli.output import BadData, Json, TextColumn, check_folder, emit, results_only
from flashmhf.data.config import DataConfig


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
        trained = train_bpe((text for batch in corpus.train.iter(16) for text in batch["text"]), vocab_size)
        with new_folder("DIR", path) as unfinished:
            trained.save_pretrained(unfinished)
        sample = corpus.validation[0]["text"][:100_000]
        bytes_per_token = len(sample.encode()) / max(len(trained(sample)["input_ids"]), 1)
    result = {"folder": folder, "vocab_size": len(trained), "validation_bytes_per_token": bytes_per_token}
    emit(result, f"{folder}: {len(trained):,} tokens, {bytes_per_token:.2f} bytes/token on validation text", json)
