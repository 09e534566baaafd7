"""From rows to measured.json to `auto`: what changes, what does not, and why."""

import importlib
import json
import subprocess
import sys

import pytest
import torch
from lease_facts import FACTS

import gpu_apply
from flashmhf.ops import backends, measured
from flashmhf.ops.hopper import tiles
from flashmhf.ops.problem import Problem
from flashmhf.ops.triton import tiles as triton_tiles
from gpu_facts import kernel_hashes

HERE = FACTS | {"kernels": kernel_hashes()}
SHIPPED = {kernel: of_dims[1]._asdict() for kernel, of_dims in tiles.TABLE.items()}
SLOW, FAST = 4.0, 2.0


def check(kernel: str, tile: dict | None, backend: str = "hopper", **changes) -> dict:
    common = {"step": "smoke", "case": "x", "backend": backend, "kernel": kernel, "tile": tile, "D": 128}
    values = {"dtype": "bfloat16", "result": "out", "error": 0.002, "budget": 0.004, "passed": True, "changed": 0}
    return HERE | common | values | changes


def timed(kernel: str, tile: dict | None, tokens: int, ms: float, backend: str = "hopper", **changes) -> dict:
    common = {"step": "op", "case": "x", "backend": backend, "kernel": kernel, "tile": tile, "D": 128}
    values = {"dtype": "bfloat16", "shape": "1.3b", "tokens": tokens, "median_ms": ms}
    return HERE | common | values | changes


def passing(ms: float = FAST, tokens: tuple[int, ...] = (1024, 4096), **changes) -> list[dict]:
    """All kernels right on both backends; Hopper's take `ms`, the portable ones SLOW."""
    rows = []
    for kernel in SHIPPED:
        rows += [check(kernel, SHIPPED[kernel], **changes), check(kernel, None, "triton", **changes)]
        for T in tokens:
            rows += [
                timed(kernel, SHIPPED[kernel], T, ms, **changes),
                timed(kernel, None, T, SLOW, "triton", **changes),
            ]
    return rows


@pytest.fixture
def applied(tmp_path, monkeypatch):
    """Applies rows and reloads the tables from the result; returns the report and the entries."""
    target = tmp_path / "measured.json"
    target.write_text("[]")
    before = [dict(vars(module)) for module in (tiles, triton_tiles)]

    def run(rows: list[dict]) -> tuple[str, list[dict]]:
        merged = tmp_path / "gpu.jsonl"
        merged.write_text("".join(json.dumps(row) + "\n" for row in rows))
        report = gpu_apply.apply(merged, target)
        monkeypatch.setattr(measured, "entries", lambda: measured.parse(target.read_text()))
        importlib.reload(tiles)
        importlib.reload(triton_tiles)
        return report, json.loads(target.read_text())

    yield run
    for module, names in zip((tiles, triton_tiles), before, strict=True):
        vars(module).update(names)


def claims(entries: list[dict], claim: str) -> list[dict]:
    return [entry for entry in entries if entry["claim"] == claim]


