"""Rows of several leases become one file, tables and a picture."""

import json

import pytest
from lease_facts import FACTS

from gpu_merge import merge
from gpu_rows import RowFile, UnusableError
from gpu_speed import growth_fit

OP = {"shape": "1.3b", "dtype": "bfloat16", "measured_pass": "forward"}


def lease_of(folder, device: str, ratio: float) -> None:
    rows = RowFile(folder / "rows.jsonl", FACTS | {"device": device})
    rows.prepare()
    rows.append("smoke", "a", {"state": "started"})
    rows.append("smoke", "a", {"result": "out", "error": 0.1, "budget": 0.2, "passed": True})
    rows.append("smoke", "b", {"failed": "killed by SIGSEGV"})
    for tokens in (4096, 1024):
        for name, value in (("hopper", ratio), ("triton", 0.5), ("hopper stages=2", 0.9), ("hopper stages=3", 0.8)):
            rows.append("op", str(tokens), OP | {"variant": name, "tokens": tokens, "ratio_to_cublas": value})
    for tokens in (1, 16):
        rows.append("growth", str(tokens), {"variant": "flashmhf", "shape": "370m", "tokens": tokens}
                    | {"median_ms": 2.0 * tokens, "peak_bytes_per_token": 7.0})  # fmt: skip


def test_leases_of_two_machines_become_one_file_with_tables(tmp_path):
    merged = tmp_path / "gpu.jsonl"
    for name, ratio in (("H100", 0.7), ("H200", 0.75)):
        lease_of(tmp_path / name, name, ratio)
        summary = merge([tmp_path / name], merged)
    assert summary == f"{merged}: 24 rows, 1 files added"
    rows = [json.loads(line) for line in merged.read_text().splitlines()]
    assert len(rows) == 24
    assert all({"device", "torch", "triton", "code", "commit"} <= row.keys() for row in rows)
    assert not any("state" in row for row in rows)
    text = merged.with_suffix(".md").read_text()
    assert "## H100, 2026-01-01" in text
    assert "1 of 2 results are right." in text
    assert "- b: killed by SIGSEGV" in text
    assert "| 1.3b | bfloat16 | forward | 4,096 | 0.75 | 0.5 | 0.9 | hopper stages=2 |" in text
    assert "| flashmhf | 1, 16 | 1 | 7, 7 |" in text
    assert merged.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_merging_again_changes_nothing(tmp_path):
    merged = tmp_path / "gpu.jsonl"
    lease_of(tmp_path / "a", "H100", 0.7)
    merge([tmp_path / "a"], merged)
    before = merged.read_bytes()
    merge([tmp_path / "a"], merged)
    assert merged.read_bytes() == before


def test_corrupt_lines_and_dry_runs_are_ignored_and_reported(tmp_path):
    folder = tmp_path / "a"
    lease_of(folder, "cpu", 0.7)
    with (folder / "rows.jsonl").open("a") as file:
        file.write('{"step": "op", "ca')
    merged = tmp_path / "gpu.jsonl"
    summary = merge([folder], merged)
    assert summary.endswith("no rows of a GPU in 1 files, 1 corrupt lines ignored")
    assert not merged.exists()


def test_a_folder_without_rows_is_named(tmp_path):
    with pytest.raises(UnusableError, match=r"^merge: expected folders with rows \(\*.jsonl\), got "):
        merge([tmp_path / "none"], tmp_path / "gpu.jsonl")


LOSSES = {"swiglu": (3.50, 3.52, 3.51), "flashmhf": (3.47, 3.50, 3.47)}


def training_lease(folder, seeds: int) -> None:
    rows = RowFile(folder / "rows.jsonl", FACTS | {"device": "H100"})
    rows.prepare()
    for ffn_type, losses in LOSSES.items():
        for seed, loss in enumerate(losses[:seeds]):
            row = {"size": "30m", "ffn_type": ffn_type, "seed": seed, "steps": 9, "validation_nats_per_token": loss}
            for values in (row | {"steps": 1, "validation_nats_per_token": 9.0}, row | {"final": True}):
                rows.append(f"{ffn_type} {seed}", f"{ffn_type} seed {seed}", values)
    failure = {"size": "30m", "ffn_type": "swiglu", "seed": 7, "failed": "the training loss is nan"}
    rows.append("swiglu 7", "swiglu seed 7", failure)


def test_training_runs_become_one_comparison_over_seeds(tmp_path):
    training_lease(tmp_path / "a", seeds=3)
    merge([tmp_path / "a"], tmp_path / "gpu.jsonl")
    text = (tmp_path / "gpu.md").read_text()
    assert text.count("### ") == 1
    assert "| 30m | 1 | 3.52 | 3.5 | -0.02 |" in text
    assert "30m: flashmhf - swiglu: -0.0300 [-0.0548, -0.0052] (95 %, Student's t over 3 seeds)." in text  # t = 4.3027
    assert "- 30m swiglu, seed 7: the training loss is nan" in text


@pytest.mark.parametrize("seeds", [1, 2])
def test_fewer_than_three_pairs_of_training_runs_decide_nothing(seeds, tmp_path):
    training_lease(tmp_path / "a", seeds=seeds)
    merge([tmp_path / "a"], tmp_path / "gpu.jsonl")
    assert "flashmhf - swiglu: not decided" in (tmp_path / "gpu.md").read_text()


def test_the_exponent_of_growth_is_the_slope_of_the_logarithms():
    rows = [{"tokens": T, "median_ms": 3 * T**1.5, "peak_bytes_per_token": 9.0} for T in (10, 100, 400)]
    rows.append({"tokens": 1000, "failed": "OutOfMemoryError"})
    fit = growth_fit(rows)
    assert fit["exponent_of_time"] == pytest.approx(1.5)
    assert fit["tokens"] == [10, 400]
    assert growth_fit(rows[:1]) == {}
