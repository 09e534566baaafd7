"""`flashmhf train --config FILE`: options from a file, over which the command line takes precedence."""

import json
import shutil
import sys

import pytest
import typer
import yaml

from flashmhf import cli
from flashmhf.data.config import DataConfig
from flashmhf.training.config import TrainConfig

SMALL = {
    "per_device_train_batch_size": 2,
    "eval_strategy": "no",
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


@pytest.fixture
def train(model_file, corpus_folder, tmp_path, monkeypatch, capsys):
    """Runs the command on a file with these values; the exit code, its result, and the last line of standard error."""

    def run(values, *flags: str, text: str | None = None) -> tuple[int, dict, str]:
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump(values) if text is None else text)
        command = ["flashmhf", "train", "--config", str(file), "--output-dir", str(tmp_path / "run"), "--json", *flags]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as caught:
            cli.main()
        printed = capsys.readouterr()
        result = json.loads(printed.out) if printed.out else {}
        return caught.value.code or 0, result, printed.err.rstrip().rpartition("\n")[2]

    run.base = {"model": str(model_file), "data": str(corpus_folder), "context_length": 32, "validation_tokens": 512}
    return run


def test_every_field_of_the_configuration_is_an_option_with_its_default():
    command = typer.main.get_command(cli.app).commands["train"]
    defaults = {parameter.name: parameter.default for parameter in command.params}
    config = TrainConfig(model="flashmhf-tiny")
    expected = {**config.options(), "optimizer": None}  # the default, or that of the run which is resumed
    assert {name: defaults[name] for name in expected if name != "model"} == {
        name: value for name, value in expected.items() if name != "model"
    }
    other = {"context_length": 64, "data": "books", "fused_loss": "off", "model": "small.json", "resume": True}
    assert TrainConfig.from_options(other) == TrainConfig(
        model="small.json", data=DataConfig(source="books", context_length=64), fused_loss="off"
    )
    assert TrainConfig.from_options(config.options()) == config


def test_the_command_line_takes_precedence_over_the_file(train):
    code, result, _ = train({**train.base, **SMALL, "max_steps": 5}, "--max-steps", "2", "--context-length", "16")
    assert code == 0
    assert (result["steps"], result["tokens"]) == (2, 2 * 2 * 16)


def test_names_may_have_hyphens_and_lists_and_objects_are_flags(train, tmp_path):
    values = {**train.base, **SMALL, "max-steps": 1, "learning-rate": 1e-2, "lr_scheduler_kwargs": {"min_lr_rate": 0.5}}
    code, result, _ = train({**values, "report_to": ["none"]})
    assert code == 0
    assert result["steps"] == 1
    assert json.loads((tmp_path / "run/run.json").read_text())["context_length"] == 32


@pytest.mark.parametrize(
    ("values", "text", "message"),
    [
        (
            {"modell": "x"},
            None,
            "flags of transformers.TrainingArguments, got 'modell'; did you mean model?",
        ),
        (None, "- a\n- b\n", "config: expected options and their values in "),
        (None, "a: [1\n", "config: "),
        (None, "{" * 99_999, "config: "),
        ({"context_length": "many"}, None, "Invalid value for '--context-length'"),
    ],
)
def test_bad_files_are_one_line(train, values, text, message):
    code, result, line = train(None if values is None else {**train.base, **SMALL, **values}, text=text)
    assert (code, result) == (2, {})
    assert message in line


def test_a_missing_file_is_one_line(train, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["flashmhf", "train", "--config", str(tmp_path / "no.yaml"), "--output-dir", "x"])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert "config: " in capsys.readouterr().err


def test_the_record_of_a_run_gives_the_same_run(train, tmp_path, monkeypatch, model_file, corpus_folder):
    given = {"learning_rate": 0.02, "lr_scheduler_kwargs": {"min_lr_rate": 0.5}, "weight_decay": 0.3, "seed": 7}
    given |= {"gradient_accumulation_steps": 2, "max_steps": 3, "bad_data": "skip"}
    monkeypatch.chdir(corpus_folder.parent)
    code, first, _ = train({**train.base, **SMALL, **given, "data": corpus_folder.name})
    assert code == 0
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["training_arguments"]["learning_rate"] == 0.02
    assert record["training_arguments"]["adam_beta2"] == 0.95
    monkeypatch.chdir(tmp_path)
    for source in (tmp_path / "run", tmp_path / "run/run.json"):
        code, again, _ = train(None, "--config", str(source), "--output-dir", str(tmp_path / "new"))
        assert code == 0
        assert (again["validation_loss"], again["tokens"]) == (first["validation_loss"], first["tokens"])
        shutil.rmtree(tmp_path / "new")
