"""The report is one file that shows what the results say."""

import html.parser
import json

import pytest

from flashmhf.errors import InputError
from flashmhf.reports.comparison import markdown_table, write_report
from flashmhf.reports.run import write_run_report


def results() -> dict:
    def measure(*values):
        return {
            "mean": sum(values) / len(values),
            "standard_deviation": 0.01 if len(values) > 1 else None,
            "values": values,
        }

    def variant(name, loss):
        return {
            "variant": name,
            "ffn_type": name,
            "ablation": None,
            "parameters": 1234567,
            "forward_flops_per_token": 7.7e6,
            "layers": 4,
            "intermediate_size": 576,
            "validation_loss": measure(loss, loss + 0.02),
            "bits_per_byte": measure(loss * 1.44, loss * 1.45),
            "tokens_per_second": measure(4321.0),
            "peak_memory_mib": measure(888.0),
            "elapsed_s": measure(60.0),
            "documents": {"nats_per_token": loss + 0.1, "values": [loss + 0.1], "number": 5},
            "difference": None
            if name == "swiglu"
            else {"nats_per_token": {"mean": -0.1, "interval": (-0.15, -0.05), "documents": 5, "runs": 2}},
        }

    def run(name, seed, loss):
        curve = [[step, 5.0 - step / 50, step * 0.5] for step in range(1, 101, 10)]
        return {
            "variant": name,
            "ffn_type": name,
            "status": "finished",
            "seed": seed,
            "tokens": 409600,
            "curve": curve,
            "validation_curve": [[50, 3.0, 25.0], [100, loss, 50.0]],
        }

    return {
        "settings": {
            "variants": ["swiglu", "flashmhf"],
            "data": {"source": "<script>alert(1)</script>", "tokenizer": "bytes", "context_length": 512},
            "seeds": [0, 1],
            "document_bytes": 65536,
            "models": ["flashmhf-tiny"],
            "match": "parameters",
            "depth": "same",
        },
        "unigram_entropy_nats": 3.2,
        "gates": {"swiglu": [], "flashmhf": [{"layer": 0, "head": 0, "entropy": 0.875, "load": 0.99}]},
        "sweep": [{"variant": "swiglu", "seed": 0, "learning_rate": 1e-3, "validation_loss": 1.7, "chosen": True}],
        "jobs": 2,
        "variants": [variant("swiglu", 1.7), variant("flashmhf", 1.6)],
        "runs": [run(n, s, loss) for n, loss in (("swiglu", 1.7), ("flashmhf", 1.6)) for s in (0, 1)],
        "samples": {"prompt": "def <b>", "continuations": {"swiglu": "x & y", "flashmhf": "</pre>z"}},
    }


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


def test_the_page_is_whole_and_loads_nothing(tmp_path):
    write_report(results(), tmp_path / "report.html")
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
    header, rule, first, second, _, note = markdown_table(results()).splitlines()
    assert "5 of them, of each the first 65,536 bytes" in note
    assert "Student's t over 2 seeds" in note
    assert header.startswith("| FFN | validation loss")
    assert set(rule) <= set("|-: ")
    assert first.startswith(
        "| flashmhf | 1.610 ± 0.010 | 1.700 | -0.100 [-0.150, -0.050] | 2.312 ± 0.010 | 1,234,567 | 7.7 | 4 | 576 |"
    )
    assert second.startswith("| swiglu |")


def test_ablations_are_judged_against_what_they_change(tmp_path):
    ablated = results()
    mine = dict(ablated["variants"][1]) | {"variant": "flashmhf-gate-type-none", "ablation": ["gate-type", "none"]}
    ablated["variants"].append(mine | {"effect": {"nats_per_token": {"mean": 0.02, "interval": (0.01, 0.03)}}})
    ablated["variants"].append(mine | {"ablation": ["q-norm", "off"], "effect": None})
    assert markdown_table(ablated).splitlines()[-2:] == [
        "| gate-type none | +0.020 [+0.010, +0.030] | worse than flashmhf |",
        "| q-norm off |  | not decided |",
    ]
    write_report(ablated, tmp_path / "report.html")
    assert "+0.020 [+0.010, +0.030]" in (tmp_path / "report.html").read_text()


def test_one_seed_has_no_spread():
    one = results()
    one["variants"][0]["validation_loss"]["standard_deviation"] = None
    assert "| 1.710 |" in markdown_table(one)


def test_runs_that_died_are_said(tmp_path):
    died = results()
    died["runs"][1] |= {"status": "failed", "curve": [], "validation_curve": []}
    died["variants"][0]["validation_loss"] |= {"mean": None, "standard_deviation": None}
    table = markdown_table(died)
    assert table.splitlines()[3].startswith("| swiglu | died |")
    assert table.endswith("These runs died and are in no mean: swiglu with seed 1.")
    write_report(died, tmp_path / "report.html")
    assert "swiglu with seed 1" in (tmp_path / "report.html").read_text()


def test_a_power_law_wants_three_sizes(tmp_path):
    sized = results()
    for i in range(3):
        row = dict(sized["variants"][0]) | {"parameters": 10 ** (6 + i)}
        row["validation_loss"] = {"mean": 4.0 * 10.0 ** (-0.05 * i), "standard_deviation": None, "values": []}
        sized["variants"].append(row)
    del sized["variants"][0]
    write_report(sized, tmp_path / "report.html")
    assert "<!-- swiglu: size^-0.050 -->" in (tmp_path / "report.html").read_text()


def log_lines(folder, *lines):
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
    assert (summary["starts"], summary["lost_steps"], summary["steps"]) == (2, 9, 30)
    assert (summary["validation_loss"], summary["tokens_per_second"], summary["elapsed_s"]) == (2.5, 1000.0, 31.0)
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
def test_nothing_half_written_replaces_a_good_report(tmp_path, missing):
    file = tmp_path / "report.html"
    write_report(results(), file)
    good = file.read_text()
    broken = {key: value for key, value in results().items() if key != missing}
    with pytest.raises(KeyError):
        write_report(broken, file)
    assert file.read_text() == good
