"""Bytes, trained BPE, folders; and that what is encoded comes back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from flashmhf.data.tokenizer import (
    byte_tokenizer,
    encode_documents,
    is_byte_tokenizer,
    load_tokenizer,
    tokenizer_key,
    train_bpe,
)
from flashmhf.errors import InputError

TEXTS = ["the cat sat on the mat", "the dog sat on the log", "Grüße aus Köln"] * 20


@given(st.text(max_size=50).filter(lambda text: "<|" not in text))
def test_bytes_are_token_ids(text):
    tokenizer = byte_tokenizer()
    assert tokenizer(text)["input_ids"] == list(text.encode())
    (ids,) = encode_documents(tokenizer, [text])
    assert ids.tolist() == [*text.encode(), tokenizer.eos_token_id]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


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
