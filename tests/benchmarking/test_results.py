"""What a benchmark writes can be read by machines and people, and two results are compared beyond their noise."""

import csv
import html.parser
import json
import re

import pytest
import torch

from flashmhf.benchmarking import check_folder, compare_results, complete, provenance, read_result
from flashmhf.benchmarking.comparing import comparison_summary, comparison_table
from flashmhf.benchmarking.measuring import Times
from flashmhf.errors import InputError
from flashmhf.reports.benchmark_figures import PANELS, _colours, grid, panels
from flashmhf.reports.benchmark_page import webpage, write_results

PNG = b"\x89PNG\r\n\x1a\n"
VOID = {"meta", "br", "path", "use", "rect", "image", "link"}


def row(variant: str = "flashmhf", median_ms: float = 10.0, spread: float = 0.05, **changes) -> dict:
    times = {
        "median_ms": median_ms,
        "lower_quartile_ms": median_ms * (1 - spread),
        "upper_quartile_ms": median_ms * (1 + spread),
        "repeats": 7,
    }
    case = {"variant": variant, "tokens": 64, "dtype": "float32", "measured_pass": "forward"}
    return {**case, **times, "ratio": 1.0, "peak_mib": 3.5, **changes}


def result(*rows: dict, **changes) -> dict:
    shape = {"hidden_size": 48, "num_heads": 2, "num_subnetworks": 2, "subnetwork_size": 32}
    made = {"kind": "layer", **provenance(torch.device("cpu")), "shape": shape, "rows": list(rows), **changes}
    return {**made, "rows": complete(made)}


