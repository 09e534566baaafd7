"""Plans and commands: time limits, messages, and every case of every step on the CPU at toy sizes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lease_facts import FACTS, ROOT

import gpu
import tune
from flashmhf.ops.flash_mhf import flash_mhf
from flashmhf.ops.hopper import tiles as hopper_tiles
from gpu_bench import Bench, Variant
from gpu_checks import poisoned_memory, prepared, rounds, smoke
from gpu_facts import check_device
from gpu_plan import PLANS, Plan, Step
from gpu_rows import failed, read_lines, rows_of

BENCHMARKS = ROOT / "benchmarks"
CALL_LIMIT_S = 600  # of the machines that are lent
QUERY_S = 20  # of the device before the first step: starting Python, torch and the driver


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_the_steps_of_a_plan_fit_its_seconds_and_a_call(plan):
    assert QUERY_S + sum(step.limit_s for step in plan.steps) <= plan.seconds < CALL_LIMIT_S
    assert len({step.name for step in plan.steps}) == len(plan.steps)


def test_the_readme_lists_the_steps_of_each_plan():
    recipe = (BENCHMARKS / "README.md").read_text()
    for name, plan in PLANS.items():
        assert f"| `{name}` | {plan.seconds} | {', '.join(step.name for step in plan.steps)} |" in recipe


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (gpu, ["--plan", "first", "--steps", "x"], "--steps: expected some of machine, compile, smoke, "),
        (gpu, ["--plan", "fourth"], "invalid choice: 'fourth'"),
        (gpu, ["--plan", "first", "--time-limit", "0"], "argument --time-limit: expected seconds above 0, got '0'"),
        (gpu, [], "one of the arguments --plan --merge --apply is required"),
        (tune, ["--dims", "7"], "--dims: expected some of 32, 64, 128, 256, got '7'"),
        (tune, ["--kernels", "sort"], "--kernels: expected some of decode, "),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(script, arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script", *arguments])
    with pytest.raises(SystemExit, match="2"):
        script.main()
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", [["gpu.py", "--plan", "first"], ["tune.py"]])
def test_without_a_gpu_the_scripts_exit_with_one_line(command, tmp_path):
    done = run_script(*command, output=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: device: expected a CUDA or ROCm GPU, got none (")
    assert not list(tmp_path.glob("*.jsonl"))


def test_an_old_driver_is_a_one_line_error(monkeypatch):
    def init() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nPlease update")

    monkeypatch.setattr(torch.cuda, "init", init)
    with pytest.raises(
        ValueError, match=r"got none \(The NVIDIA driver on your system is too old .*--dry-run"
    ) as error:
        check_device(torch.device("cuda"))
    assert "\n" not in str(error.value)


def test_an_old_triton_is_a_one_line_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr("triton.__version__", "3.5.1")
    with pytest.raises(ValueError, match=r"^triton: expected 3.6 or later, got 3.5.1$"):
        check_device(torch.device("cuda"))


def test_an_unsupported_gpu_is_a_one_line_error(monkeypatch):
    monkeypatch.setattr("flashmhf.ops.backends.interprets_triton", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 0))
    with pytest.raises(ValueError, match=r"^device: .*, got Tesla V100: needs compute capability 8.0 or later, got"):
        check_device(torch.device("cuda"))


def test_no_write_access_is_a_one_line_error(tmp_path):
    (tmp_path / "taken").write_text("a file, no folder")
    done = run_script("gpu.py", "--plan", "first", "--dry-run", output=tmp_path / "taken")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: output: cannot write to '{tmp_path}/taken/steps.log': ")


def test_rows_go_to_the_folder_in_OUT(tmp_path):
    environment = {"OUT": str(tmp_path / "out")}
    done = run_script("gpu.py", "--plan", "first", "--dry-run", "--steps", "compile", environment=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = (tmp_path / "out").glob("cpu-*.jsonl")
    assert rows_of(read_lines(file)[0], "compile")
    assert done.stdout.splitlines()[-1].startswith("compile ")


def test_the_summary_shows_the_best_value_of_each_variant():
    step = Step("op", 10, "", "", shows="ratio_to_cublas")
    found = [
        {"variant": "hopper", "kernel": "forward", "ratio_to_cublas": 0.7},
        {"variant": "hopper", "kernel": "forward", "ratio_to_cublas": 0.8123},
        {"variant": "triton", "kernel": "forward", "ratio_to_cublas": 0.5},
        {"variant": "triton", "kernel": "backward", "ratio_to_cublas": "nan"},
        {"variant": "hopper", "kernel": "backward", "failed": "killed by SIGABRT"},
    ]
    assert gpu._best(step, found) == "ratio_to_cublas; hopper forward 0.812; triton forward 0.5"
    step = Step("layer", 10, "", "", shows="ratio")
    found = [{"variant": "a", "measured_pass": "forward", "ratio": ratio} for ratio in (1.5, 0.9)]
    assert gpu._best(step, found) == "ratio; a forward 0.9"
    step = Step("training", 10, "", "", shows="mfu_of_matmul")
    found = [{"model": "flashmhf-370m", "backend": "hopper", "mfu_of_matmul": 0.5}]
    assert gpu._best(step, found) == "mfu_of_matmul; flashmhf-370m hopper 0.5"
    assert gpu._best(step, []) == ""


def test_merge_is_a_command(tmp_path, monkeypatch, capsys, rows):
    rows.append("machine", "peaks", {"variant": "cublas", "tflops": 700.0})
    monkeypatch.setattr(gpu, "MERGED", tmp_path / "gpu.jsonl")
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--merge", str(rows.path)])
    gpu.main()
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'gpu.jsonl'}: 1 rows, 1 files added")
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--merge", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match="2"):
        gpu.main()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: merge: expected folders with rows (*.jsonl), got ")


def test_every_candidate_tile_is_a_variant_and_runs_with_its_tile(monkeypatch):
    bench = Bench(dry_run=True, until=0)
    variants = [*bench.variants(128, torch.bfloat16)]
    names = [(variant.name, variant.kernel) for variant in variants]
    assert len(set(names)) == len(names)
    for kernel, candidates in hopper_tiles.CANDIDATES.items():
        of_kernel = [variant.tile for variant in variants if variant.kernel == kernel and variant.backend == "hopper"]
        assert set(of_kernel) == set(candidates[128])
    seen = []
    inputs = bench.inputs(4, 2, 2, 2, 8, 128, torch.float32)
    before = tiles_in_force()
    for variant in variants:
        kernel = variant.kernel

        def spy(*arguments: object, kernel: str = kernel) -> None:
            seen.append(tiles_in_force()[kernel][1])

        with monkeypatch.context() as patch:
            patch.setattr(f"flashmhf.ops.blockwise.{kernel.partition('_')[0]}", spy)
            prepared(bench, variant, inputs)()
        assert seen.pop() == (before[kernel][1] if variant.tile is None else variant.tile)
    assert tiles_in_force() == before


def tiles_in_force() -> dict[str, tuple]:
    """Hopper's tables as its backend reads them: kernel -> one tile per head dim."""
    return {kernel: getattr(hopper_tiles, kernel.upper()) for kernel in hopper_tiles.TABLE}


