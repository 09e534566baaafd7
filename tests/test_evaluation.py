"""Losses over windows, checked against scoring token by token."""

import math

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flashmhf.errors import InputError
from flashmhf.evaluation import IGNORED, evaluate, split_windows
from flashmhf.models import FlashMHFConfig, FlashMHFForCausalLM
from flashmhf.tokenization import byte_tokenizer, train_bpe

DOCUMENTS = datasets.Dataset.from_dict({"text": ["a short one", "x", "a longer one: " + "abc" * 30]})


@pytest.fixture
def model():
    config = FlashMHFConfig(
        vocab_size=320,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=32,
        init="scaled",
    )
    torch.manual_seed(0)
    return FlashMHFForCausalLM(config).eval()


@given(st.integers(1, 60), st.integers(2, 20), st.data())
def test_every_token_is_a_label_once_with_as_much_context_as_promised(length, context_length, data):
    stride = data.draw(st.integers(1, context_length))
    ids = [*range(100, 100 + length), 7]
    seen = []
    for input_ids, labels in split_windows(ids, context_length, stride):
        assert len(input_ids) == len(labels) <= context_length
        for position, label in enumerate(labels):
            if label != IGNORED:
                seen.append(label)
                before = label - 100  # tokens of the document before this one
                assert position + 1 >= min(before + 1, context_length - stride + 1)
                assert input_ids[position] == (7 if before == 0 else label - 1)
    assert seen == ids[:-1]


@pytest.mark.parametrize("stride", [1, 5, 16])
def test_sums_agree_with_scoring_token_by_token(model, stride):
    tokenizer, total, count = byte_tokenizer(), 0.0, 0
    for text in DOCUMENTS["text"]:
        for input_ids, labels in split_windows([*text.encode(), tokenizer.eos_token_id], 16, stride):
            log_probabilities = model(torch.tensor([input_ids])).logits[0].log_softmax(-1)
            for position, label in enumerate(labels):
                if label != IGNORED:
                    total -= log_probabilities[position, label].item()
                    count += 1
    calls = []
    result = evaluate(
        model, tokenizer, DOCUMENTS, context_length=16, stride=stride, progress=lambda *state: calls.append(state)
    )
    size = sum(len(text.encode()) for text in DOCUMENTS["text"])
    assert (result.tokens, result.bytes, result.documents) == (count, size, 3)
    assert result.nats_per_token == pytest.approx(total / count, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)
    assert result.bits_per_byte == pytest.approx(total / size / math.log(2), rel=1e-5)
    assert calls[-1] == (count, count)


def test_batches_change_nothing(model, monkeypatch):
    together = evaluate(model, byte_tokenizer(), DOCUMENTS, context_length=16)
    monkeypatch.setattr("flashmhf.evaluation.LOGIT_ELEMENTS", 1)
    alone = evaluate(model, byte_tokenizer(), DOCUMENTS, context_length=16)
    assert together.nats_per_token == pytest.approx(alone.nats_per_token, rel=1e-6)


def test_a_uniform_model_gives_the_logarithm_of_the_vocabulary(model):
    torch.nn.init.zeros_(model.lm_head.weight)
    result = evaluate(model, byte_tokenizer(), DOCUMENTS)
    assert result.nats_per_token == pytest.approx(math.log(320))
    assert result.bits_per_byte == pytest.approx(math.log2(320))
    assert result.context_length == 32


def test_sizes_that_do_not_fit(model):
    for arguments, message in (
        ({"context_length": 33}, "context-length: expected 2 to the model's 32, got 33"),
        ({"context_length": 1}, "context-length: expected 2 to the model's 32, got 1"),
        ({"stride": 0}, "stride: expected 1 to the context length 32, got 0"),
        ({"context_length": 8, "stride": 9}, "stride: expected 1 to the context length 8, got 9"),
    ):
        with pytest.raises(InputError, match=message):
            evaluate(model, byte_tokenizer(), DOCUMENTS, **arguments)


def test_a_tokenizer_of_another_model(model):
    many = train_bpe(["".join(chr(c) for c in range(200, 900))] * 3, 400)
    with pytest.raises(InputError, match="tokenizer: expected at most the model's 320 tokens, got "):
        evaluate(model, many, DOCUMENTS)
