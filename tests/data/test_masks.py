"""No attention across documents, in training as it is run."""

from itertools import islice

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from flashmhf.data.blocks import SHUFFLED_DOCUMENTS, TokenBlocks, document_positions, iterate_blocks
from flashmhf.data.tokenizer import byte_tokenizer
from flashmhf.data.tokens import tokenize
from flashmhf.models.loading import load_config

EOS = 256


def test_positions_restart_at_each_eos_token():
    ids = torch.tensor([5, 6, EOS, 7, EOS, EOS, 8, 9])
    assert document_positions(ids, EOS).tolist() == [0, 1, 0, 1, 0, 0, 1, 2]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_document_does_not_see_another(model_file, attention):
    config = load_config(str(model_file))
    config.vocab_size = 320
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).train()
    model.config.use_cache = False  # as the Trainer does
    texts = ["the first document", "another, the second", "and a third one"]

    def logits(second: str) -> torch.Tensor:
        documents = datasets.Dataset.from_dict({"text": [texts[0], second, texts[2]]})
        blocks = TokenBlocks(tokenize(documents, byte_tokenizer()), 54, mask_eos_id=EOS)
        batch = {name: tensor[None] for name, tensor in blocks[0].items()}
        with torch.no_grad():
            return model(**batch).logits[0]

    first, second = logits(texts[1]), logits("wholly other words!")
    assert len(texts[1]) == len("wholly other words!")
    start, stop = len(texts[0]) + 1, len(texts[0]) + 1 + len(texts[1])
    torch.testing.assert_close(first[:start], second[:start])
    torch.testing.assert_close(first[stop:], second[stop:])
    assert not torch.allclose(first[start:stop], second[start:stop], atol=1e-3)
    alone = model(torch.tensor([[EOS, *texts[2].encode()]])).logits[0]
    torch.testing.assert_close(first[stop : stop + len(alone)], alone[: len(first) - stop], rtol=1e-4, atol=1e-5)


def test_streamed_blocks_have_the_same_positions():
    documents = datasets.Dataset.from_dict({"text": ["abc" * i for i in range(1, 20)]})
    stream = documents.to_iterable_dataset()
    shuffled = datasets.Dataset.from_list(
        list(stream.shuffle(np.random.default_rng([0, 0]), buffer_size=SHUFFLED_DOCUMENTS))
    )
    stored = TokenBlocks(tokenize(shuffled, byte_tokenizer()), 16, mask_eos_id=EOS)
    streamed = list(islice(iterate_blocks(stream, byte_tokenizer(), 16, document_mask=True), len(stored)))
    assert len(stored) > 10
    for mine, theirs in zip(streamed, stored, strict=True):
        assert {name: list(value) for name, value in mine.items()} == {k: v.tolist() for k, v in theirs.items()}
    assert "position_ids" not in TokenBlocks(tokenize(documents, byte_tokenizer()), 16)[0]
