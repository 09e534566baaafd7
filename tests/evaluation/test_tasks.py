"""Downstream tasks on small task files made here, equal to lm-eval's plain model on the same checkpoint."""

import json
from functools import partial

import pytest
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from flashmhf import cli
from flashmhf.data.tokenizer import byte_tokenizer
from flashmhf.errors import InputError
from flashmhf.evaluation.tasks import ALIASES, evaluate_tasks

DATA = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
"""
CHOICE = (
    DATA
    + """
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
  - metric: acc_norm
"""
)
ROLLING = (
    DATA
    + """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question * 20}}}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
"""
)
GENERATION = (
    DATA
    + """
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 6, do_sample: false}}
metric_list:
  - metric: exact_match
"""
)


@pytest.fixture
def model(make_model):
    return make_model(max_position_embeddings=128, bos_token_id=256, eos_token_id=256, pad_token_id=257)


@pytest.fixture
def only_own_tasks(monkeypatch):
    """Leaves lm-eval's own tasks out: to read their ten thousand files takes seven seconds."""
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def write_task(folder, name, definition, rows):
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (folder / f"{name}.yaml").write_text(definition.format(name=name, data=folder / f"{name}.jsonl"))
    return str(folder)


def questions(number=12):
    return [
        {"question": f"Number {i} is", "choices": ["odd", "even", "neither of them"], "answer": i % 3}
        for i in range(number)
    ]


@pytest.fixture
def tasks_path(tmp_path):
    return write_task(tmp_path / "tasks", "toy", CHOICE, questions())


def plain_results(folder, tasks_path, name):
    """What lm-eval itself gives for the checkpoint, and each answer."""
    report = simple_evaluate(
        "hf",
        model_args={"pretrained": folder, "dtype": "float32"},
        tasks=[name],
        task_manager=TaskManager(include_path=tasks_path, include_defaults=False),
        device="cpu",
        batch_size=8,
    )
    return report["results"], [sample["filtered_resps"][0] for sample in report["samples"][name]]


@pytest.mark.parametrize(
    ("definition", "measures"),
    [(CHOICE, ("acc", "acc_norm")), (ROLLING, ("word_perplexity", "bits_per_byte")), (GENERATION, ("exact_match",))],
)
def test_equal_to_lm_evals_own_model(only_own_tasks, model, folder, tmp_path, definition, measures):
    rows = questions()
    path = write_task(tmp_path / "tasks", "toy", definition, rows)
    theirs, answers = plain_results(folder, path, "toy")
    if definition is GENERATION:  # make every third answer the right one
        right = [{**row, "choices": [answers[i]] * 3} if i % 3 == 0 else row for i, row in enumerate(rows)]
        theirs, _ = plain_results(folder, write_task(tmp_path / "tasks", "toy", definition, right), "toy")
    mine = evaluate_tasks(model, byte_tokenizer(), ["toy"], tasks_path=path)
    assert mine["toy"]["sample_len"] == 12
    assert all(mine["toy"][f"{measure},none"] > 0 for measure in measures)
    assert mine == theirs


def test_the_papers_tasks_from_files_of_ones_own(only_own_tasks, model, tmp_path):
    names = ["hellaswag", "social_iqa", "piqa", "openbookqa", "winogrande", "race"]
    for number, name in enumerate(names, 2):
        path = write_task(tmp_path / "tasks", name, CHOICE, questions(number))
    found = evaluate_tasks(model, byte_tokenizer(), ["paper"], tasks_path=path)
    sizes = {name: measures["sample_len"] for name, measures in found.items()}
    assert sizes == dict(zip(names, range(2, 8), strict=True))


def test_the_papers_tasks_are_lm_evals():
    assert set(ALIASES["paper"]) <= set(TaskManager().all_tasks)


def test_refusals(only_own_tasks, model, tasks_path):
    with pytest.raises(InputError, match="tasks: expected names with commas between them or paper, got none"):
        evaluate_tasks(model, byte_tokenizer(), ["", " "])
    with pytest.raises(InputError, match="context-length: expected 2 to the model's 128, got 129"):
        evaluate_tasks(model, byte_tokenizer(), ["toy"], tasks_path=tasks_path, context_length=129)
    with pytest.raises(InputError, match="tasks: expected names that lm-eval knows, got nonsense"):
        evaluate_tasks(model, byte_tokenizer(), ["toy", "nonsense"], tasks_path=tasks_path)
    with pytest.raises(InputError, match="tasks-path: expected a folder, got 'nowhere'"):
        evaluate_tasks(model, byte_tokenizer(), ["toy"], tasks_path="nowhere")


def test_data_that_cannot_be_loaded(only_own_tasks, model, tasks_path, tmp_path):
    (tmp_path / "tasks/toy.jsonl").unlink()
    with pytest.raises(InputError, match=r"tasks: .*toy\.jsonl"):
        evaluate_tasks(model, byte_tokenizer(), ["toy"], tasks_path=tasks_path)


def test_from_the_command_line(only_own_tasks, folder, tasks_path, tmp_path, monkeypatch, capsys):
    command = ["flashmhf", "eval", folder, "--tasks-path", tasks_path, "--output", str(tmp_path / "r.json"), "--tasks"]
    monkeypatch.setattr("sys.argv", [*command, "toy"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code
    assert "| toy | acc |" in capsys.readouterr().out
    written = json.loads((tmp_path / "r.json").read_text())
    assert (written["model"], written["tasks"]["toy"]["sample_len"]) == (folder, 12)
    monkeypatch.setattr("sys.argv", [*command, "toy,nonsense"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    assert capsys.readouterr().err.endswith("flashmhf: tasks: expected names that lm-eval knows, got nonsense\n")


@pytest.mark.parametrize(
    "content",
    [
        "task: [",
        "task: broken\ndataset_path: json\n",
        "task: broken\noutput_type: odd\n",
        CHOICE.format(name="broken", data="{data}").replace("{{question}}", "{{query}}"),
        CHOICE.format(name="broken", data="{data}").replace("{{question}}", "{{question"),
        CHOICE.format(name="broken", data="{data}").replace("split: test", "split: tset"),
        CHOICE.format(name="broken", data="{data}").replace("metric: acc\n", "metric: odd\n"),
        CHOICE.format(name="broken", data="{data}").replace('"{{question}}"', "!function missing.function"),
        CHOICE.format(name="broken", data="{data}").replace('"{{question}}"', "!!python/object/apply:os.abort []"),
        "task: 5\n",
        "just text",
        "\0\1",
    ],
)
def test_a_broken_definition(only_own_tasks, model, tasks_path, tmp_path, content, monkeypatch):
    monkeypatch.chdir(tmp_path)  # without data_files, datasets reads every JSON file below the current folder
    (tmp_path / "tasks/broken.yaml").write_text(content.replace("{data}", f"{tmp_path}/tasks/toy.jsonl"))
    with pytest.raises(InputError, match=r"tasks: .*broken"):
        evaluate_tasks(model, byte_tokenizer(), ["broken"], tasks_path=tasks_path)
