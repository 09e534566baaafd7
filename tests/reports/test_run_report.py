"""Pages of comparisons and runs: one file each, which shows what the results contain."""

import html.parser
import json
from dataclasses import replace

import pytest
from jinja2 import UndefinedError

from flashmhf.cli import app
from flashmhf.comparison.results import (
    ComparisonResult,
    Curve,
    Differences,
    DocumentsResult,
    GateUsage,
    RunResult,
    Samples,
    Spread,
    SweepResult,
    VariantResult,
    read_comparison,
    write_comparison,
)
from flashmhf.comparison.settings import Comparison
from flashmhf.data.config import DataConfig
from flashmhf.errors import InputError
from flashmhf.evaluation.differences import Difference
from flashmhf.reports.comparison import markdown_table, write_report
from flashmhf.reports.run import write_run_report
from flashmhf.training.config import TrainConfig


def spread(*values: float) -> Spread:
    return Spread(mean=sum(values) / len(values), standard_deviation=0.01 if len(values) > 1 else None, values=values)


def differences(mean: float, low: float, high: float) -> Differences:
    def difference(measure: str) -> Difference:
        return Difference(measure=measure, mean=mean, interval=(low, high), documents=5, runs=2)

    return Differences(nats_per_token=difference("nats_per_token"), bits_per_byte=difference("bits_per_byte"))


def variant_result(name: str, loss: float) -> VariantResult:
    return VariantResult(
        variant=name,
        ffn_type=name,
        model="flashmhf-tiny",
        ablation=None,
        parameters=1234567,
        forward_flops_per_token=7.7e6,
        layers=4,
        intermediate_size=576,
        learning_rate=None,
        failed_seeds=(),
        validation_loss=spread(loss, loss + 0.02),
        bits_per_byte=spread(loss * 1.44, loss * 1.45),
        tokens_per_second=spread(4321.0),
        peak_memory_mib=spread(888.0),
        elapsed_s=spread(60.0),
        documents=DocumentsResult(nats_per_token=loss + 0.1, values=(loss + 0.1,), number=5),
        difference=None if name == "swiglu" else differences(-0.1, -0.15, -0.05),
        effect=None,
    )


def run_result(name: str, seed: int, loss: float) -> RunResult:
    steps = tuple(range(1, 101, 10))
    return RunResult(
        variant=name,
        ffn_type=name,
        model="flashmhf-tiny",
        seed=seed,
        learning_rate=None,
        folder=f"{name}-seed{seed}",
        status="finished",
        tokens=409600,
        curve=Curve(
            steps=steps, losses=tuple(5.0 - step / 50 for step in steps), elapsed_s=tuple(step * 0.5 for step in steps)
        ),
        validation_curve=Curve(steps=(50, 100), losses=(3.0, loss), elapsed_s=(25.0, 50.0)),
    )


def result(**changes) -> ComparisonResult:
    """A comparison of two layers with two seeds."""
    data = DataConfig(source="<script>alert(1)</script>", context_length=512)
    values = {
        "settings": Comparison(
            variants=("swiglu", "flashmhf"),
            models=("flashmhf-tiny",),
            train=TrainConfig(model="", data=data),
            seeds=(0, 1),
        ),
        "jobs": 2,
        "unigram_entropy_nats": 3.2,
        "sweep": (SweepResult(variant="swiglu", seed=0, learning_rate=1e-3, validation_loss=1.7, chosen=True),),
        "variants": (variant_result("swiglu", 1.7), variant_result("flashmhf", 1.6)),
        "gates": {"swiglu": (), "flashmhf": (GateUsage(layer=0, head=0, entropy=0.875, load=0.99),)},
        "runs": tuple(run_result(n, s, loss) for n, loss in (("swiglu", 1.7), ("flashmhf", 1.6)) for s in (0, 1)),
        "samples": Samples(prompt="def <b>", continuations={"swiglu": "x & y", "flashmhf": "</pre>z"}),
    }
    return ComparisonResult(**(values | changes))


