"""run.json and result.json carry a version; older files are read, and unreadable ones are refused in one line."""

import json
from dataclasses import replace

import pytest

from flashmhf.data.config import DataConfig
from flashmhf.errors import InputError
from flashmhf.training.config import TrainConfig
from flashmhf.training.resuming import prepare_output_dir
from flashmhf.training.run_files import TrainResult, read_result, read_run, write_result, write_run
from tiny import train_result

CONFIG = TrainConfig(model="flashmhf-tiny", data=DataConfig(source="books", context_length=64), mup_base_width=32)


def edit(file, **changes) -> None:
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))


def test_what_is_written_is_read(tmp_path):
    write_run(tmp_path, CONFIG)
    assert read_run(tmp_path) == CONFIG
    assert read_result(tmp_path) is None
    write_result(train_result(tmp_path, tokens_per_second=None))
    assert read_result(tmp_path) == train_result(tmp_path, tokens_per_second=None)
    for file in ("run.json", "result.json"):
        assert json.loads((tmp_path / file).read_text())["version"] == 1
    write_run(tmp_path, CONFIG)
    assert read_result(tmp_path) is None


def test_a_run_from_before_the_versions_is_resumed(tmp_path):
    old = {"model": "flashmhf-tiny", "data": "books", "tokenizer": "bytes", "context_length": 64, "text_column": "text"}
    old |= {"streaming": False, "validation_tokens": 2**19, "document_mask": False, "bad_data": "refuse"}
    (tmp_path / "run.json").write_text(json.dumps(old | {"width_scaled_learning_rate": 32}))
    assert read_run(tmp_path) == CONFIG
    assert prepare_output_dir(tmp_path, CONFIG, resume=True) is None
    with pytest.raises(InputError, match="resume: expected the mup_base_width of the earlier run, 32, got 64"):
        prepare_output_dir(tmp_path, replace(CONFIG, mup_base_width=64), resume=True)


def test_a_result_from_before_the_versions_is_read(tmp_path):
    write_result(train_result(tmp_path))
    edit(tmp_path / "result.json", version=...)
    assert read_result(tmp_path) == train_result(tmp_path)


def test_files_that_cannot_be_read_are_refused_in_one_line(tmp_path):
    write_run(tmp_path, CONFIG)
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
    with pytest.raises(InputError, match=r"result.json: expected the steps of a training run, got none; remove"):
        read_result(tmp_path)


def test_results_take_names_alone():
    with pytest.raises(TypeError):
        TrainResult(6)
