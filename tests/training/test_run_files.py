"""run.json and result.json carry a version; older files are read, and unreadable ones are refused in one line."""

import json
from dataclasses import replace

import pytest

from flashmhf.data.config import DataConfig
from flashmhf.errors import InputError
from flashmhf.training.config import TrainConfig
from flashmhf.training.fingerprints import Fingerprints, refused_difference
from flashmhf.training.resuming import check_same_inputs, prepare_output_dir
from flashmhf.training.run_files import (
    TrainResult,
    optimizer_of,
    read_fingerprints,
    read_result,
    read_run,
    write_result,
    write_run,
)
from tiny import train_result

CONFIG = TrainConfig(
    model="flashmhf-tiny",
    data=DataConfig(source="books", context_length=64),
    optimizer="adamw",
    mup_base_width=32,
)

PRINTS = Fingerprints(
    data=((1.0, "1234567890"),),
    tokenizer="abcdefghijkl",
    config={"hidden_size": 32, "gate_type": "sigmoid"},
    weights=None,
    seed=42,
    data_seed=42,
    sequences_per_step=8,
    arguments={"learning_rate": 1e-3, "max_steps": 6},
)


def edit(file, **changes) -> None:
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))


def test_what_is_written_is_read(tmp_path):
    write_run(tmp_path, CONFIG, PRINTS)
    assert read_run(tmp_path) == CONFIG
    assert read_fingerprints(tmp_path) == PRINTS
    assert read_result(tmp_path) is None
    write_result(train_result(tmp_path, tokens_per_second=None))
    assert read_result(tmp_path) == train_result(tmp_path, tokens_per_second=None)
    for file in ("run.json", "result.json"):
        assert json.loads((tmp_path / file).read_text())["version"] == 1
    write_run(tmp_path, CONFIG, PRINTS)
    assert read_result(tmp_path) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": ((1.0, "0987654321"),)}, "expected the data of the earlier run, 1*12345678, got other text, 1*0987"),
        ({"data": ((2.0, "1234567890"),)}, "expected the data of the earlier run, 1*12345678, got other text, 2*1234"),
        ({"tokenizer": "other tokenizer"}, "expected the tokenizer of the earlier run, abcdefgh, got other to"),
        (
            {"config": {"hidden_size": 32, "gate_type": "softmax"}},
            "expected the model of the earlier run, with gate_type 'sigmoid', got 'softmax'",
        ),
        ({"weights": "abc"}, "expected a model with the weights that the earlier run started from, got others"),
        ({"seed": 1}, "expected the seed of the earlier run, 42, got 1"),
        ({"data_seed": 1}, "expected the data_seed of the earlier run, 42, got 1"),
        ({"sequences_per_step": 4}, "expected the sequences_per_step of the earlier run, 8, got 4"),
        (
            {"arguments": {"learning_rate": 1e-2, "max_steps": 6}},
            "expected the learning_rate of the earlier run, 0.001, got 0.01",
        ),
        ({"config": {"hidden_size": 32, "gate_type": "sigmoid", "new in a later version": 1}}, None),
        ({"config": {"hidden_size": 32}}, None),
        ({"arguments": {"learning_rate": 1e-3, "max_steps": 12}}, None),
        ({}, None),
    ],
)
def test_what_makes_another_run_is_named(change, message):
    found = refused_difference(PRINTS, replace(PRINTS, **change))
    assert found == message if message is None else found is not None and found.startswith(message)


def test_a_value_that_may_change_is_logged_and_others_are_refused(tmp_path, caplog):
    write_run(tmp_path, CONFIG, PRINTS)
    (tmp_path / "trainer_state.json").touch()
    check_same_inputs(tmp_path, replace(PRINTS, arguments={"learning_rate": 1e-3, "max_steps": 12}))
    assert "max_steps was 6 before, and is 12 from here on" in caplog.text
    with pytest.raises(InputError, match="resume: expected the seed of the earlier run, 42, got 1"):
        check_same_inputs(tmp_path, replace(PRINTS, seed=1))


def test_another_path_of_the_same_inputs_is_no_difference(tmp_path):
    write_run(tmp_path, CONFIG, PRINTS)
    (tmp_path / "trainer_state.json").touch()
    moved = replace(CONFIG, model="elsewhere/model.json", data=replace(CONFIG.data, source="/mnt/books"))
    assert prepare_output_dir(tmp_path, moved, resume=True) is None


def test_a_run_from_before_the_versions_is_resumed(tmp_path, caplog):
    old = {"model": "flashmhf-tiny", "data": "books", "tokenizer": "bytes", "context_length": 64, "text_column": "text"}
    old |= {"streaming": False, "validation_tokens": 2**19, "document_mask": False, "bad_data": "refuse"}
    (tmp_path / "run.json").write_text(json.dumps(old | {"width_scaled_learning_rate": 32}))
    assert read_run(tmp_path) == CONFIG
    assert prepare_output_dir(tmp_path, CONFIG, resume=True) is None
    (tmp_path / "trainer_state.json").touch()
    check_same_inputs(tmp_path, PRINTS)
    assert "run.json is of an older version: make sure that data and seed are those of then" in caplog.text
    with pytest.raises(InputError, match="resume: expected the mup_base_width of the earlier run, 32, got 64"):
        prepare_output_dir(tmp_path, replace(CONFIG, mup_base_width=64), resume=True)


def test_a_resumed_run_keeps_its_optimizer(tmp_path):
    assert optimizer_of(None, tmp_path, resume=True) == "muon"  # nothing has begun
    write_run(tmp_path, CONFIG, PRINTS)
    assert optimizer_of(None, tmp_path, resume=True) == "adamw"
    assert optimizer_of(None, tmp_path, resume=False) == "muon"
    assert optimizer_of("muon", tmp_path, resume=True) == "muon"  # which the run then refuses
    edit(tmp_path / "run.json", optimizer=...)  # by a version that had AdamW alone
    assert optimizer_of(None, tmp_path, resume=True) == "adamw"


def test_a_result_from_before_the_versions_is_read(tmp_path):
    write_result(train_result(tmp_path))
    edit(tmp_path / "result.json", version=...)
    assert read_result(tmp_path) == train_result(tmp_path)


def test_files_that_cannot_be_read_are_refused_in_one_line(tmp_path):
    write_run(tmp_path, CONFIG, PRINTS)
    write_result(train_result(tmp_path))
    edit(tmp_path / "run.json", version=2)
    edit(tmp_path / "result.json", version="newest")
    with pytest.raises(InputError, match=r"run.json: expected a format version of at most 1, got 2; use a newer"):
        read_run(tmp_path)
    with pytest.raises(InputError, match=r"result.json: expected a format version of at most 1, got 'newest'"):
        read_result(tmp_path)
    edit(tmp_path / "run.json", version=1, model=...)
    edit(tmp_path / "result.json", version=1, steps=...)
    with pytest.raises(InputError, match=r"run.json: expected the model of a training run, got None"):
        read_run(tmp_path)
    with pytest.raises(InputError, match=r"result.json: TrainResult: expected steps, got none; remove the file"):
        read_result(tmp_path)


def test_results_take_only_keywords():
    with pytest.raises(TypeError):
        TrainResult(6)