def test_everything_that_smoke_and_op_launch_is_compiled_ahead():
    script = Path(__file__).with_name("launches_of_steps.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(BENCHMARKS)])
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= len(hopper_tiles.FORWARD_CANDIDATES[128])


def test_a_variant_with_a_failed_check_is_not_timed():
    variant = Variant("hopper", "hopper", "forward", 128, hopper_tiles.forward_tile(128))
    row = {"step": "smoke", "case": "x", "dtype": "bfloat16", "passed": True, **variant.row()}
    broken = {key: value for key, value in row.items() if key != "passed"} | {"failed": "killed by SIGSEGV"}

    def passed(*lines: dict) -> bool:
        return Bench(True, 0, lines).passed(variant, torch.bfloat16)

    assert passed(row)
    assert not passed()
    assert not passed(row, row | {"passed": False})
    assert not passed(row, broken)
    assert not passed(row | {"dtype": "float16"})
    assert passed(row, broken | {"tile": {"block_t": 1}})
    assert not Bench(True, 0, [row | {"passed": False}]).broke(variant, torch.bfloat16)
    assert Bench(True, 0, [row, broken]).broke(variant, torch.bfloat16)
    backward = row | Variant("hopper", "hopper", "backward", 128, hopper_tiles.backward_tile(128)).row()
    assert Bench(True, 0, [row]).passed_backends(128, torch.bfloat16) == []
    assert Bench(True, 0, [row, backward]).passed_backends(128, torch.bfloat16) == ["hopper"]


@pytest.mark.parametrize("step", [smoke, rounds])
def test_a_variant_that_crashed_is_not_tried_again(step):
    names = [case.name for case in step(Bench(True, 0))]
    variant = next(variant for variant in Bench(True, 0).variants(128, torch.float32) if not variant.shipped)
    broken = {"step": "smoke", "case": "x", "dtype": "float32", "failed": "no row for 12 s", **variant.row()}
    left = [case.name for case in step(Bench(True, 0, [broken]))]
    (gone,) = set(names) - set(left)
    assert gone.startswith(f"{variant.name} {variant.kernel} float32 D=128")


def test_poisoned_memory_has_nan_in_floats_and_no_effect_on_results():
    with poisoned_memory():
        x = torch.empty(3)
        assert all(empty.isnan().all() for empty in (x, torch.empty_like(x), x.new_empty(3)))
        assert torch.empty(3, dtype=torch.int64).dtype == torch.int64
        q = torch.ones(5, 2, 8)
        assert flash_mhf(q, *(torch.ones(2, 2, 3, 8) for _ in range(3))).isfinite().all()


def run_script(*command: str, output: Path | None = None, environment: dict[str, str] | None = None):
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(BENCHMARKS), str(Path(__file__).parent)])}
    where = [] if output is None else ["--output", str(output)]
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / command[0]), *command[1:], *where],
        env={**os.environ, **paths, **(environment or {})},
        capture_output=True,
        text=True,
    )


