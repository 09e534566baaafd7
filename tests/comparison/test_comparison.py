"""Comparisons: matched parameters, complete results, resuming, and refusals."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from datasets import Dataset

from flashmhf.comparison import Comparison, compare, read_comparison
from flashmhf.comparison.evaluate import HeldOut, read_evaluation
from flashmhf.comparison.launcher import _share
from flashmhf.comparison.matching import match
from flashmhf.comparison.plan import Plan
from flashmhf.comparison.results import RESULTS_FILE
from flashmhf.comparison.scoring import SCORING_PER_TRAINING, START_FLOPS, count_processes
from flashmhf.comparison.settings import Variant
from flashmhf.comparison.summary import run_result
from flashmhf.data.config import DataConfig
from flashmhf.data.tokenizer import load_tokenizer
from flashmhf.errors import InputError, RunError
from flashmhf.estimates.cost import count_parameters, model_cost
from flashmhf.models import FlashMHFConfig
from flashmhf.models.configuration import FFN_TYPES
from flashmhf.models.loading import load_model
from flashmhf.reports.comparison import write_files
from flashmhf.training.config import TrainConfig
from flashmhf.training.instability import Instability
from flashmhf.training.run_files import write_result
from tiny import train_result

FLAGS = ("--max-steps", "4", "--per-device-train-batch-size", "2", "--eval-steps", "2")


@pytest.fixture
def settings(corpus_folder, model_file):
    def make(**changes) -> Comparison:
        values = {
            "variants": ("swiglu", "flashmhf"),
            "models": (str(model_file),),
            "training_flags": FLAGS,
            "seeds": (0,),
        }
        data = {"source": str(corpus_folder), "context_length": 64, "validation_tokens": 1024}
        of_data = {name: changes.pop(name) for name in ("source", "tokenizer", "context_length") if name in changes}
        train = TrainConfig(model="", data=DataConfig(**(data | of_data)))
        return Comparison(train=train, **(values | changes))

    return make


@pytest.mark.parametrize("base", ["flashmhf-tiny", "swiglu-tiny", "flashmhf-370m", "pkv-370m"])
@pytest.mark.parametrize("variant", FFN_TYPES)
def test_parameters_are_matched(base, variant):
    config = FlashMHFConfig.from_preset(base)
    matched = match(config, Variant(variant))
    assert matched.ffn_type == variant
    assert matched.num_hidden_layers == config.num_hidden_layers
    assert count_parameters(matched) == pytest.approx(count_parameters(config), rel=0.01)


def test_scales_are_those_of_the_new_layer():
    base = FlashMHFConfig.from_preset("flashmhf-tiny")
    assert (base.score_scale, base.output_scale) == (2.0, 3.0)
    assert match(base, Variant("mhffn")).output_scale == 1.0
    assert match(base, Variant("dense_moe")).score_scale == 1.0


def test_a_comparison_is_complete_and_can_be_resumed_and_extended(settings, tmp_path):
    lines = []
    result = compare(settings(), tmp_path / "out", lines.append)
    assert lines == [
        "run 1 of 2: swiglu, seed 0",
        "run 2 of 2: flashmhf, seed 0",
        "evaluated swiglu, seed 0",
        "evaluated flashmhf, seed 0",
    ]
    assert read_comparison(tmp_path / "out" / RESULTS_FILE) == result
    for row in result.variants:
        assert row.validation_loss.mean > 0
        assert {row.parameters} == {run.parameters for run in result.runs if run.variant == row.variant}
    for run in result.runs:
        assert run.curve.steps == (1, 2, 3, 4)
        assert len(run.curve.losses) == len(run.curve.elapsed_s) == 4
        assert run.tokens == 4 * 2 * 64
    assert set(result.samples.continuations) == {"swiglu", "flashmhf"}
    assert result.gates["swiglu"] == ()
    assert all(0 < gate.entropy <= 1 for gate in result.gates["flashmhf"])
    assert 2 < result.unigram_entropy_nats < 4

    before = (tmp_path / "out/runs/swiglu-seed0/model.safetensors").stat().st_mtime_ns
    (tmp_path / "out/runs/flashmhf-seed0/result.json").unlink()
    (tmp_path / "out").rename(tmp_path / "moved")
    again = compare(settings(), tmp_path / "moved", lines.append)
    (tmp_path / "moved").rename(tmp_path / "out")
    assert (tmp_path / "out/runs/swiglu-seed0/model.safetensors").stat().st_mtime_ns == before
    assert again.runs[1].validation_loss == pytest.approx(result.runs[1].validation_loss)

    with pytest.raises(InputError, match=r"holds a comparison with seeds .*0.*; got .*1"):
        compare(settings(seeds=(1,)), tmp_path / "out", lines.append)

    lines.clear()
    grown = compare(settings(seeds=(0, 1), variants=("swiglu", "flashmhf", "mhffn")), tmp_path / "out", lines.append)
    assert sum(line.startswith("run ") for line in lines) == 4
    assert (tmp_path / "out/runs/swiglu-seed0/model.safetensors").stat().st_mtime_ns == before
    assert len(grown.runs) == 6
    assert {row.variant: len(row.validation_loss.values) for row in grown.variants} == {
        "swiglu": 2, "flashmhf": 2, "mhffn": 2,
    }  # fmt: skip
    with pytest.raises(InputError, match="holds a comparison with variants"):
        compare(settings(seeds=(0, 1)), tmp_path / "out", lines.append)


def test_without_a_finished_run_there_is_no_result(settings, tmp_path):
    broken = settings(training_flags=(*FLAGS, "--optim", "adafactor", "--optim-args", "nonsense"))
    with pytest.raises(RunError, match=r"training failed in every run; .*swiglu-seed0.log has the reason"):
        compare(broken, tmp_path / "out", lambda line: None, jobs=2)
    assert "optim-args: expected name=value" in (tmp_path / "out/runs/swiglu-seed0.log").read_text()
    assert not (tmp_path / "out" / RESULTS_FILE).exists()


def test_a_run_that_failed_is_named_and_in_no_mean(settings, tmp_path):
    compare(settings(), tmp_path / "out", lambda line: None, jobs=2)
    folder = tmp_path / "out/runs/flashmhf-seed0"
    (folder / "result.json").unlink()
    (folder / "run.json").write_text("{}")  # it cannot be resumed
    result = compare(settings(), tmp_path / "out", lambda line: None, jobs=2)
    assert [run.status for run in result.runs] == ["finished", "failed"]
    row = next(row for row in result.variants if row.variant == "flashmhf")
    assert (row.failed_seeds, row.validation_loss.mean, row.documents.number) == ((0,), None, None)


def test_a_run_on_the_edge_of_divergence_is_known_even_if_it_failed(settings, tmp_path):
    run = Plan(settings(), tmp_path).final()[0]
    found = Instability(step=2, kind="loss", found="it rises")
    run.folder.mkdir(parents=True)
    rows = {"start": 0, "time": 0.0}, {"time": 1.0, **found.as_row()}
    (run.folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert (run_result(run).status, run_result(run).instabilities) == ("failed", (found,))
    finish(run, 2.0)
    assert (run_result(run).status, run_result(run).instabilities) == ("finished", (found,))


def finish(run, loss: float) -> None:
    write_result(train_result(run.folder, validation_loss=loss))


def test_each_variant_takes_its_best_learning_rate(settings, tmp_path):
    rates = {"swiglu": (1e-3, 2e-3), "flashmhf": (1e-3, 2e-3)}
    plan = Plan(settings(learning_rates=rates, seeds=(3, 4), ablations={"gate-type": ("none",)}), tmp_path)
    assert [(run.variant.name, run.learning_rate, run.seed) for run in plan.sweep()] == [
        ("swiglu", 1e-3, 3), ("swiglu", 2e-3, 3), ("flashmhf", 1e-3, 3), ("flashmhf", 2e-3, 3),
    ]  # fmt: skip
    for run, loss in zip(plan.sweep(), (2.0, 3.0, 2.0, 1.0), strict=True):
        finish(run, loss)
    assert [(run.variant.name, run.learning_rate, run.seed) for run in plan.final()] == [
        ("swiglu", 1e-3, 3), ("flashmhf", 2e-3, 3), ("flashmhf", 2e-3, 4), ("swiglu", 1e-3, 4),
        ("flashmhf-gate-type-none", 2e-3, 3), ("flashmhf-gate-type-none", 2e-3, 4),
    ]  # fmt: skip
    assert [run.finished for run in plan.final()] == [True, True, False, False, False, False]


@pytest.mark.parametrize(
    ("ablation", "expected"),
    [
        (("gate-type", "none"), {"gate_type": None}),
        (("gate-type", "softmax"), {"gate_type": "softmax"}),
        (("q-norm", "off"), {"q_norm": False}),
        (("projections", "off"), {"ffn_projections": False}),
        (("head-dim", "32"), {"num_ffn_heads": 8, "num_ffn_kv_heads": 8, "score_scale": 8.0}),
        (("subnetworks", "6"), {"num_subnetworks": 6, "output_scale": 6.0}),
    ],
)
def test_an_ablation_changes_one_thing_and_keeps_the_size(ablation, expected):
    base = FlashMHFConfig.from_preset("flashmhf-tiny")
    config = match(base, Variant("flashmhf", ablation))
    assert {name: getattr(config, name) for name in expected} == expected
    assert count_parameters(config) == pytest.approx(count_parameters(base), rel=0.01)


def test_flops_can_be_matched_instead():
    base = FlashMHFConfig.from_preset("flashmhf-tiny")
    config = match(base, Variant("swiglu"), by="flops", context_length=256)
    ours, theirs = (model_cost(c, 256).forward_flops_per_token for c in (base, config))
    assert theirs == pytest.approx(ours, rel=0.01)


@pytest.mark.parametrize(("base", "other", "layers"), [("flashmhf-1.3b", "swiglu", 24), ("swiglu-1.3b", "mhffn", 20)])
def test_the_papers_depths(base, other, layers):
    config = FlashMHFConfig.from_preset(base)
    matched = match(config, Variant(other), depth="paper")
    assert matched.num_hidden_layers == layers
    assert count_parameters(matched) == pytest.approx(count_parameters(config), rel=0.01)
    assert match(config, Variant(config.ffn_type), depth="paper") is config


def test_several_backbones(settings, tmp_path):
    plan = Plan(settings(models=("flashmhf-tiny", "flashmhf-128m")), tmp_path)
    assert [variant.name for variant in plan.variants] == [
        "flashmhf-tiny-swiglu", "flashmhf-tiny-flashmhf", "flashmhf-128m-swiglu", "flashmhf-128m-flashmhf",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": ("swiglu", "relu")}, "variants: expected some of flashmhf, .*, got 'relu'"),
        ({"variants": ()}, "variants: expected at least one, got none"),
        ({"variants": ("swiglu", "swiglu")}, "variants: expected each once, got swiglu, swiglu"),
        ({"seeds": ()}, "seeds: expected at least one, got none"),
        ({"models": ()}, "model: expected at least one, got none"),
        ({"ablations": {"gate-type": ("none", "none")}}, "gate-type: expected each once, got none, none"),
        (
            {"learning_rates": {"swiglu": (1e-3, 0.001)}},
            "learning-rate of swiglu: expected each once, got 0.001, 0.001",
        ),
        ({"match": "bytes"}, "match: expected parameters or flops, got 'bytes'"),
        ({"depth": "deep"}, "depth: expected same or paper, got 'deep'"),
        ({"ablations": {"gate-type": ("relu",)}}, "gate-type: expected some of sigmoid, softmax, none, got 'relu'"),
        ({"ablations": {"head-dim": ("0",)}}, "head-dim: expected positive whole numbers, got '0'"),
        (
            {"variants": ("swiglu",), "ablations": {"gate-type": ("none",)}},
            "gate-type: expected flashmhf among the variants, got swiglu",
        ),
        (
            {"learning_rates": {"pkv": (1e-3,)}},
            "learning-rate: expected one of the variants swiglu, flashmhf, got 'pkv'",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, changes, message):
    with pytest.raises(InputError, match=message):
        settings(**changes)


def test_a_folder_that_holds_something_else_is_refused(settings, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"output-dir: expected a new or empty folder, got .* with notes.txt"):
        compare(settings(), tmp_path, lambda line: None)
    with pytest.raises(InputError, match="output-dir: expected a folder, got the file"):
        compare(settings(), tmp_path / "notes.txt", lambda line: None)


def test_sources_by_weight_are_refused(settings):
    with pytest.raises(InputError, match=r"data: expected one SOURCE without a weight, got '1\*a,2\*b'"):
        settings(source="1*a,2*b")


def test_a_head_dim_that_does_not_divide_the_width_is_refused(settings, tmp_path):
    with pytest.raises(InputError, match="head-dim: expected a divisor of the hidden size 32, got 48"):
        compare(settings(ablations={"head-dim": ("48",)}), tmp_path / "out", lambda line: None)
    assert not (tmp_path / "out").exists()


def test_ablations_keep_scales_that_were_set():
    base = FlashMHFConfig.from_preset("flashmhf-tiny", score_scale=3.0)
    config = match(base, Variant("flashmhf", ("subnetworks", "6")))
    assert (config.score_scale, config.gate_scale, config.output_scale) == (3.0, 2.0, 6.0)
    assert match(base, Variant("mhffn")).score_scale == 2.0


def test_models_with_the_same_name_or_without_subnetworks_are_refused(settings, model_file, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "model.json").write_text(model_file.read_text())
    files = tuple(str(tmp_path / folder / "model.json") for folder in ("a", "b"))
    with pytest.raises(InputError, match=r"model: expected names that differ, got .*a/model.json, .*b/model.json"):
        Plan(settings(models=files), tmp_path)
    with pytest.raises(InputError, match="sub-networks and norm flashmhf takes over, got swiglu-tiny of swiglu"):
        Plan(settings(models=("swiglu-tiny",)), tmp_path)
    assert Plan(settings(models=("swiglu-tiny",), variants=("swiglu", "mhffn")), tmp_path).variants


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "nowhere/at all"}, "data: expected stdlib, a file, a folder or a dataset on the Hub"),
        ({"tokenizer": "nothing here"}, "tokenizer: "),
        ({"context_length": 4096}, "context-length: expected 2 to the model's 128, got 4096"),
        (
            {"context_length": 128, "models": ("flashmhf-tiny",), "source": "short.txt"},
            "data: expected at least 128 tokens",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_a_folder_is_claimed(settings, changes, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("Too short a text for one block.")
    with pytest.raises(InputError, match=message):
        compare(settings(**changes), tmp_path / "out", lambda line: None)
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_not_finite_is_left_out(settings, tmp_path):
    compare(settings(), tmp_path / "out", lambda line: None)
    folder = tmp_path / "out/runs/flashmhf-seed0"
    (folder / "evaluation.json").unlink()
    model = load_model(str(folder))
    torch.nn.init.constant_(model.get_input_embeddings().weight, torch.nan)
    model.save_pretrained(folder)
    result = compare(settings(), tmp_path / "out", lambda line: None)
    row = next(row for row in result.variants if row.variant == "flashmhf")
    assert (row.documents.nats_per_token.mean, row.difference) == (None, None)
    assert set(result.samples.continuations) == {"swiglu"}
    page, _ = write_files(result, tmp_path)
    assert "flashmhf against swiglu: no verdict, since no seed of both finished." in page.read_text()


def test_several_processes_find_the_same(settings, tmp_path, monkeypatch):
    result = compare(settings(), tmp_path / "out", lambda line: None)
    evaluations = [tmp_path / f"out/runs/{name}-seed0/evaluation.json" for name in ("swiglu", "flashmhf")]
    before = [read_evaluation(file.parent) for file in evaluations]
    for file in evaluations:
        file.unlink()
    monkeypatch.setattr("flashmhf.comparison.scoring.count_processes", lambda *arguments: 2)
    lines = []
    assert compare(settings(), tmp_path / "out", lines.append) == result
    assert lines == ["evaluated swiglu, seed 0", "evaluated flashmhf, seed 0"]
    assert [read_evaluation(file.parent) for file in evaluations] == before


def test_there_are_as_many_processes_as_are_worth_their_start(settings, tmp_path, monkeypatch):
    plan = Plan(settings(seeds=(0, 1, 2)), tmp_path)
    documents = Dataset.from_dict({"text": ["a document " * 1000], "origin": ["a file"]})
    held_out = HeldOut.of(plan.settings, documents, load_tokenizer("bytes"))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert count_processes(plan.final(), held_out, 1) == 1
    monkeypatch.setitem(START_FLOPS, "cpu", 1e3)
    assert count_processes(plan.final(), held_out, 1) == 4
    assert count_processes(plan.final()[:3], held_out, 1) == 3
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    assert count_processes(plan.final(), held_out, 1) == SCORING_PER_TRAINING  # memory
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setitem(START_FLOPS, "cuda", 1e3)
    assert count_processes(plan.final(), held_out, 1) == 2


def test_a_comparison_by_another_version_is_refused(settings, tmp_path):
    (tmp_path / "compare.json").write_text('{"variants": ["swiglu"]}')
    with pytest.raises(
        InputError, match=r"output-dir: expected version 1 of .*compare.json, got none; a comparison by"
    ):
        compare(settings(), tmp_path, lambda line: None)


def test_visible_gpus_are_shared_among_runs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [_share({"CUDA_VISIBLE_DEVICES": "5,GPU-7"}, slot, 3)["CUDA_VISIBLE_DEVICES"] for slot in (0, 1, 2)] == [
        "5", "GPU-7", "5",
    ]  # fmt: skip
    assert _share({}, 1, 2) == {"CUDA_VISIBLE_DEVICES": "1"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.slow
def test_a_signal_ends_all_runs_with_a_checkpoint(number, corpus_folder, model_file, tmp_path):
    """The complete process group receives it, as from a terminal."""
    flags = ["--max-steps", "100000", "--per-device-train-batch-size", "2", "--jobs", "2"]
    flags += ["--eval-strategy", "no", "--save-strategy", "no"]
    command = [sys.executable, "-m", "flashmhf", "compare", "--model", str(model_file), "--data", str(corpus_folder)]
    command += ["--context-length", "64", "--output-dir", str(tmp_path / "out"), *flags]
    folders = [tmp_path / "out/runs" / name for name in ("swiglu-seed0", "flashmhf-seed0")]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    while not all((folder / "log.jsonl").exists() for folder in folders):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.2)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + number, errors
    name = signal.Signals(number).name
    again = f"continue with: python -m flashmhf compare --output-dir {tmp_path / 'out'} --jobs 2"
    assert errors.splitlines()[-1] == f"flashmhf: {name}; {again}"
    assert "--resume" not in errors
    for folder in folders:
        assert [path.name for path in folder.glob("checkpoint-*")], errors
        assert not (folder / ".lock").exists()
        assert not (folder / "result.json").exists()
    assert not (tmp_path / "out/report.html").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.slow
def test_scoring_processes_end_with_their_parent(number, tmp_path):
    """The parent receives a signal while both processes wait for work."""
    code = """
        import os, signal, sys, time
        from datasets import Dataset
        from flashmhf.comparison import scoring
        from flashmhf.comparison.evaluate import HeldOut
        from flashmhf.data.tokenizer import load_tokenizer
        from flashmhf.evaluation import TokenizedDocuments

        if __name__ == "__main__":
            tokenizer = load_tokenizer("bytes")
            documents = TokenizedDocuments.of(Dataset.from_dict({"text": ["a text"]}), tokenizer)
            held_out = HeldOut(documents=documents, tokenizer="bytes", context_length=8, prompt="a", new_tokens=1)
            with scoring.signals_interrupt(), scoring._processes(held_out, 2) as score:
                try:
                    list(score(["no such folder"] * 2, [False] * 2))
                except ValueError:
                    print(*(child.pid for child in scoring.multiprocessing.active_children()), flush=True)
                time.sleep(60)
    """
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(code))
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    children = [int(word) for word in parent.stdout.readline().split()]
    assert len(children) == 2, parent.stderr.read()
    parent.send_signal(number)
    assert parent.wait(timeout=60) != 0
    deadline = time.monotonic() + 30
    while any(os.path.exists(f"/proc/{child}") for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.1)
