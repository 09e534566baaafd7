"""Every file of a comparison's folder, unreadable in every way: one line that names it, or what it held again."""

import shutil
from pathlib import Path

import pytest

from damage import DAMAGES, assert_one_line, wrong_values
from flashmhf.comparison import Comparison, compare, read_comparison
from flashmhf.comparison.claim import SETTINGS_FILE, Inputs, claim
from flashmhf.comparison.evaluate import read_evaluation
from flashmhf.comparison.results import RESULTS_FILE
from flashmhf.data.config import DataConfig
from flashmhf.errors import InputError, RunError
from flashmhf.files import write_json
from flashmhf.training.config import TrainConfig

RUN = "runs/swiglu-seed0"
FILES = ("compare.json", RESULTS_FILE, "configs/swiglu.json", f"{RUN}.json", f"{RUN}/evaluation.json")
OF_RUN = (f"{RUN}/run.json", f"{RUN}/result.json", f"{RUN}/log.jsonl", f"{RUN}/config.json", f"{RUN}/model.safetensors")


@pytest.fixture(scope="module")
def settings(corpus_folder, model_file) -> Comparison:
    data = DataConfig(source=str(corpus_folder), context_length=32, validation_tokens=64)
    return Comparison(
        variants=("swiglu",),
        models=(str(model_file),),
        train=TrainConfig(model="", data=data),
        training_flags=("--max-steps", "2", "--per-device-train-batch-size", "2", "--eval-strategy", "no"),
        seeds=(0,),
        document_bytes=64,
    )


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("comparisons") / "finished"
    compare(settings, folder, lambda line: None)
    return folder


def restore(finished: Path, folder: Path, name: str) -> None:
    file = folder / name
    if file.is_dir():
        file.rmdir()
    file.unlink(missing_ok=True)
    if (finished / name).exists():
        shutil.copy2(finished / name, file)


@pytest.mark.parametrize("name", [*FILES, *OF_RUN])
@pytest.mark.slow
def test_the_same_command_again(settings, finished, tmp_path, name):
    folder = Path(shutil.copytree(finished, tmp_path / "out"))
    for damage, apply in DAMAGES.items():
        if not (folder / name).exists():
            (folder / name).touch()
        apply(folder / name)
        message = assert_one_line(
            f"{name}, {damage}",
            lambda: compare(settings, folder, lambda line: None, jobs=2),
            (InputError, RunError, OSError),
        )
        assert message is None or Path(name).name in message or "in every run" in message, (damage, message)
        restore(finished, folder, name)


def test_settings_of_a_wrong_type(settings, finished, tmp_path):
    inputs = Inputs(data="", tokenizer="", models=())
    for what, content in wrong_values(finished / SETTINGS_FILE):
        write_json(tmp_path / SETTINGS_FILE, content)
        assert_one_line(what, lambda: claim(tmp_path, settings, inputs), (InputError,))


def test_results_of_a_wrong_type(finished, tmp_path):
    for what, content in wrong_values(finished / RESULTS_FILE):
        write_json(tmp_path / RESULTS_FILE, content)
        assert_one_line(what, lambda: read_comparison(tmp_path / RESULTS_FILE), (InputError,))


def test_an_evaluation_that_cannot_be_read_is_computed_again(tmp_path, caplog):
    assert read_evaluation(tmp_path) is None
    for content in ("{", "[]", '{"nats_per_token": "low"}'):
        (tmp_path / "evaluation.json").write_text(content)
        assert read_evaluation(tmp_path) is None
        assert "evaluation.json is computed again" in caplog.messages[-1]
