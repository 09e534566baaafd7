"""Losses over windows, checked against scoring token by token."""

import json
import math
import shutil
from collections import defaultdict

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flashmhf import cli
from flashmhf.data.tokenizer import byte_tokenizer, train_bpe
from flashmhf.errors import InputError, RunError
from flashmhf.evaluation import Evaluation, evaluate, split_windows
from flashmhf.evaluation.onednn import onednn_linear
from flashmhf.models.fused_loss import IGNORED

DOCUMENTS = datasets.Dataset.from_dict({"text": ["a short one", "x", "a longer one: " + "abc" * 30]})


@pytest.fixture
def model(make_model):
    return make_model(max_position_embeddings=32)


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
    monkeypatch.setattr("flashmhf.evaluation.loss.CPU_LOGIT_ELEMENTS", 1)
    alone = evaluate(model, byte_tokenizer(), DOCUMENTS, context_length=16)
    assert together.nats_per_token == pytest.approx(alone.nats_per_token, rel=1e-6)


def test_linear_layers_by_onednn_agree_and_are_put_back(model):
    ids = torch.randint(0, 320, (2, 32))
    with torch.inference_mode():
        plain = model(ids).logits
        with onednn_linear(model):
            assert "forward" in vars(model.lm_head)
            assert torch.allclose(model(ids).logits, plain, rtol=1e-5, atol=1e-6)
        assert not any("forward" in vars(module) for module in model.modules())
        with onednn_linear(model.to(torch.bfloat16)):
            assert "forward" not in vars(model.lm_head)


def test_a_uniform_model_gives_the_logarithm_of_the_vocabulary(model):
    torch.nn.init.zeros_(model.lm_head.weight)
    result = evaluate(model, byte_tokenizer(), DOCUMENTS)
    assert result.nats_per_token == pytest.approx(math.log(320))
    assert result.bits_per_byte == pytest.approx(math.log2(320))
    assert result.context_length == 32


@pytest.mark.parametrize("stride", [1, 5, 16])
def test_losses_by_position_and_document(model, stride):
    tokenizer = byte_tokenizer()
    by_context, by_document = defaultdict(list), []
    for text in DOCUMENTS["text"]:
        losses = []
        for input_ids, labels in split_windows([*text.encode(), tokenizer.eos_token_id], 16, stride):
            log_probabilities = model(torch.tensor([input_ids])).logits[0].log_softmax(-1)
            for position, label in enumerate(labels):
                if label != IGNORED:
                    losses.append(-log_probabilities[position, label].item())
                    by_context[position + 1].append(losses[-1])
        by_document.append(losses)
    result = evaluate(model, tokenizer, DOCUMENTS, context_length=16, stride=stride)
    assert [one.nats for one in result.per_document] == pytest.approx([sum(losses) for losses in by_document], rel=1e-5)
    assert [one.tokens for one in result.per_document] == [len(losses) for losses in by_document]
    assert [one.bytes for one in result.per_document] == [len(text.encode()) for text in DOCUMENTS["text"]]
    assert [one.origin for one in result.per_document] == ["document 1", "document 2", "document 3"]
    bins = [(1, 1), (2, 2), (3, 4), (5, 8), (9, 16)]
    assert [(one.first, one.last) for one in result.by_position] == bins
    for one in result.by_position:
        losses = [loss for context in range(one.first, one.last + 1) for loss in by_context[context]]
        assert one.tokens == len(losses)
        assert one.nats_per_token == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_the_last_bin_ends_with_the_context_and_short_documents_fill_the_first(model):
    result = evaluate(model, byte_tokenizer(), DOCUMENTS, context_length=11)
    assert [(one.first, one.last) for one in result.by_position] == [(1, 1), (2, 2), (3, 4), (5, 8), (9, 11)]
    short = evaluate(model, byte_tokenizer(), datasets.Dataset.from_dict({"text": ["abc", "de"]}))
    assert [(one.first, one.last, one.tokens) for one in short.by_position] == [(1, 1, 2), (2, 2, 2), (3, 4, 1)]
    assert short.context_length == 32


def test_documents_have_origins_and_digests(model):
    documents = DOCUMENTS.add_column("origin", ["a.txt", "b.jsonl, line 1", "b.jsonl, line 2"])
    result = evaluate(model, byte_tokenizer(), documents)
    assert [one.origin for one in result.per_document] == documents["origin"][:]
    other = evaluate(model, byte_tokenizer(), DOCUMENTS.select([2, 1]))
    assert [one.digest for one in other.per_document] == [result.per_document[i].digest for i in (2, 1)]
    assert len({one.digest for one in result.per_document}) == 3


def test_intervals_hold_the_measures_and_need_two_documents(model):
    result = evaluate(model, byte_tokenizer(), DOCUMENTS)
    for name, (low, high) in result.intervals.items():
        assert low < getattr(result, name) < high
    assert result.intervals == evaluate(model, byte_tokenizer(), DOCUMENTS).intervals
    low, high = result.intervals["nats_per_token"]
    assert result.intervals["perplexity"] == pytest.approx((math.exp(low), math.exp(high)))
    assert evaluate(model, byte_tokenizer(), DOCUMENTS.select([0])).intervals is None


