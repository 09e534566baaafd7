"""Comparisons: matched parameters, whole results, going on, and refusals."""

import json

import pytest

from flashmhf.accounting import count_parameters
from flashmhf.comparison import Comparison, TrainingFailedError, compare, match_parameters
from flashmhf.errors import InputError
from flashmhf.models import FlashMHFConfig
from flashmhf.models.configuration import FFN_TYPES

FLAGS = ("--max-steps", "4", "--per-device-train-batch-size", "2", "--eval-steps", "2", "--logging-steps", "1")


@pytest.fixture
def settings(corpus_folder, model_file):
    def make(**changes) -> Comparison:
        values = {
            "variants": ("swiglu", "flashmhf"),
            "model": str(model_file),
            "data": str(corpus_folder),
            "tokenizer": "bytes",
            "seeds": (0,),
            "context_length": 64,
            "learning_rates": {},
            "training_flags": FLAGS,
            "validation_tokens": 1024,
        }
        return Comparison(**(values | changes))

    return make


@pytest.mark.parametrize("base", ["flashmhf-tiny", "swiglu-tiny", "flashmhf-370m", "pkv-370m"])
@pytest.mark.parametrize("variant", FFN_TYPES)
def test_parameters_are_matched(base, variant):
    config = FlashMHFConfig.from_preset(base)
    matched = match_parameters(config, variant)
    assert matched.ffn_type == variant
    assert matched.num_hidden_layers == config.num_hidden_layers
    assert count_parameters(matched) == pytest.approx(count_parameters(config), rel=0.01)


def test_scales_are_those_of_the_new_layer():
    base = FlashMHFConfig.from_preset("flashmhf-tiny")
    assert (base.score_scale, base.output_scale) == (4.0, 3.0)
    assert match_parameters(base, "mhffn").output_scale == 1.0
    assert match_parameters(base, "dense_moe").score_scale == 1.0


def test_a_comparison_is_whole_and_goes_on(settings, tmp_path):
    lines = []
    results = compare(settings(), tmp_path / "out", lines.append)
    assert lines == ["run 1 of 2: swiglu, seed 0", "run 2 of 2: flashmhf, seed 0"]
    for name in ("compare.json", "table.md", "results.json", "report.html"):
        assert (tmp_path / "out" / name).stat().st_size > 0
    assert json.loads((tmp_path / "out/results.json").read_text()) == json.loads(json.dumps(results))
    for row in results["variants"]:
        assert row["validation_loss"]["mean"] > 0
    for run in results["runs"]:
        assert [step for step, _ in run["curve"]] == [1, 2, 3, 4]
        assert run["tokens"] == 4 * 2 * 64
    assert set(results["samples"]["continuations"]) == {"swiglu", "flashmhf"}
    assert 2 < results["unigram_entropy_nats"] < 4

    before = (tmp_path / "out/runs/swiglu-seed0/model.safetensors").stat().st_mtime_ns
    (tmp_path / "out/runs/flashmhf-seed0/result.json").unlink()
    again = compare(settings(), tmp_path / "out", lines.append)
    assert (tmp_path / "out/runs/swiglu-seed0/model.safetensors").stat().st_mtime_ns == before
    assert again["runs"][1]["validation_loss"] == pytest.approx(results["runs"][1]["validation_loss"])

    with pytest.raises(InputError, match=r"holds a comparison with seeds .*0.*; got .*1"):
        compare(settings(seeds=(1,)), tmp_path / "out", lines.append)


def test_a_run_that_fails_is_said(settings, tmp_path):
    broken = settings(training_flags=(*FLAGS, "--optim", "adafactor", "--optim-args", "nonsense"))
    with pytest.raises(TrainingFailedError, match="training swiglu with seed 0 failed with exit code"):
        compare(broken, tmp_path / "out", lambda line: None)
    assert not (tmp_path / "out/report.html").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": ("swiglu", "relu")}, "variants: expected some of flashmhf, .*, got 'relu'"),
        ({"variants": ()}, "variants: expected at least one, got none"),
        ({"variants": ("swiglu", "swiglu")}, "variants: expected each once, got swiglu, swiglu"),
        ({"seeds": ()}, "seeds: expected at least one, got none"),
        ({"learning_rates": {"pkv": 1e-3}}, "learning-rate: expected one of the variants swiglu, flashmhf, got 'pkv'"),
    ],
)
def test_settings_that_do_not_fit(settings, changes, message):
    with pytest.raises(InputError, match=message):
        settings(**changes)


def test_a_folder_that_holds_something_else(settings, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"output-dir: expected a new or empty folder, got .* with notes.txt"):
        compare(settings(), tmp_path, lambda line: None)
    with pytest.raises(InputError, match="output-dir: expected a folder, got the file"):
        compare(settings(), tmp_path / "notes.txt", lambda line: None)


def test_sources_by_weight_are_refused(settings):
    with pytest.raises(InputError, match=r"data: expected one SOURCE without a weight, got '1\*a,2\*b'"):
        settings(data="1*a,2*b")
