"""A result as JSON can be read again; anything else is refused in one line."""

import json

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


def changed(**changes) -> bytes:
    return json.dumps(result(row()).to_json() | changes).encode()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file or directory"),
        (b"", "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "it has no 'kind'"),
        (b'{"sections": {}}', "it has no 'kind'"),
        (b'{"kind": "op", "rows": []}', f"expected version {VERSION}, got 1; run the benchmark again"),
        (changed(version=VERSION + 1), f"expected version {VERSION}, got {VERSION + 1}; run the benchmark again"),
        (changed(rows=[]), "it has no 'rows'"),
        (changed(rows=[3]), "it has no 'rows'"),
        (changed(workload=3), "it has no 'workload'"),
        (changed(workload={"width": 3}), ".*unexpected keyword argument 'width'"),
        (changed(provenance={}), ".*missing .* required keyword-only arguments: .*"),
        (changed(rows=[{"median_ms": 1}, {"median_ms": float("nan")}]), "row 2 has no 'median_ms'"),
        (changed(rows=[{"median_ms": 1, "upper_quartile_ms": "2"}]), "row 1 has a quartile that is not a time"),
    ],
)
def test_what_is_not_a_result_is_refused_in_one_line(tmp_path, content, reason):
    file = tmp_path / "old.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=f"^compare: expected the results.json of a benchmark, got '.*': {reason}$"):
        read_result(file)
