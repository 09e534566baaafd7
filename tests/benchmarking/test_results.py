"""A result as JSON can be read again; anything else is refused in one line."""

import json
import re

import pytest

from benchmark_results import FAILED, result, row
from flashmhf.benchmarking.results import VERSION, BenchmarkResult, read_result
from flashmhf.benchmarking.workloads import ModelWorkload
from flashmhf.errors import InputError


@pytest.mark.parametrize("kind", ["layer", "model"])
def test_a_result_that_is_written_is_read_again(tmp_path, kind):
    made = result(row(), {**row("naive"), **FAILED})
    if kind == "model":
        made = BenchmarkResult(kind=kind, provenance=made.provenance, workload=ModelWorkload(), rows=made.rows)
    file = tmp_path / "results.json"
    file.write_text(json.dumps(made.to_json()))
    read = read_result(file)
    assert json.loads(json.dumps(read.to_json())) == json.loads(file.read_text())
    assert read.compared_with(made).comparison.counts["within noise"] == 1


def test_every_record_has_shape_and_provenance():
    for record in result(row(), {**row("naive"), **FAILED}).records():
        for fact in ("machine", "cores", "torch", "triton", "flashmhf", "commit", "device", "dtype", "hidden_size"):
            assert fact in record


AGAIN = "run flashmhf bench again"


def changed(**changes) -> bytes:
    return json.dumps(result(row()).to_json() | changes).encode()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "expected a JSON object in FILE, got .*No such file or directory.*"),
        (b"", "expected a JSON object in FILE, got Expecting value: .*"),
        (b"\xff\xfe\x00", "expected a JSON object in FILE, got .*can't decode byte.*"),
        (b"[" * 100_000, "expected a JSON object in FILE, got JSON that is too deeply nested"),
        (b"[]", "expected a JSON object in FILE, got a list"),
        (b'{"sections": {}}', f"FILE: expected version {VERSION} of a benchmark's results, got none; {AGAIN}"),
        (changed(version=9), f"FILE: expected version {VERSION} of a benchmark's results, got 9; {AGAIN}"),
        (changed(kind=None), "FILE: expected kind, got none"),
        (changed(rows=[]), "FILE: expected rows, got none"),
        (changed(rows=[3]), "FILE: expected rows, got none"),
        (changed(workload=3), "FILE: LayerShape: expected dict, got 3"),
        (changed(workload={"num_heads": "x"}), "FILE: LayerShape.num_heads: expected int, got 'x'"),
        (changed(provenance={}), "FILE: Provenance: expected machine, got none"),
        (changed(rows=[{"median_ms": 1}, {"median_ms": float("nan")}]), "FILE: row 2: expected median_ms, got None"),
        (
            changed(rows=[{"median_ms": 1, "upper_quartile_ms": "2"}]),
            "FILE: row 1: expected a time as upper_quartile_ms, got '2'",
        ),
    ],
)
def test_what_is_not_a_result_is_refused_in_one_line(tmp_path, content, reason):
    file = tmp_path / "old.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=f"^{reason.replace('FILE', re.escape(str(file)))}$") as caught:
        read_result(file)
    assert "\n" not in str(caught.value)
