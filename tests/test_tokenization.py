"""Bytes, trained BPE, folders; and that what is encoded comes back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashmhf.errors import InputError
from flashmhf.tokenization import (
    byte_tokenizer,
    encode_documents,
    is_byte_tokenizer,
    load_tokenizer,
    save_tokenizer,
    train_bpe,
)

TEXTS = ["the cat sat on the mat", "the dog sat on the log", "Grüße aus Köln"] * 20


@given(st.text(max_size=50).filter(lambda text: "<|" not in text))
def test_bytes_are_token_ids(text):
    tokenizer = byte_tokenizer()
    assert tokenizer(text)["input_ids"] == list(text.encode())
    (ids,) = encode_documents(tokenizer, [text])
    assert ids.tolist() == [*text.encode(), tokenizer.eos_token_id]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_byte_tokenizer_is_recognised_after_saving(tmp_path):
    save_tokenizer(byte_tokenizer(), tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert is_byte_tokenizer(loaded)
    assert (loaded.eos_token_id, loaded.pad_token_id, len(loaded)) == (256, 257, 258)


def test_bpe_compresses_and_comes_back(tmp_path):
    tokenizer = train_bpe(TEXTS, 275)
    assert len(tokenizer) == 275
    assert not is_byte_tokenizer(tokenizer)
    save_tokenizer(tokenizer, tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    for text in [*TEXTS[:3], "unseen: \U0001f408\n\t"]:
        (ids,) = encode_documents(loaded, [text])
        assert ids[-1] == loaded.eos_token_id
        assert loaded.decode(ids, skip_special_tokens=True) == text
    assert len(encode_documents(loaded, [TEXTS[0]])[0]) < len(TEXTS[0]) / 2


def test_bad_names_and_sizes(tmp_path):
    with pytest.raises(InputError, match="tokenizer: expected bytes, a tokenizer's folder or a Hub id, got"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(InputError, match="tokenizer: expected bytes, a tokenizer's folder or a Hub id, got 'no/such'"):
        load_tokenizer("no/such")
    with pytest.raises(InputError, match="vocab-size: expected at least 258"):
        train_bpe(TEXTS, 100)
