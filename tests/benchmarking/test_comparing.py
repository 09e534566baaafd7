"""Two results are compared beyond their noise."""

import pytest

from benchmark_results import FAILED, result, row
from flashmhf.benchmarking.measuring import Times
from flashmhf.benchmarking.workloads import LayerShape


def compare(old, new):
    return new.compared_with(old).comparison


@pytest.mark.parametrize(
    ("old", "new", "verdict"),
    [
        (row(median_ms=10), row(median_ms=8), "faster"),
        (row(median_ms=10), row(median_ms=13), "slower"),
        (row(median_ms=10), row(median_ms=10.8), "within noise"),
        (row(median_ms=10, spread=0.3), row(median_ms=14, spread=0.3), "within noise"),  # far apart, but noisy
        (row(median_ms=10, spread=0.3), row(median_ms=40, spread=0.3), "slower"),
        (row(median_ms=10, spread=0.001), row(median_ms=10.2, spread=0.001), "within noise"),  # below 3 %
        (row(median_ms=10, spread=0), row(median_ms=10.4, spread=0), "slower"),
        (row(lower_quartile_ms=None), row(median_ms=1), "unknown"),
        (row(tokens=128), row(), "new"),
        ({**row(), **FAILED}, row(), "new"),
        (row(), {**row(), **FAILED}, "failed"),
    ],
)
def test_a_verdict_needs_quartiles_at_least_3_percent_apart(old, new, verdict):
    compared = compare(result(old), result(new))
    assert compared.rows[0].verdict == verdict
    assert compared.counts[verdict] == 1


def test_only_rows_of_the_same_measurement_are_compared():
    same = row(), row("swiglu"), row(dtype="bfloat16"), row(measured_pass="forward+backward"), row(tokens=128)
    compared = compare(result(*same), result(*reversed(same)))
    assert compared.counts == {"within noise": 5}
    assert [compared_row.ratio for compared_row in compared.rows] == [1.0] * 5
    other = result(*same, shape=LayerShape(hidden_size=96))
    assert compare(result(*same), other).counts == {"new": 5, "gone": 5}
    assert compare(result(*same), result(*same, device="cuda")).counts == {"new": 5, "gone": 5}


def test_changes_of_machine_and_versions_are_named():
    old, new = result(row(), machine="a", torch="1.0"), result(row(peak_mib=7.0), machine="b", torch="1.0")
    compared = compare(old, new)
    assert compared.environment_changes == ("machine: a before, b now",)
    assert compared.rows[0].memory_ratio == 2.0


def test_quartiles_need_three_repeats():
    assert Times.of([3.0, 1.0, 2.0]) == Times(2.0, 1.0, 3.0, 3)
    assert Times.of([3.0, 1.0]) == Times(2.0, None, None, 2)