def chosen_by_auto(tokens: int, monkeypatch, dtype: torch.dtype = torch.bfloat16) -> str:
    """What `auto` would run on a Hopper GPU."""
    monkeypatch.setattr("flashmhf.ops.backends.interprets_triton", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    problem = Problem(tokens, 8, 8, 7, 384, 128, dtype, torch.device("cuda"), has_gate=True)
    return backends.select(problem, "auto").__name__.split(".")[2]


def test_auto_selects_hopper_from_the_size_at_which_it_measured_faster(applied, monkeypatch):
    rows = [*passing(tokens=(4096, 16384)), *passing(SLOW, tokens=(1024,))]
    report, entries = applied(rows)
    (faster,) = claims(entries, "hopper faster")
    assert faster["from_tokens"] == 4096
    assert faster["proof"]["ms"]["1.3b 4096"] == {"hopper": [FAST, FAST], "triton": [SLOW, SLOW]}
    assert faster["proof"]["device"] == "Toy GPU"
    assert "selected by auto from 4096 tokens: hopper D=128 bfloat16" in report
    assert [chosen_by_auto(T, monkeypatch) for T in (4095, 4096, 2**20)] == ["triton", "hopper", "hopper"]
    assert chosen_by_auto(4096, monkeypatch, torch.float16) == "triton"


def test_without_rows_nothing_is_claimed(applied, monkeypatch):
    report, entries = applied([])
    assert entries == []
    assert report.endswith("measured.json: 0 entries")
    assert chosen_by_auto(2**16, monkeypatch) == "triton"


@pytest.mark.parametrize(
    "wrong",
    [
        check("forward", SHIPPED["forward"], passed=False, error=0.1),
        check("backward", SHIPPED["backward"], passed=False, changed=3),
        check("backward", SHIPPED["backward"], passed=False, step="rounds", D=96),
        timed("forward", SHIPPED["forward"], 65536, 1.0) | {"failed": "killed by SIGABRT"},
        {key: value for key, value in check("forward", SHIPPED["forward"]).items() if key != "passed"}
        | {"failed": "no row for 15 s"},
    ],
)
def test_one_wrong_result_excludes_hopper(wrong, applied, monkeypatch):
    for rows in ([*passing(), wrong], [wrong, *passing()]):
        report, entries = applied(rows)
        assert claims(entries, "hopper verified") == claims(entries, "hopper faster") == []
        assert "not verified: hopper D=128 bfloat16" in report
        assert chosen_by_auto(2**16, monkeypatch) == "triton"


def test_a_wrong_portable_backend_is_not_a_baseline(applied):
    _, entries = applied([*passing(), check("forward", None, "triton", passed=False)])
    assert claims(entries, "hopper verified")
    assert not claims(entries, "hopper faster")


@pytest.mark.parametrize(
    "change",
    [{"kernels": {"hopper": "other", "triton": HERE["kernels"]["triton"]}}, {"device": "cpu"}],
)
def test_rows_of_other_kernels_or_of_no_gpu_prove_nothing(change, applied):
    report, entries = applied(passing(**change))
    assert entries == []
    assert ("rows of other kernel sources of hopper are ignored, measure again: abc" in report) == ("kernels" in change)


def test_claims_without_proof_are_removed_and_reported(applied, monkeypatch):
    applied(passing())
    assert chosen_by_auto(4096, monkeypatch) == "hopper"
    report, entries = applied([])
    assert entries == []
    assert report.count("no longer: ") == len(SHIPPED) + 2  # the tiles, verified, faster
    assert chosen_by_auto(4096, monkeypatch) == "triton"


def test_a_gain_within_noise_changes_nothing(applied):
    _, entries = applied(passing(SLOW * 0.98))
    assert claims(entries, "hopper verified")
    assert not claims(entries, "hopper faster")


@pytest.mark.parametrize("ms", [(SLOW, 1.0), (1.0, 2 * SLOW)])
def test_forward_and_forward_plus_backward_must_both_be_faster(ms, applied):
    rows = [row for row in passing() if "median_ms" not in row or row["backend"] == "triton"]
    for kernel, of_kernel in zip(("forward", "backward"), ms, strict=True):
        rows += [timed(kernel, SHIPPED[kernel], T, of_kernel) for T in (1024, 4096)]
    report, entries = applied(rows)
    assert claims(entries, "hopper verified")
    assert not claims(entries, "hopper faster")
    assert f"not selected by auto: hopper D=128 bfloat16: at 4096 tokens {[*ms]} ms against" in report


@pytest.mark.parametrize(("ms", "changes"), [(1.0, True), (1.99, False)])
def test_the_fastest_correct_tile_ships(ms, changes, applied):
    other = next(tile._asdict() for tile in tiles.FORWARD_CANDIDATES[128] if tile._asdict() != SHIPPED["forward"])
    rows = [*passing(), check("forward", other), *(timed("forward", other, T, ms) for T in (1024, 4096))]
    _, entries = applied(rows)
    assert tiles.forward_tile(128)._asdict() == (other if changes else SHIPPED["forward"])
    assert claims(entries, "hopper verified")
    # One wrong result removes it again.
    _, entries = applied([*rows, check("forward", other, passed=False)])
    assert tiles.forward_tile(128)._asdict() == SHIPPED["forward"]
    assert claims(entries, "hopper faster")


def test_each_dtype_needs_its_own_proof(applied, monkeypatch):
    _, entries = applied([*passing(), *passing(dtype="float16")])
    assert {entry["dtype"] for entry in claims(entries, "hopper faster")} == {"bfloat16", "float16"}
    assert chosen_by_auto(4096, monkeypatch, torch.float16) == "hopper"


def tuned(kernel: str, speedup: float, **changes) -> dict:
    best = [64, 32, 4, 2] if speedup > 1 else [128, 64, 8, 2]
    return (
        HERE
        | {"step": "tune", "case": "x", "kernel": kernel, "dtype": "bfloat16", "D": 64, "shipped": [128, 64, 8, 2]}
        | {"best": best, "speedup": speedup, "shipped_ms": {"1024": 2.0}, "best_ms": {"1024": 2.0 / speedup}}
        | {"error": 0.001, "budget": 0.002, "passed": True}
        | changes
    )


def test_portable_tiles_follow_tune(applied):
    report, entries = applied([tuned("forward", 1.2), tuned("backward_dq", 1.01)])
    (entry,) = claims(entries, "triton tile")
    assert (entry["kernel"], entry["tile"]) == ("forward", [64, 32, 4, 2])
    assert "keeps: triton sm_90a 2 backward_dq 64" in report
    assert ("forward", 64, triton_tiles.Tile(64, 32, 4, 2)) in [*triton_tiles.table_rows("sm_90a", 2)]
    wrong = HERE | {"step": "tiles", "case": "x", "kernel": "forward", "dtype": "bfloat16", "D": 64}
    wrong |= {"tile": "64x32x4x2", "result": "out", "error": 1.0, "budget": 0.1, "passed": False}
    report, entries = applied([tuned("forward", 1.2), wrong])
    assert entries == []
    assert "excluded: triton sm_90a 2 forward 64 [64, 32, 4, 2]: out: error 1.0" in report


@pytest.mark.parametrize(("two_ms", "changes"), [(3.0, True), (2.0, False)])
def test_the_fused_backward_is_selected_where_it_beats_two_kernels(two_ms, changes, applied):
    _, entries = applied([tuned("backward_fused", 1.0, two_kernels_ms={"1024": two_ms})])
    assert (frozenset({("sm_90a", 64)}) if changes else frozenset()) == triton_tiles.FUSED_FASTER
    assert len(entries) == changes


def test_comments_change_no_kernel_but_code_does(tmp_path):
    for folder in ("triton", "hopper"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "forward.py").write_text("x = 1\n")
        (tmp_path / folder / "tiles.py").write_text("")
    before = kernel_hashes(tmp_path)
    (tmp_path / "hopper/forward.py").write_text("# why\n\nx = 1\n")
    (tmp_path / "hopper/tiles.py").write_text("y = 1\n")
    assert kernel_hashes(tmp_path) == before
    (tmp_path / "hopper/forward.py").write_text("x = 2\n")
    after = kernel_hashes(tmp_path)
    assert (after["hopper"] != before["hopper"], after["triton"] != before["triton"]) == (True, False)


def test_what_ships_was_measured_with_these_kernels():
    """Fails if a kernel changes after its measurement; `benchmarks/gpu.py --apply` removes what is no longer proven."""
    hashes = kernel_hashes()
    for entry in measured.entries():
        for backend, proven in entry["proof"]["proves"].items():
            assert proven == hashes[backend], entry


def test_the_package_reads_its_table_without_triton():
    code = (
        "import sys, flashmhf.ops.backends; print('triton' in sys.modules, sys.modules['flashmhf.ops.measured'].FILE)"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.startswith("False")
    assert printed.strip().endswith("measured.json")