BROKEN = (
    Step("hangs", 20, "", "broken_steps:hangs", case_limit_s=3),
    Step("kills", 20, "", "broken_steps:kills_itself"),
    Step("fills", 20, "", "broken_steps:fills_memory"),
    Step("raises", 20, "", "broken_steps:raises"),
)


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANS)
def test_every_case_of_a_plan_runs_between_steps_that_break(name, lease, rows):
    plan: Plan = PLANS[name]
    between = [step for pair in zip(plan.steps, BROKEN, strict=False) for step in pair] + [*plan.steps[len(BROKEN) :]]
    code, printed = lease(*between, seconds=900)
    assert code == 1, printed
    lines = rows.read()
    for step in plan.steps:
        assert rows_of(lines, step.name), step.name
        assert not [row for row in rows_of(lines, step.name) if failed(row)]
    wrong = [row["step"] for row in rows_of(lines) if failed(row)]
    broken = [step.name for step in BROKEN if step in between]
    assert wrong == [*broken, "raises"][: len(broken) + ("raises" in broken)]
    complete = [line.split()[0] for line in printed.splitlines() if "  complete" in line]
    assert complete == [step.name for step in between] * 2
    assert FACTS["device"] in printed


@pytest.mark.slow
def test_tune_is_a_step_of_its_own_command(tmp_path):
    done = run_script("tune.py", "--dry-run", "--kernels", "forward,decode", output=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = tmp_path.glob("*.jsonl")
    found = rows_of(read_lines(file)[0], "tune")
    assert {row["kernel"] for row in found} == {"forward", "decode"}
    assert all(row["passed"] and row["speedup"] >= 1 for row in found)
