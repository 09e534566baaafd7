"""The committed table of compiled kernels and its summary."""

import csv
from pathlib import Path

from offline import run

from kernel_table import Row, options, summary, tile_name, write_csv

TABLE = Path(__file__).parents[2] / "docs/kernels.csv"
SHIPPED = """
import json
from compile_kernels import TARGETS, described, shipped
for target in TARGETS:
    for case in shipped(target):
        print(json.dumps([str(column) for column in described(case)]))
"""


def row(**changes) -> Row:
    return Row("sm_80", "forward", "bfloat16", 128, 64, 64, 8, 2, "", 200, 0, 80 * 1024, 96, 1.0)._replace(**changes)


def test_the_summary_has_one_line_per_target():
    rows = [row(), row(kernel="backward_dkuv", issued=1.5, registers=250, spilled=8), row(issued=None)]
    rows += [row(kernel="prologue_forward", issued=4.0), row(target="sm_90a", shared_bytes=100 * 1024)]
    assert summary(rows, {"sm_80": 163 * 1024, "sm_90a": 227 * 1024}).splitlines()[2:] == [
        "| sm_80 | 4 | 1 | 250 | 80 of 163 KiB | 1, up to 1.50 (backward_dkuv, bfloat16, head dim 128) |",
        "| sm_90a | 1 | 0 | 200 | 100 of 227 KiB | none |",
    ]


def test_the_name_of_a_tile_has_sizes_and_options():
    fields = {"block_t": 64, "block_f": 32, "stages": 4, "q_in_registers": True, "pingpong": False, "splits": 3}
    assert options(fields) == "q_in_registers splits=3"
    assert tile_name(fields) == "64x32x4 q_in_registers splits=3"
    assert tile_name({"block_t": 64, "block_f": 32, "num_warps": 8, "num_stages": 1}) == "64x32x8x1"


def test_csv_rounds_the_issued_ratio(tmp_path):
    write_csv([row(issued=5 / 3), row(issued=None)], tmp_path / "table.csv")
    with (tmp_path / "table.csv").open() as file:
        assert [(line["registers"], line["issued"]) for line in csv.DictReader(file)] == [("200", "1.667"), ("200", "")]


def test_the_committed_table_has_every_shipped_row():
    """Where this fails: python benchmarks/compile_kernels.py."""
    with TABLE.open() as file:
        committed = [line[:9] for line in csv.reader(file)]
    assert committed[0] == list(Row._fields[:9])
    assert committed[1:] == run(SHIPPED)
