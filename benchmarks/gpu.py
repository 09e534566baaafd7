"""Everything that needs a GPU, in calls of a few minutes each. Instructions: benchmarks/README.md.

    python benchmarks/gpu.py --plan first|second|third [--steps smoke,op] [--time-limit S] [--output FOLDER] [--dry-run]
    python benchmarks/gpu.py --merge FOLDER...   adds rows to benchmarks/results/gpu.jsonl, writes gpu.md and gpu.png
    python benchmarks/gpu.py --apply             updates the tables of tiles, and what `auto` selects, from those rows

Each row is appended to FOLDER/DEVICE-COMMIT.jsonl as soon as it is measured; FOLDER is $OUT or benchmarks/results/gpu
by default. The same command resumes an incomplete run. `--dry-run` runs the plan on the CPU at toy sizes; with
TRITON_INTERPRET=1 that includes the Triton kernels.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

from gpu_lease import Lease, Outcome
from gpu_plan import PLANS, Step
from gpu_rows import Row, RowFile, UnusableError, failed, file_of, read_lines, rows_of

RESULTS = Path(__file__).parent / "results"
MERGED = RESULTS / "gpu.jsonl"
QUERY_LIMIT_S = 60
LOWER_IS_BETTER = ("ratio",)
MAX_SHOWN = 4  # variants per step, and failures


class StoppedError(Exception):
    """SIGINT or SIGTERM arrived."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--plan", choices=PLANS)
    task.add_argument("--merge", type=Path, nargs="+", metavar="FOLDER")
    task.add_argument("--apply", action="store_true")
    parser.add_argument("--steps", help="comma-separated steps of the plan; default: all")
    add_options(parser)
    arguments = parser.parse_args()
    if arguments.plan:
        steps = _chosen(parser, PLANS[arguments.plan].steps, arguments.steps)
        run_safely(steps, arguments.time_limit or PLANS[arguments.plan].seconds, arguments)
    from gpu_apply import apply  # these import torch
    from gpu_merge import merge

    with one_line_errors():
        print(merge(arguments.merge, MERGED) if arguments.merge else apply(MERGED))


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of all commands that measure."""
    parser.add_argument("--time-limit", type=_seconds, metavar="SECONDS", help="in total; default: the plan's")
    parser.add_argument("--output", type=Path, default=Path(os.environ.get("OUT") or RESULTS / "gpu"))
    parser.add_argument("--dry-run", action="store_true")


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if float(text) > 0:
            return float(text)
    raise argparse.ArgumentTypeError(f"expected seconds above 0, got {text!r}")


def run_safely(steps: tuple[Step, ...], seconds: float, arguments: argparse.Namespace) -> NoReturn:
    """Runs steps and exits."""
    with one_line_errors():
        sys.exit(run(steps, seconds, arguments.output, arguments.dry_run))


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """An error that the user can fix is one line and exit code 2."""
    try:
        yield
    except UnusableError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _chosen(parser: argparse.ArgumentParser, steps: tuple[Step, ...], names: str | None) -> tuple[Step, ...]:
    """The named steps, in the plan's order."""
    known = [step.name for step in steps]
    wanted = known if names is None else names.split(",")
    if unknown := [name for name in wanted if name not in known]:
        parser.error(f"--steps: expected some of {', '.join(known)}, got {unknown[0]!r}")
    return tuple(step for step in steps if step.name in wanted)


def run(steps: tuple[Step, ...], seconds: float, output: Path, dry_run: bool) -> int:
    """Runs steps within a limit and prints their outcomes.

    Returns:
        The exit code: 0 if all steps are complete and right, 1 if not, 130 or 143 after a signal.

    Raises:
        UnusableError: the kernels cannot run here, or rows cannot be written.
    """
    rows = None
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    try:
        with Lease(steps, seconds, output, dry_run) as lease:
            print(_announcement(steps, seconds), flush=True)
            facts = _query_device(dry_run)
            rows = RowFile(file_of(output, facts), facts)
            rows.prepare()
            if corrupt := read_lines(rows.path)[1]:
                print(f"{rows.path}: {corrupt} corrupt lines of an earlier run are ignored", flush=True)
            for outcome in lease.outcomes(rows):
                print(_line(outcome, rows), flush=True)
        return _summarize(lease, rows)
    except StoppedError as stopped:
        kept = "" if rows is None else f"; {len(rows_of(rows.read()))} rows are kept in {rows.path}"
        print(f"interrupted{kept}; the same command resumes")
        return 128 + int(stopped.args[0])


