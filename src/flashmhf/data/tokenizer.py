"""Tokenizers: raw bytes without any download, a folder or a Hub id, and BPE trained on the user's text."""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeGuard
from weakref import WeakKeyDictionary

import numpy as np
import regex
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

from flashmhf.errors import InputError
from flashmhf.names import check_exists
from flashmhf.untrusted import read_settings, reading

logger = logging.getLogger(__name__)

BYTES = "bytes"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = {
    *(TOKENIZER, TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", "vocab.json", "config.json"),
    *("chat_template.json", "processor_config.json", "preprocessor_config.json"),
}
EOS = "<|endoftext|>"
PADDING = "<|pad|>"
VOCABULARY_MULTIPLE = 64  # of a new model
SPECIAL_TOKENS = [EOS, PADDING]
# GPT-2's words, as split by ByteLevel of the tokenizers library
WORDS = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
MAX_KNOWN_WORDS = 2**18  # about 60 MB
_known_words: WeakKeyDictionary[PreTrainedTokenizerFast, dict[str, list[int]]] = WeakKeyDictionary()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Token ids 0 to 255 are the bytes of the text's UTF-8; 256 is EOS, 257 is padding."""
    characters = _byte_characters()
    tokenizer = Tokenizer(models.BPE(vocab={character: byte for byte, character in enumerate(characters)}, merges=[]))
    return _finish(tokenizer, use_regex=False)


def train_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with `vocab_size` tokens, including the special ones."""
    smallest = len(SPECIAL_TOKENS) + 256
    if vocab_size < smallest:
        raise InputError(
            f"vocab-size: expected at least {smallest} (the bytes and the special tokens), got {vocab_size}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=_byte_characters(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _finish(tokenizer, use_regex=True)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """`bytes`, a folder with a tokenizer, or a Hub id.

    Raises:
        InputError: there is no such tokenizer, or it has no EOS token.
    """
    if name == BYTES:
        return byte_tokenizer()
    folder = Path(name)
    if folder.is_dir():
        _check_files(folder)
    check_exists("tokenizer", name)
    with reading(f"tokenizer: expected bytes, a tokenizer's folder or a Hub id, got {name!r}"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        tokenizer("text", add_special_tokens=False)  # some values fail only in use
    if not isinstance(tokenizer.eos_token_id, int):
        raise InputError(f"tokenizer: expected one with an EOS token, got {name!r} without")
    _make_deterministic(tokenizer, name)
    return tokenizer


def _check_files(folder: Path) -> None:
    """Raises InputError that names the file at fault; transformers names none, or goes on without the file."""
    for file in sorted(folder / name for name in TOKENIZER_FILES):
        if file.is_symlink() or file.exists():
            with reading(f"tokenizer: {file}"):
                settings = read_settings(file, strict=False)
                if file.name == TOKENIZER_CONFIG:
                    _check_class(settings, file)
                elif file.name == TOKENIZER:
                    Tokenizer.from_file(str(file))


def _check_class(settings: dict[str, Any], file: Path) -> None:
    """Raises InputError for a class that transformers does not have. The folder's own code (auto_map) is never run."""
    name = settings.get("tokenizer_class")
    if name is None:
        return
    names = (name, f"{name}Fast", str(name).removesuffix("Fast"))
    if not isinstance(name, str) or not any(tokenizer_class_from_name(one) for one in names):
        raise InputError(f"tokenizer: {file}: expected a tokenizer_class that transformers has, got {name!r:.80}")


def fit_vocabulary(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Gives a new model's configuration the tokenizer's size, rounded up, and its special tokens."""
    config.vocab_size = math.ceil(len(tokenizer) / VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id


def check_same_tokenizer(folder: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises InputError if the model in `folder` has a tokenizer with another vocabulary."""
    if (Path(folder) / "tokenizer_config.json").is_file():
        own = load_tokenizer(folder)
        if own.get_vocab() != tokenizer.get_vocab():
            raise InputError(
                f"tokenizer: expected the one in {folder} ({len(own)} tokens), got one of {len(tokenizer)} others"
            )


def encode_documents(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[np.ndarray]:
    """Token ids of each text, int32, followed by the EOS token.

    The ids are those that the tokenizer gives when it is called with `add_special_tokens=False`: the text of a special
    token, such as <|endoftext|>, becomes its id. For bytes and byte-level BPE they take less time.
    """
    encoded: Iterable[Sequence[int] | np.ndarray]
    if is_byte_tokenizer(tokenizer):
        encoded = _encode_plain(tokenizer, texts, lambda text: np.frombuffer(text.encode(), dtype=np.uint8))
    elif _is_word_tokenizer(tokenizer):
        encoded = _encode_plain(tokenizer, texts, partial(_encode_words, tokenizer))
    else:
        encoded = _call(tokenizer, texts)
    return [np.append(np.asarray(ids, dtype=np.int32), np.int32(tokenizer.eos_token_id)) for ids in encoded]


def _call(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def _encode_plain(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], encode: Callable[[str], np.ndarray]
) -> Iterator[Sequence[int] | np.ndarray]:
    """`encode` of each text; the tokenizer itself encodes those with a special token in them."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values()]
    for text in texts:
        yield _call(tokenizer, [text])[0] if any(token in text for token in special) else encode(text)


def is_byte_tokenizer(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether it is `byte_tokenizer`."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast) or len(tokenizer) != 256 + len(SPECIAL_TOKENS):
        return False
    return _definition(tokenizer) == _definition(byte_tokenizer())


def tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of everything that determines the ids of a text."""
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        definition: object = _definition(tokenizer)
    else:
        options = {name: repr(value) for name, value in tokenizer.init_kwargs.items()}
        definition = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items()), options]
    content = json.dumps([definition, tokenizer.eos_token_id], sort_keys=True)
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def _definition(tokenizer: PreTrainedTokenizerFast) -> dict:
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    return {key: definition[key] for key in ("model", "pre_tokenizer", "normalizer", "added_tokens")}


def _is_word_tokenizer(tokenizer: PreTrainedTokenizerBase) -> TypeGuard[PreTrainedTokenizerFast]:
    """Whether it is byte-level BPE that splits text by GPT-2's pattern first, as `train_bpe` makes it."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return False
    backend = tokenizer.backend_tokenizer
    words, model = backend.pre_tokenizer, backend.model
    return (
        isinstance(words, pre_tokenizers.ByteLevel)
        and (words.use_regex, words.add_prefix_space) == (True, False)
        and isinstance(model, models.BPE)
        and not model.dropout
        and backend.normalizer is None
    )


def _encode_words(tokenizer: PreTrainedTokenizerFast, text: str) -> np.ndarray:
    """Encodes each distinct word once."""
    known = _known_words.setdefault(tokenizer, {})
    if len(known) > MAX_KNOWN_WORDS:
        known.clear()
    words = WORDS.findall(text)
    new = [word for word in dict.fromkeys(words) if word not in known]
    backend = tokenizer.backend_tokenizer
    _reset_lengths(backend)  # else a word could be cut or padded
    ids = (encoding.ids for encoding in backend.encode_batch_fast(new, add_special_tokens=False))
    known.update(zip(new, ids, strict=True))
    return np.fromiter(chain.from_iterable(map(known.__getitem__, words)), dtype=np.int32)


def _reset_lengths(backend: Tokenizer) -> None:
    """Removes what calls with `truncation` or `padding` leave in a tokenizer, and in its tokenizer.json."""
    backend.no_truncation()
    backend.no_padding()


def _make_deterministic(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """A document's ids do not depend on earlier calls, nor on chance."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return
    backend = tokenizer.backend_tokenizer
    _reset_lengths(backend)
    if getattr(backend.model, "dropout", None):
        logger.warning("tokenizer: the BPE dropout of %s is not used", name)
        backend.model.dropout = None


def _finish(tokenizer: Tokenizer, use_regex: bool) -> PreTrainedTokenizerFast:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, bos_token=EOS, pad_token=PADDING)


def _byte_characters() -> list[str]:
    """The printable character for each byte in byte-level BPE, in the order of the bytes.

    Printable Latin-1 characters represent themselves, the other bytes are characters from U+0100 on: the convention of
    GPT-2's tokenizer, which the tokenizers library implements.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    stand_in = {byte: chr(0x100 + index) for index, byte in enumerate(others)}
    return [stand_in.get(byte, chr(byte)) for byte in range(256)]