class Collector(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


def test_the_page_shows_all_results_and_loads_nothing(tmp_path):
    write_report(result(), tmp_path / "report.html")
    page = Collector()
    page.feed((tmp_path / "report.html").read_text())
    assert page.tags.count("svg") == 9
    assert "script" not in page.tags
    assert "viewport" in dict(page.attributes).values()
    links = [value for name, value in page.attributes if name in ("src", "href", "xlink:href") and value]
    assert all(value.startswith(("#", "data:image/png;")) for value in links)
    for expected in (
        "1,234,567",
        "1.610 ± 0.010",
        "4,321",
        "unigram entropy",
        "flashmhf: better than swiglu (-0.100 [-0.150, -0.050])",
        "0.875 to 0.875",
        "def <b>",
        "</pre>z",
        "<script>alert(1)",
    ):
        assert expected in page.text
    assert list(tmp_path.iterdir()) == [tmp_path / "report.html"]


def test_the_table_is_sorted_by_loss():
    header, rule, first, second, _, note = markdown_table(result()).splitlines()
    assert "the first 65,536 bytes of each of 5" in note
    assert "Student's t over 2 seeds" in note
    assert header.startswith("| FFN | validation loss")
    assert set(rule) <= set("|-: ")
    assert first.startswith(
        "| flashmhf | 1.610 ± 0.010 | 1.700 | -0.100 [-0.150, -0.050] | 2.312 ± 0.010 | 1,234,567 | 7.7 | 4 | 576 |"
    )
    assert second.startswith("| swiglu |")


def test_ablations_are_compared_with_what_they_change(tmp_path):
    swiglu, flashmhf = result().variants
    gate, norm = ("gate-type", "none"), ("q-norm", "off")
    ablated = result(
        variants=(
            swiglu,
            flashmhf,
            replace(flashmhf, variant="no gate", ablation=gate, effect=differences(0.02, 0.01, 0.03)),
            replace(flashmhf, variant="no norm", ablation=norm, effect=None),
        )
    )
    assert markdown_table(ablated).splitlines()[-2:] == [
        "| gate-type none | +0.020 [+0.010, +0.030] | worse than flashmhf |",
        "| q-norm off |  | not decided |",
    ]
    write_report(ablated, tmp_path / "report.html")
    assert "+0.020 [+0.010, +0.030]" in (tmp_path / "report.html").read_text()


def test_one_seed_has_no_spread():
    swiglu, flashmhf = result().variants
    one = replace(swiglu, validation_loss=spread(1.71))
    assert "| 1.710 |" in markdown_table(result(variants=(one, flashmhf)))


def test_runs_that_failed_are_named(tmp_path):
    swiglu, flashmhf = result().variants
    first, second, *others = result().runs
    failed = result(
        variants=(replace(swiglu, validation_loss=Spread(mean=None, standard_deviation=None, values=())), flashmhf),
        runs=(first, replace(second, status="failed", tokens=None, curve=Curve(), validation_curve=Curve()), *others),
    )
    table = markdown_table(failed)
    assert table.splitlines()[3].startswith("| swiglu | failed |")
    assert table.endswith("These runs failed and are in no mean: swiglu with seed 1.")
    write_report(failed, tmp_path / "report.html")
    assert "swiglu with seed 1" in (tmp_path / "report.html").read_text()


def test_a_power_law_requires_three_sizes(tmp_path):
    swiglu, flashmhf = result().variants
    sized = [
        replace(swiglu, parameters=10 ** (6 + i), validation_loss=spread(4.0 * 10.0 ** (-0.05 * i))) for i in range(3)
    ]
    write_report(result(variants=(*sized, flashmhf)), tmp_path / "report.html")
    assert "<!-- swiglu: size^-0.050 -->" in (tmp_path / "report.html").read_text()


def log_lines(folder, *lines):
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text('{"model": "flashmhf-tiny", "data": "books"}')
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_page_of_a_run(tmp_path):
    speed = {"tokens_per_second": 1000.0, "memory_mib": 512.0}
    log_lines(
        tmp_path,
        {"start": 0, "time": 0.0},
        *({"step": step, "time": float(step), "loss": 5.0 - step / 10, **speed} for step in range(1, 20)),
        {"start": 10, "time": 100.0},
        *({"step": step, "time": 90.0 + step, "loss": 5.0 - step / 10, **speed} for step in range(11, 31)),
        {"step": 30, "time": 121.0, "eval_loss": 2.5},
    )
    summary = write_run_report(tmp_path, tmp_path / "page.html")
    assert (summary.starts, summary.lost_steps, summary.steps) == (2, 9, 30)
    assert (summary.validation_loss, summary.tokens_per_second, summary.elapsed_s) == (2.5, 1000.0, 31.0)
    page = Collector()
    page.feed((tmp_path / "page.html").read_text())
    assert page.tags.count("svg") == 4
    assert "lost steps" in page.text


def test_a_folder_without_a_run_has_no_page(tmp_path):
    with pytest.raises(InputError, match=r"DIR: expected a training run's folder with run.json, got"):
        write_run_report(tmp_path, tmp_path / "page.html")
    log_lines(tmp_path, {"start": 0, "time": 0.0})
    with pytest.raises(InputError, match="DIR: expected a run with at least one logged loss, got"):
        write_run_report(tmp_path, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("missing", ["runs", "samples"])
def test_a_page_that_cannot_be_made_leaves_the_old_one(tmp_path, missing):
    file = tmp_path / "report.html"
    write_report(result(), file)
    good = file.read_text()
    with pytest.raises((TypeError, UndefinedError)):
        write_report(result(**{missing: None}), file)
    assert file.read_text() == good


def test_results_survive_their_file(tmp_path):
    swiglu, flashmhf = result().variants
    ablation = replace(flashmhf, ablation=("q-norm", "off"), effect=differences(0.02, 0.01, 0.03))
    written = result(variants=(swiglu, flashmhf, ablation))
    write_comparison(written, tmp_path / "results.json")
    assert read_comparison(tmp_path / "results.json") == written


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": None}, "expected version 1 of a comparison's results, got none; run flashmhf compare again"),
        ({"version": 9}, "expected version 1 of a comparison's results, got 9; run flashmhf compare again"),
        ({"runs": None}, "ComparisonResult: expected runs, got none"),
        ({"jobs": "two"}, "ComparisonResult.jobs: expected int, got 'two'"),
    ],
)
def test_results_of_another_version_or_damaged_are_refused_in_one_line(tmp_path, change, message):
    content = {**result().as_dict(), **change}
    file = tmp_path / "results.json"
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))
    with pytest.raises(InputError) as caught:
        read_comparison(file)
    assert str(caught.value).startswith(f"{file}: {message}")
    assert len(str(caught.value).splitlines()) == 1


def test_the_command_draws_runs_and_comparisons(tmp_path, capsys):
    write_comparison(result(), tmp_path / "results.json")
    app(["report", str(tmp_path), "--json"], standalone_mode=False)
    shown = json.loads(capsys.readouterr().out)
    assert shown["report"] == str(tmp_path / "report.html")
    assert shown["variants"][0]["variant"] == "swiglu"
    assert "Feed-forward layers compared" in (tmp_path / "report.html").read_text()
    log_lines(tmp_path / "run", {"start": 0, "time": 0.0}, {"step": 1, "time": 1.0, "loss": 5.0})
    app(["report", str(tmp_path / "run")], standalone_mode=False)
    assert "train loss 5" in capsys.readouterr().out
