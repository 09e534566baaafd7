"""Downstream tasks on small task files made here, equal to lm-eval's plain model on the same checkpoint."""

import json

import pytest
import torch

from flashmhf.errors import InputError
from flashmhf.models import FlashMHFConfig, FlashMHFForCausalLM
from flashmhf.tasks import evaluate_tasks
from flashmhf.tokenization import byte_tokenizer, save_tokenizer

TASK = """
task: toy
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
  - metric: acc_norm
"""


@pytest.fixture
def model():
    config = FlashMHFConfig(
        vocab_size=320,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=128,
        init="scaled",
        bos_token_id=256,
        eos_token_id=256,
        pad_token_id=257,
    )
    torch.manual_seed(0)
    return FlashMHFForCausalLM(config).eval()


@pytest.fixture
def tasks_path(tmp_path):
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [
        {"question": f"Number {i} is", "choices": ["odd", "even", "neither of them"], "answer": i % 2}
        for i in range(12)
    ]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (folder / "toy.yaml").write_text(TASK.format(data=folder / "rows.jsonl"))
    return str(folder)


def test_equal_to_lm_evals_own_model(model, tasks_path, tmp_path):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    mine = evaluate_tasks(model, byte_tokenizer(), ["toy"], tasks_path=tasks_path)
    assert mine["toy"]["sample_len"] == 12
    model.save_pretrained(tmp_path / "model")
    save_tokenizer(byte_tokenizer(), tmp_path / "model")
    theirs = simple_evaluate(
        "hf",
        model_args={"pretrained": str(tmp_path / "model"), "dtype": "float32", "max_length": 128},
        tasks=["toy"],
        task_manager=TaskManager(include_path=tasks_path),
        device="cpu",
    )["results"]
    assert {k: v for k, v in mine["toy"].items() if k != "alias"} == {
        k: v for k, v in theirs["toy"].items() if k != "alias"
    }


def test_refusals(model, tasks_path, monkeypatch):
    with pytest.raises(InputError, match="tasks: expected names that lm-eval knows, got nonsense"):
        evaluate_tasks(model, byte_tokenizer(), ["toy", "nonsense"], tasks_path=tasks_path)
    with pytest.raises(InputError, match="tasks-path: expected a folder, got 'nowhere'"):
        evaluate_tasks(model, byte_tokenizer(), ["toy"], tasks_path="nowhere")
    monkeypatch.setattr("flashmhf.tasks.find_spec", lambda name: None)
    with pytest.raises(InputError, match="tasks: expected the package lm-eval, got none; pip install"):
        evaluate_tasks(model, byte_tokenizer(), ["toy"])


def test_from_the_command_line(model, tasks_path, tmp_path, monkeypatch, capsys):
    from flashmhf import cli

    model.save_pretrained(tmp_path / "model")
    save_tokenizer(byte_tokenizer(), tmp_path / "model")
    command = ["flashmhf", "eval", str(tmp_path / "model"), "--tasks", "toy", "--tasks-path", tasks_path]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code
    assert "| toy | acc |" in capsys.readouterr().out
