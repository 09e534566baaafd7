"""Models whose weights or logits are not finite: one line that says where, and no text or measures."""

import json
import math
import sys

import datasets
import pytest
import torch

from flashmhf import cli
from flashmhf.data.tokenizer import byte_tokenizer
from flashmhf.errors import RunError
from flashmhf.evaluation import evaluate
from flashmhf.evaluation.generation import generate
from flashmhf.evaluation.non_finite import finite_logits
from flashmhf.evaluation.tasks import evaluate_tasks
from flashmhf.models.loading import load_model, non_finite_weight

DOCUMENTS = datasets.Dataset.from_dict({"text": ["one", "another one"], "origin": ["a.txt", "b.txt"]})
OVERFLOWS = {  # finite weights that are too large; where the model's values end
    "model.layers.0.mlp.out_proj": "model.layers.0.mlp.out_proj",
    "model.layers.0.self_attn.o_proj": "model.layers.0.self_attn.o_proj",
    "lm_head": "lm_head",
}


@pytest.fixture
def model(make_model):
    return make_model(max_position_embeddings=64)


def make_large(model, module: str) -> None:
    with torch.no_grad():
        model.get_submodule(module).weight.mul_(3e38 / model.get_submodule(module).weight.abs().max())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_not_finite_are_named(model, tmp_path, value, dtype):
    with torch.no_grad():
        model.model.layers[0].mlp.v.view(-1)[-1] = value
    model.to(dtype).save_pretrained(tmp_path)
    with pytest.raises(RunError, match=r"model: expected finite weights, got .* in model\.layers\.0\.mlp\.v of"):
        load_model(str(tmp_path))


def test_every_part_of_a_large_tensor_is_searched(model, monkeypatch):
    monkeypatch.setattr("flashmhf.models.loading.NUMBERS_AT_A_TIME", 7)
    assert non_finite_weight(model) is None
    for index in (0, 6, 7, -1):
        weight = model.get_input_embeddings().weight.data.view(-1)
        before, weight[index] = weight[index].item(), math.nan
        assert non_finite_weight(model) == "model.embed_tokens.weight"
        weight[index] = before


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("module", OVERFLOWS)
def test_generation_from_logits_that_are_not_finite(model, module, temperature):
    make_large(model, module)
    expected = rf"model: expected finite logits, got NaN or infinity; .* is that of {OVERFLOWS[module]}$"
    with pytest.raises(RunError, match=expected):
        generate(model, byte_tokenizer(), "abc", temperature=temperature, max_new_tokens=4)


@pytest.mark.parametrize("module", OVERFLOWS)
def test_losses_that_are_not_finite(model, module):
    make_large(model, module)
    expected = rf"loss: expected a finite one, got (nan|inf) in a.txt; .* is that of {OVERFLOWS[module]}$"
    with pytest.raises(RunError, match=expected):
        evaluate(model, byte_tokenizer(), DOCUMENTS)


def test_a_later_document_is_named(model):
    with torch.no_grad():
        model.get_input_embeddings().weight[ord("h")] = math.inf
    with pytest.raises(RunError, match=r"got nan in b.txt; the first output .* is that of model.embed_tokens$"):
        evaluate(model, byte_tokenizer(), DOCUMENTS)


def test_logits_are_checked_within_the_context_alone(model):
    with torch.no_grad():
        model.get_input_embeddings().weight[ord("x")] = math.nan
    with finite_logits(model):
        model(torch.tensor([list(b"fine")]))
        with pytest.raises(RunError, match=r"the first output that is not finite is that of model\.embed_tokens$"):
            model(torch.tensor([list(b"goxd")]))
    assert not model._forward_hooks
    assert not model.model.embed_tokens._forward_hooks


def test_tasks(model, tmp_path, monkeypatch):
    from functools import partial

    from lm_eval.tasks import TaskManager

    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
    rows = [{"question": "Is it?", "choices": ["yes", "no"], "answer": 0}]
    (tmp_path / "toy.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "toy.yaml").write_text(
        f'task: toy\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: "{tmp_path}/toy.jsonl"}}}}\n'
        "test_split: test\noutput_type: multiple_choice\n"
        'doc_to_text: "{{question}}"\ndoc_to_choice: choices\ndoc_to_target: answer\n'
        "metric_list: [{metric: acc}]\n"
    )
    make_large(model, "lm_head")
    with pytest.raises(RunError, match="model: expected finite logits"):
        evaluate_tasks(model, byte_tokenizer(), ["toy"], tasks_path=str(tmp_path))


@pytest.mark.parametrize("weights", ["nan", "too large"])
@pytest.mark.parametrize("command", ["eval", "generate"])
def test_commands_end_with_one_line_and_print_nothing(
    model, tmp_path, corpus_folder, monkeypatch, capsys, command, weights
):
    if weights == "nan":
        torch.nn.init.constant_(model.lm_head.weight, math.nan)
    else:
        make_large(model, "lm_head")
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    options = ["--data", str(corpus_folder)] if command == "eval" else ["--max-new-tokens", "4"]
    monkeypatch.setattr(sys, "argv", ["flashmhf", command, str(tmp_path), *options, "--json"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    printed = capsys.readouterr()
    assert (caught.value.code, printed.out) == (1, "")
    assert "lm_head" in printed.err.splitlines()[-1]
    assert "Traceback" not in printed.err
