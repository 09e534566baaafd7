"""Tokenises folders of text into two small files, to carry them to a machine for a training comparison.

    python benchmarks/training_tokens.py BOOKS/train BOOKS/val .lease/tokens [--vocab-size 8192]

Trains a byte-level BPE on the training documents and writes `train.xz` and `validation.xz` (one stream of uint16 each,
an EOS token after each document) and `tokens.json`. 165 MB of books become 42 M tokens in 38 MB.
"""

import argparse
import json
import lzma
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flashmhf.errors import InputError
from flashmhf.files import write_json

PARTS = ("train", "validation")
MIN_VOCABULARY, MAX_VOCABULARY = 300, 2**16


@dataclass(frozen=True, kw_only=True)
class Stream:
    """The size of one of PARTS; `text_bytes` of UTF-8, for losses in bits/byte."""

    tokens: int
    text_bytes: int


@dataclass(frozen=True, kw_only=True)
class TokenFiles:
    """A folder of tokens; each stream is a uint16 tensor on the CPU."""

    vocab_size: int
    sizes: dict[str, Stream]
    streams: dict[str, Tensor]


def write_tokens(sources: dict[str, str], output: Path, vocab_size: int) -> None:
    """Tokenises one source of text per part (see `flashmhf.data`) into `output`.

    Raises:
        InputError: a source cannot be read, or the vocabulary does not fit 16 bits.
    """
    from flashmhf.data.splits import load_documents  # needs `datasets`, which a machine that only reads tokens may lack
    from flashmhf.data.tokenizer import encode_documents, train_bpe

    if not MIN_VOCABULARY <= vocab_size <= MAX_VOCABULARY:
        raise InputError(f"vocab-size: expected {MIN_VOCABULARY} to {MAX_VOCABULARY}, got {vocab_size}")
    texts = {part: load_documents(source, split="all")["text"] for part, source in sources.items()}
    tokenizer = train_bpe(texts["train"], vocab_size)
    output.mkdir(parents=True, exist_ok=True)
    sizes = {}
    for part in PARTS:
        stream = np.concatenate([encode_documents(tokenizer, [text])[0].astype("<u2") for text in texts[part]])
        (output / f"{part}.xz").write_bytes(lzma.compress(stream.tobytes()))
        sizes[part] = asdict(Stream(tokens=len(stream), text_bytes=sum(len(text.encode()) for text in texts[part])))
    write_json(output / "tokens.json", {"vocab_size": len(tokenizer), "sizes": sizes})


def read_tokens(folder: Path) -> TokenFiles:
    """Reads what `write_tokens` wrote.

    Raises:
        InputError: names a file that is missing or damaged.
    """
    file = folder / "tokens.json"
    streams = {}
    try:
        described = json.loads(file.read_text())
        sizes = {part: Stream(**described["sizes"][part]) for part in PARTS}
        for part, size in sizes.items():
            file = folder / f"{part}.xz"
            stream = np.frombuffer(lzma.decompress(file.read_bytes()), dtype="<u2")
            if len(stream) != size.tokens or int(stream.max(initial=0)) >= described["vocab_size"]:
                raise ValueError(f"expected {size.tokens} tokens below {described['vocab_size']}")
            streams[part] = torch.from_numpy(stream.copy())
    except (OSError, ValueError, TypeError, KeyError, EOFError, lzma.LZMAError) as error:
        raise InputError(f"{file}: expected what benchmarks/training_tokens.py writes: {error}") from error
    return TokenFiles(vocab_size=described["vocab_size"], sizes=sizes, streams=streams)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for part in PARTS:
        parser.add_argument(part, help="a file or folder of text, see flashmhf.data")
    parser.add_argument("output", type=Path)
    parser.add_argument("--vocab-size", type=int, default=8192)
    arguments = parser.parse_args()
    try:
        write_tokens({part: getattr(arguments, part) for part in PARTS}, arguments.output, arguments.vocab_size)
    except InputError as error:
        parser.error(str(error))
    size = sum(file.stat().st_size for file in arguments.output.iterdir()) / 2**20
    print(f"{(arguments.output / 'tokens.json').read_text().strip()}\n{size:.1f} MiB")


if __name__ == "__main__":
    main()