def _interrupt(number: int, frame: FrameType | None) -> None:
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)  # one is enough; children are being killed
    raise StoppedError(number)


def _query_device(dry_run: bool) -> Row:
    """Provenance of this machine and code, or UnusableError with the reason why the kernels cannot run here."""
    command = [sys.executable, str(Path(__file__).with_name("gpu_facts.py")), *(["--dry-run"] if dry_run else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=QUERY_LIMIT_S)
    except subprocess.TimeoutExpired as error:
        raise UnusableError(f"device: expected an answer within {QUERY_LIMIT_S} s, got none") from error
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UnusableError(last if done.returncode == 2 else f"device: cannot be queried: {last}")
    facts: Row = json.loads(done.stdout.splitlines()[-1])
    return facts


def _announcement(steps: tuple[Step, ...], seconds: float) -> str:
    lines = [f"{seconds:.0f} s at most; later steps may use what earlier ones save. First the device is queried."]
    return "\n".join([*lines, *(f"  {step.limit_s:3d} s  {step.name:<14} {step.what}" for step in steps)])


def _line(outcome: Outcome, rows: RowFile) -> str:
    """One line of the table: time, number of rows and of wrong ones, state, best results."""
    step = outcome.step
    found = rows_of(rows.read(), step.name)
    wrong = sum(map(failed, found))
    best = _best(step, found)
    return f"{step.name:<14} {outcome.seconds:4.0f} s {len(found):4d} rows {wrong:3d} wrong  {outcome.state}  {best}"


def _best(step: Step, found: list[Row]) -> str:
    """The best values of a step's main quantity, by variant and pass."""
    if step.shows is None:
        return ""
    sign = -1 if step.shows in LOWER_IS_BETTER else 1
    best: dict[str, float] = {}
    for row in found:
        if isinstance(row.get(step.shows), int | float):  # non-finite values are stored as text
            labels = (row["model"], row.get("backend")) if "model" in row else (row.get("ffn_type"), row.get("variant"))
            name = " ".join(filter(None, (*labels, row.get("kernel") or row.get("measured_pass"))))
            best[name] = max(best.get(name, float("-inf")), sign * row[step.shows])
    ranked = sorted(best.items(), key=lambda item: -item[1])[:MAX_SHOWN]
    return "; ".join([step.shows] * bool(ranked) + [f"{name} {sign * value:.3g}" for name, value in ranked])


def _summarize(lease: Lease, rows: RowFile) -> int:
    """Prints the table and the first failures; returns the exit code."""
    print(f"\n{rows.path.name}: {rows.facts['device']}, torch {rows.facts['torch']}, triton {rows.facts['triton']}")
    for outcome in lease.done:
        print(_line(outcome, rows))
    lines = rows.read()
    names = {outcome.step.name for outcome in lease.done}
    wrong = [row for row in rows_of(lines) if row["step"] in names and failed(row)]
    for row in wrong[:MAX_SHOWN]:
        reason = (
            row.get("failed")
            or f"{row.get('result', 'result')}: error {row.get('error')}, {row.get('changed')} repeats differ"
        )
        print(f"wrong: {row['step']}: {row['case']}: {reason}"[:300])
    left = [outcome.step.name for outcome in lease.done if outcome.state != "complete"]
    if left:
        print(f"incomplete, the same command resumes: {', '.join(left)}")
    return 1 if wrong or left else 0


if __name__ == "__main__":
    main()