def test_a_result_survives_json(model):
    result = evaluate(model, byte_tokenizer(), DOCUMENTS)
    written = json.loads(json.dumps({"model": "m", **result.as_dict()}))
    assert Evaluation.from_dict(written) == result
    single = evaluate(model, byte_tokenizer(), DOCUMENTS.select([0]))
    assert Evaluation.from_dict(single.as_dict()) == single
    del written["per_document"]
    with pytest.raises(
        InputError,
        match="evaluation: expected the result of flashmhf eval, got another: Evaluation: expected per_doc",
    ):
        Evaluation.from_dict(written)


def test_nothing_to_predict(model):
    nothing = datasets.Dataset.from_dict({"text": ["", ""]})
    with pytest.raises(InputError, match="data: expected a document with a token to predict, got none in 2 documents"):
        evaluate(model, byte_tokenizer(), nothing)
    one = datasets.Dataset.from_dict({"text": ["", "a", "bc"]})
    result = evaluate(model, byte_tokenizer(), one)
    assert (result.tokens, result.documents, result.per_document[0].tokens) == (3, 3, 0)
    assert all(math.isfinite(end) for ends in result.intervals.values() for end in ends)


def test_a_loss_that_is_not_finite_names_its_document(model):
    with torch.no_grad():
        model.model.embed_tokens.weight[ord("x")] = math.nan
    documents = datasets.Dataset.from_dict({"text": ["fine", "not x so"], "origin": ["a.txt", "b.txt"]})
    with pytest.raises(RunError, match=r"loss: expected a finite one, got nan in b.txt"):
        evaluate(model, byte_tokenizer(), documents)


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


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "books/test").mkdir(parents=True)
    (tmp_path / "books/train.txt").write_text("to train with " * 20)
    for i, text in enumerate(DOCUMENTS["text"]):
        (tmp_path / f"books/test/{i}.txt").write_text(text)
    return tmp_path


def run(monkeypatch, capsys, folder, *arguments):
    command = ["flashmhf", "eval", str(folder / "model"), "--data", str(folder / "books"), "--split", "test"]
    monkeypatch.setattr("sys.argv", [*command, *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code, capsys.readouterr()


def test_from_the_command_line(model, folder, monkeypatch, capsys):
    output = folder / "result.json"
    output.write_text("an earlier one")
    code, printed = run(monkeypatch, capsys, folder, "--stride", "8", "--json", "--output", str(output))
    assert code == 0
    result = json.loads(printed.out)
    assert json.loads(output.read_text()) == result
    assert [path.name for path in folder.iterdir() if path.name.startswith("result")] == ["result.json"]
    expected = evaluate(model, byte_tokenizer(), DOCUMENTS, stride=8)
    found = Evaluation.from_dict(result)
    assert (found.nats_per_token, found.by_position) == (expected.nats_per_token, expected.by_position)
    assert (result["model"], result["data"], result["split"]) == (str(folder / "model"), str(folder / "books"), "test")
    _, printed = run(monkeypatch, capsys, folder)
    assert "| nats/token | " in printed.out
    assert "intervals by a bootstrap over documents" in printed.out
    assert "| tokens of context | nats/token | tokens |" in printed.out
    assert "| 17 to 32 | " in printed.out
    for i in (0, 1):
        (folder / f"books/test/{i}.txt").unlink()
    _, printed = run(monkeypatch, capsys, folder)
    assert "no interval: it requires two documents" in printed.out


def test_bad_usage_is_one_line(folder, monkeypatch, capsys):
    other, books = folder / "other", folder / "books"
    train_bpe(["some text"] * 3, 270).save_pretrained(other)
    shutil.copytree(folder / "model", folder / "truncated")
    (folder / "truncated/model.safetensors").write_bytes(b"{}")
    (folder / "empty").mkdir()
    for arguments, message in (
        (["--split", "tset"], f"split: expected validation, train or all, got 'tset', which {books} lacks"),
        (["--context-length", "33"], "context-length: expected 2 to the model's 32, got 33"),
        (["--stride", "0"], "stride: expected 1 to the context length 32, got 0"),
        (["--tokenizer", str(other)], f"tokenizer: expected the one in {folder}/model (258 tokens), got one of "),
        (["--output", str(folder / "no/file")], "output: expected a file in a folder that exists, got "),
        (["--output", str(books)], "output: expected a file, got the folder "),
        (["--data", str(folder / "nowhere")], f"data: no such file or folder: {folder}/nowhere"),
    ):
        code, printed = run(monkeypatch, capsys, folder, *arguments)
        assert (code, printed.out) == (2, "")
        assert printed.err.splitlines()[-1].startswith(f"flashmhf: {message}")
    for name, message in (("empty", "model: expected a folder with config.json"), ("truncated", "checkpoint: ")):
        monkeypatch.setattr("sys.argv", ["flashmhf", "eval", str(folder / name), "--data", str(books)])
        with pytest.raises(SystemExit, match="2"):
            cli.main()
        assert capsys.readouterr().err.splitlines()[-1].startswith(f"flashmhf: {message}")
