"""Bytes, trained BPE, folders; and that what is encoded comes back."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from flashmhf.data.tokenizer import (
    SPECIAL_TOKENS,
    byte_tokenizer,
    encode_documents,
    is_byte_tokenizer,
    load_tokenizer,
    tokenizer_key,
    train_bpe,
)
from flashmhf.errors import InputError

TEXTS = ["the cat sat on the mat", "the dog sat on the log", "Grüße aus Köln"] * 20


@given(st.text(max_size=50).filter(lambda text: not any(token in text for token in SPECIAL_TOKENS)))
def test_bytes_are_token_ids(text):
    tokenizer = byte_tokenizer()
    assert tokenizer(text)["input_ids"] == list(text.encode())
    (ids,) = encode_documents(tokenizer, [text])
    assert ids.tolist() == [*text.encode(), tokenizer.eos_token_id]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def with_truncation(tokenizer):
    tokenizer(TEXTS[0], truncation=True, max_length=4)


def with_padding(tokenizer):
    tokenizer.backend_tokenizer.enable_padding(length=64)


def with_dropout(tokenizer):
    if tokenizer.backend_tokenizer.model.dropout is None:
        tokenizer.backend_tokenizer.model.dropout = 0.9


def with_bos(tokenizer):
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.eos_token_id)]
    )


def with_normalizer(tokenizer):
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])


def with_a_prefix_space(tokenizer):
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def with_tokens_of_its_own(tokenizer):
    tokenizer.add_tokens(["cat sat", AddedToken("log", single_word=True, lstrip=True)])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<user>"]})


def with_special_tokens_as_text(tokenizer):
    tokenizer.split_special_tokens = True


STATES = [
    with_truncation,
    with_padding,
    with_dropout,
    with_bos,
    with_normalizer,
    with_a_prefix_space,
    with_tokens_of_its_own,
    with_special_tokens_as_text,
]
DOCUMENTS = [
    TEXTS[0] * 20,
    f"{TEXTS[0]}<|endoftext|>{TEXTS[1]}",
    "<|endoftext|>",
    "<|pad|> <user>the log, prologue",
    "Ünïcode \ufb01 \u212b\0",
]


@pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)
@pytest.mark.parametrize("make", [byte_tokenizer, lambda: train_bpe(TEXTS, 275)], ids=["bytes", "bpe"])
def test_the_ids_are_those_of_the_tokenizer_when_it_is_called(tmp_path, make, state):
    """Whatever state an earlier call, or tokenizer.json, has left."""
    made = make()
    state(made)
    made.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    for tokenizer in (loaded,) if state is with_dropout else (made, loaded):
        found = [ids.tolist() for ids in encode_documents(tokenizer, DOCUMENTS)]
        assert found == [ids.tolist() for ids in encode_documents(tokenizer, DOCUMENTS)]
        called = [tokenizer([text], add_special_tokens=False, verbose=False)["input_ids"][0] for text in DOCUMENTS]
        assert found == [[*ids, tokenizer.eos_token_id] for ids in called]
        assert len(found[0]) > 64


def test_truncation_is_not_saved_again(tmp_path):
    made = train_bpe(TEXTS, 275)
    with_truncation(made)
    with_padding(made)
    made.save_pretrained(tmp_path / "a")
    assert json.loads((tmp_path / "a/tokenizer.json").read_text())["padding"]
    load_tokenizer(str(tmp_path / "a")).save_pretrained(tmp_path / "b")
    saved = json.loads((tmp_path / "b/tokenizer.json").read_text())
    assert (saved["truncation"], saved["padding"]) == (None, None)


def test_byte_tokenizer_is_recognised_after_saving(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert is_byte_tokenizer(loaded)
    assert (loaded.eos_token_id, loaded.pad_token_id, len(loaded)) == (256, 257, 258)


def test_bpe_compresses_and_comes_back(tmp_path):
    tokenizer = train_bpe(TEXTS, 275)
    assert len(tokenizer) == 275
    assert not is_byte_tokenizer(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    for text in [*TEXTS[:3], "unseen: \U0001f408\n\t"]:
        (ids,) = encode_documents(loaded, [text])
        assert ids[-1] == loaded.eos_token_id
        assert loaded.decode(ids, skip_special_tokens=True) == text
    assert len(encode_documents(loaded, [TEXTS[0]])[0]) < len(TEXTS[0]) / 2


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(TEXTS, 275)


PIECES = st.sampled_from(
    [" ", "  ", "\n", "\n\n", "\t", "'s", "'", "cat", " the", "12", "!?", "ß", "\u3000", "<|endoftext|>"]
)


@given(st.one_of(st.text(max_size=50), st.lists(PIECES, max_size=12).map("".join)))
def test_encoding_by_words_is_the_tokenizers(bpe, text):
    (ids,) = encode_documents(bpe, [text])
    assert ids[:-1].tolist() == bpe(text, add_special_tokens=False)["input_ids"]


def test_the_key_is_of_what_decides_on_the_ids(bpe):
    other = train_bpe([*TEXTS, "zebra zebra"] * 3, 276)
    copy = PreTrainedTokenizerFast(tokenizer_object=bpe.backend_tokenizer, eos_token=bpe.eos_token)
    keys = [tokenizer_key(tokenizer) for tokenizer in (bpe, other, byte_tokenizer())]
    assert len(set(keys)) == 3
    bpe(["padded", "and truncated"], padding=True, truncation=True, max_length=3)
    assert tokenizer_key(bpe) == keys[0] == tokenizer_key(copy)


def test_bad_names_and_sizes(tmp_path):
    with pytest.raises(InputError, match="tokenizer: expected bytes, a tokenizer's folder or a Hub id, got"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(InputError, match="tokenizer: expected bytes, a tokenizer's folder or a Hub id, got 'no/such'"):
        load_tokenizer("no/such")
    with pytest.raises(InputError, match="vocab-size: expected at least 258"):
        train_bpe(TEXTS, 100)