class Nesting(html.parser.HTMLParser):
    """Raises where a tag is closed that is not the last opened one."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag


def test_four_whole_files(tmp_path):
    old = result(row(median_ms=20.0))
    new = result(row(), row("swiglu"), {**row("naive", median_ms=1.0), "median_ms": None, "failed": "Out, of 'x'"})
    new["comparison"] = compare_results(old, new)
    write_results(new, tmp_path / "a" / "b")
    files = {file.name: file.read_bytes() for file in (tmp_path / "a" / "b").iterdir()}
    assert set(files) == {"results.json", "results.csv", "results.png", "report.html"}
    assert json.loads(files["results.json"]) == new == read_result(tmp_path / "a" / "b" / "results.json")
    table = list(csv.DictReader(files["results.csv"].decode().splitlines()))
    assert [line["variant"] for line in table] == ["flashmhf", "swiglu", "naive"]
    assert table[2]["failed"] == "Out, of 'x'"
    for line in (*table, *new["rows"]):
        for fact in ("machine", "cores", "torch", "triton", "flashmhf", "commit", "device", "dtype", "hidden_size"):
            assert fact in line
    assert files["results.png"].startswith(PNG)
    assert len(files["results.png"]) > 5000


def test_the_page_is_well_formed_and_loads_nothing():
    new = result(row(), row("swiglu"), row("<b>&", tokens=128), command="flashmhf bench <script>")
    new["comparison"] = compare_results(result(row(median_ms=20.0), torch="1.0"), new)
    text = webpage(new)
    nesting = Nesting()
    nesting.feed(text)
    assert nesting.open == []
    assert text.count("<svg") == 2  # time and memory
    for line in ("flashmhf bench &lt;script&gt;", "&lt;b&gt;&amp;", "1 faster, 2 new; ", "torch: 1.0 before, "):
        assert line in text
    assert "<script" not in text
    assert not re.search(r'(src|href)="(?!#)', re.sub(r'xlink:href="#', "", text).replace('href="#', ""))
    assert not re.search(r"url\((?!#)", text)
    assert 'name="viewport"' in text


def test_where_all_variants_failed_there_is_still_a_whole_result(tmp_path):
    write_results(result({"variant": "naive", "tokens": 64, "failed": "OutOfMemoryError"}), tmp_path)
    assert (tmp_path / "results.png").read_bytes().startswith(PNG)


def test_an_interrupt_leaves_the_earlier_files(tmp_path, monkeypatch):
    write_results(result(row(median_ms=1.0)), tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("flashmhf.files.flush", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_results(result(row(median_ms=2.0)), tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_every_kind_is_drawn_as_lines_or_bars():
    cases = {
        "op": {"variant": "blockwise"},
        "layer": {"variant": "flashmhf"},
        "decode": {"variant": "flashmhf", "ratio_to_copy": 0.5},
        "model": {"model": "flashmhf-tiny", "task": "training", "tokens_per_s": 9.0},
    }
    assert cases.keys() == PANELS.keys()
    for kind, case in cases.items():
        one, other = (row(**case, tokens=tokens) for tokens in (64, 128))
        assert [panel.across for panel in panels(kind, [one])] == [False, False]
        drawn = panels(kind, [one, other])
        assert [panel.across for panel in drawn] == [True, True]
        assert len(grid(drawn).axes) == 2


def test_lines_of_a_panel_have_different_colours():
    names = ["flashmhf-compiled", "swiglu", "flashmhf", "swiglu-tiny", "chunked", "naive"]
    assert len(set(_colours(names))) == len(names)
    assert _colours(["swiglu-tiny", "flashmhf-tiny"]) == _colours(["swiglu", "flashmhf"])


@pytest.mark.parametrize(
    ("old", "new", "verdict"),
    [
        (row(median_ms=10), row(median_ms=8), "faster"),
        (row(median_ms=10), row(median_ms=13), "slower"),
        (row(median_ms=10), row(median_ms=10.8), "within noise"),
        (row(median_ms=10, spread=0.3), row(median_ms=14, spread=0.3), "within noise"),  # wide apart, and wide
        (row(median_ms=10, spread=0.3), row(median_ms=40, spread=0.3), "slower"),
        (row(median_ms=10, spread=0.001), row(median_ms=10.2, spread=0.001), "within noise"),  # below 3 %
        (row(median_ms=10, spread=0), row(median_ms=10.4, spread=0), "slower"),
        (row(lower_quartile_ms=None), row(median_ms=1), "unknown"),
        (row(tokens=128), row(), "new"),
        ({**row(), "median_ms": None, "failed": "x"}, row(), "new"),
        (row(), {**row(), "median_ms": None, "failed": "x"}, "failed"),
    ],
)
def test_verdicts(old, new, verdict):
    compared = compare_results(result(old), result(new))
    assert compared["rows"][0]["verdict"] == verdict
    assert compared["counts"][verdict] == 1


def test_rows_are_paired_by_all_that_they_are_of():
    same = row(), row("swiglu"), row(dtype="bfloat16"), row(measured_pass="forward+backward"), row(tokens=128)
    compared = compare_results(result(*same), result(*reversed(same)))
    assert compared["counts"] == {"within noise": 5}
    assert [entry["ratio"] for entry in compared["rows"]] == [1.0] * 5
    other = result(*same, shape={"hidden_size": 96})
    assert compare_results(result(*same), other)["counts"] == {"new": 5, "gone": 5}
    assert compare_results(result(*same), result(*same, device="cuda"))["counts"] == {"new": 5, "gone": 5}


def test_other_machines_and_versions_are_named():
    old, new = result(row(), machine="a", torch="1.0"), result(row(peak_mib=7.0), machine="b", torch="1.0")
    compared = compare_results(old, new)
    assert compared["differences"] == ["machine: a before, b now"]
    assert compared["rows"][0]["memory_ratio"] == 2.0
    assert any("machine: a before, b now" in line for line in comparison_summary(compared))
    assert comparison_table(compared)[0]["what"] == "flashmhf"


def test_quartiles_need_three_repeats():
    assert Times.of([3.0, 1.0, 2.0]) == Times(2.0, 1.0, 3.0, 3)
    assert Times.of([3.0, 1.0]) == Times(2.0, None, None, 2)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file or directory"),
        (b"", "it is no JSON"),
        (b"\xff\xfe\x00", "it is no JSON"),
        (b"[" * 100_000, "it is no JSON"),
        (b"[]", "it has no 'kind'"),
        (b'{"sections": {}}', "it has no 'kind'"),
        (b'{"kind": "op", "rows": []}', "it has no 'rows'"),
        (b'{"kind": "op", "rows": [3]}', "it has no 'rows'"),
        (b'{"kind": "op", "shape": 3, "rows": [{"median_ms": 1}]}', "its 'shape' is no object"),
        (b'{"kind": "op", "rows": [{"median_ms": 1}, {"median_ms": NaN}]}', "row 2 has no 'median_ms'"),
        (
            b'{"kind": "op", "rows": [{"median_ms": 1, "upper_quartile_ms": "2"}]}',
            "row 1 has a quartile that is no time",
        ),
    ],
)
def test_what_is_no_result_is_refused(tmp_path, content, reason):
    file = tmp_path / "old.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=f"^compare: expected the results.json .*: {reason}$"):
        read_result(file)


def test_the_output_is_a_folder(tmp_path):
    file = tmp_path / "file"
    file.touch()
    check_folder(tmp_path / "new")
    for path in (file, tmp_path / "rows.json"):
        with pytest.raises(InputError, match="output: expected a folder"):
            check_folder(path)
