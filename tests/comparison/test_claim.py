"""A comparison's folder: the same settings and inputs go on wherever they lie, others are refused by name."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from flashmhf.comparison import Comparison
from flashmhf.comparison.claim import Inputs, claim
from flashmhf.comparison.run import check_same_data
from flashmhf.data.config import DataConfig
from flashmhf.errors import InputError, RunError
from flashmhf.files import read_json, write_json
from flashmhf.training.config import TrainConfig
from flashmhf.training.fingerprints import Fingerprints
from flashmhf.training.run_files import write_run

DATA = DataConfig(source="books", context_length=64)
SETTINGS = Comparison(
    variants=("swiglu",), models=("a.json", "b.json"), seeds=(0,), train=TrainConfig(model="", data=DATA)
)
MODELS = ({"hidden_size": 32, "gate_type": "sigmoid"}, {"hidden_size": 64})
INPUTS = Inputs(data="1234567890", tokenizer="abcdefghijkl", models=MODELS)


def with_data(**changes) -> Comparison:
    return replace(SETTINGS, train=replace(SETTINGS.train, data=replace(DATA, **changes)))


@pytest.mark.parametrize(
    "settings",
    [
        SETTINGS,
        with_data(source="/mnt/elsewhere/books"),
        with_data(tokenizer="/mnt/elsewhere/tokenizer"),
        replace(SETTINGS, models=("/mnt/elsewhere/a.json", "b.json")),
        replace(SETTINGS, seeds=(0, 1)),
        replace(SETTINGS, variants=("swiglu", "flashmhf"), ablations={"gate-type": ("none",)}),
    ],
)
def test_the_same_comparison_goes_on(tmp_path, settings):
    claim(tmp_path, SETTINGS, INPUTS)
    claim(tmp_path, settings, INPUTS)


@pytest.mark.parametrize(
    ("settings", "inputs", "message"),
    [
        (SETTINGS, replace(INPUTS, data="other"), r"a comparison of other text: data 12345678; got other"),
        (SETTINGS, replace(INPUTS, tokenizer="other"), r"a comparison with another tokenizer, abcdefgh; got other"),
        (
            SETTINGS,
            replace(INPUTS, models=(MODELS[0], {"hidden_size": 128})),
            r"a comparison of a model with hidden_size 64; got 128",
        ),
        (replace(SETTINGS, models=("a.json",)), INPUTS, r"a comparison with models \['a.json', 'b.json'\]; got"),
        (with_data(context_length=32), INPUTS, r"a comparison with train.data.context_length 64; got 32"),
        (replace(SETTINGS, seeds=(1,)), INPUTS, r"a comparison with seeds \[0\]; got \[1\]"),
        (replace(SETTINGS, match="flops"), INPUTS, r"a comparison with match 'parameters'; got 'flops'"),
    ],
)
def test_another_comparison_is_refused_by_name(tmp_path, settings, inputs, message):
    claim(tmp_path, SETTINGS, INPUTS)
    before = (tmp_path / SETTINGS.settings_file).read_text()
    with pytest.raises(InputError, match=rf"output-dir: .* holds {message}"):
        claim(tmp_path, settings, inputs)
    assert (tmp_path / SETTINGS.settings_file).read_text() == before


def test_a_comparison_without_recorded_inputs_goes_on_with_a_line(tmp_path, caplog):
    claim(tmp_path, SETTINGS, INPUTS)
    old = {name: value for name, value in read_json(tmp_path / SETTINGS.settings_file).items() if name != "inputs"}
    write_json(tmp_path / SETTINGS.settings_file, old)
    with pytest.raises(InputError, match=r"holds a comparison with train.data.source 'books'; got 'other'"):
        claim(tmp_path, with_data(source="other"), INPUTS)
    claim(tmp_path, SETTINGS, INPUTS)
    assert "compare.json is of an older version: make sure that data and models are those of then" in caplog.text


def test_a_comparison_of_a_version_without_muon_is_one_with_adamw(tmp_path):
    claim(tmp_path, SETTINGS, INPUTS)
    old = read_json(tmp_path / SETTINGS.settings_file)
    del old["train"]["optimizer"]
    write_json(tmp_path / SETTINGS.settings_file, old)
    with pytest.raises(InputError, match=r"holds a comparison with train.optimizer 'adamw'; got 'muon'"):
        claim(tmp_path, SETTINGS, INPUTS)
    claim(tmp_path, replace(SETTINGS, train=replace(SETTINGS.train, optimizer="adamw")), INPUTS)


@pytest.mark.parametrize("inputs", [7, {}, {"data": 1, "tokenizer": "a", "models": []}, [], "text"])
def test_inputs_that_cannot_be_read_are_named(tmp_path, inputs):
    claim(tmp_path, SETTINGS, INPUTS)
    write_json(tmp_path / SETTINGS.settings_file, read_json(tmp_path / SETTINGS.settings_file) | {"inputs": inputs})
    with pytest.raises(InputError, match=r"compare\.json: Inputs"):
        claim(tmp_path, SETTINGS, INPUTS)


def test_a_run_that_read_other_text_is_named(tmp_path):
    """The files changed after the comparison had read them."""
    prints = Fingerprints(
        data=((1.0, "of the run"),),
        tokenizer="",
        config={},
        weights=None,
        seed=0,
        data_seed=0,
        sequences_per_step=1,
        arguments={},
    )
    write_run(tmp_path, SETTINGS.train, prints)
    run: Any = SimpleNamespace(folder=tmp_path, finished=True, label="swiglu, seed 0")
    corpus: Any = SimpleNamespace(fingerprint="of the run")
    check_same_data([run], corpus)
    corpus.fingerprint = "of the comparison"
    with pytest.raises(RunError, match="files that do not change between runs, but swiglu, seed 0 read other"):
        check_same_data([run], corpus)
