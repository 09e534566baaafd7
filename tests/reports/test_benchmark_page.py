"""What a benchmark writes can be read by machines and by people."""

import csv
import html.parser
import json
import re
from dataclasses import replace

import pytest

from benchmark_results import FAILED, result, row
from flashmhf.benchmarking.results import read_result
from flashmhf.cli.output import check_folder
from flashmhf.errors import InputError
from flashmhf.reports.benchmark_figures import QUANTITIES, grid, panels
from flashmhf.reports.benchmark_page import webpage, write_results
from flashmhf.reports.benchmark_tables import comparison_summary, comparison_table

PNG = b"\x89PNG\r\n\x1a\n"
VOID = {"meta", "br", "path", "use", "rect", "image", "link"}


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


def test_json_csv_picture_and_page_hold_the_result(tmp_path):
    new = result(row(), row("swiglu"), {**row("naive"), **FAILED}).compared_with(result(row(median_ms=20.0)))
    write_results(new, tmp_path / "a" / "b")
    files = {file.name: file.read_bytes() for file in (tmp_path / "a" / "b").iterdir()}
    assert set(files) == {"results.json", "results.csv", "results.png", "report.html"}
    assert json.loads(files["results.json"]) == json.loads(json.dumps(new.to_json()))
    assert read_result(tmp_path / "a" / "b" / "results.json") == replace(new, comparison=None)
    table = list(csv.DictReader(files["results.csv"].decode().splitlines()))
    assert [line["variant"] for line in table] == ["flashmhf", "swiglu", "naive"]
    assert table[2]["failed"] == "Out, of 'x'"
    assert table[0].keys() == {key for record in new.records() for key in record}
    assert files["results.png"].startswith(PNG)
    assert len(files["results.png"]) > 5000


def test_the_page_is_well_formed_and_loads_nothing():
    old = result(row(median_ms=20.0), torch="1.0")
    new = result(row(), row("swiglu"), row("<b>&", tokens=128), command="flashmhf bench <script>").compared_with(old)
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


def test_a_result_whose_variants_all_failed_is_written_too(tmp_path):
    write_results(result({"variant": "naive", "tokens": 64, "failed": "OutOfMemoryError"}), tmp_path)
    assert (tmp_path / "results.png").read_bytes().startswith(PNG)


def test_an_interrupt_leaves_the_earlier_files(tmp_path, monkeypatch):
    write_results(result(row(median_ms=1.0)), tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("flashmhf.files.os.fsync", interrupt)
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
    assert cases.keys() == QUANTITIES.keys()
    for kind, case in cases.items():
        one, other = (row(**case, tokens=tokens) for tokens in (64, 128))
        assert [panel.over_tokens for panel in panels(kind, [one])] == [False, False]
        drawn = panels(kind, [one, other])
        assert [panel.over_tokens for panel in drawn] == [True, True]
        assert len(grid(drawn).axes) == 2


def test_a_comparison_names_what_differs_and_nothing_else():
    old, new = result(row(), machine="a"), result(row(), row(tokens=128), machine="b")
    compared = new.compared_with(old).comparison
    assert [cells[0] for cells in comparison_table(compared).rows] == ["flashmhf, tokens 64", "flashmhf, tokens 128"]
    assert any("machine: a before, b now" in line for line in comparison_summary(compared))


def test_the_output_is_a_folder(tmp_path):
    file = tmp_path / "file"
    file.touch()
    check_folder("output", str(tmp_path / "new/below"))
    for path in (file, tmp_path / "rows.json", file / "below"):
        with pytest.raises(InputError, match="output: expected a folder"):
            check_folder("output", str(path))
