"""What was measured so far: OUTPUT.json, .md and .png. A later run of that code on that machine completes it."""

import gc
import hashlib
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

import flashmhf
from flashmhf.benchmarking import Row, provenance, table
from flashmhf.benchmarking.layer import describe
from gpu_bench import Bench, Case, OutOfTimeError
from gpu_plots import plot

SAME = ("machine", "torch", "triton", "code")  # what a later run must share with the earlier one

CHECKS = ("correctness", "hopper", "graphs")  # too many rows to show those that passed


def code_hash() -> str:
    """Of the package and the benchmarks: a commit has no name for a changed tree, and a copy of one has no commit."""
    files = [*Path(flashmhf.__file__).parent.rglob("*.py"), *Path(__file__).parent.glob("*.py")]
    contents = sorted(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)
    return hashlib.sha256("".join(contents).encode()).hexdigest()[:12]


class Record:
    """Runs cases in turn until the time is over, and keeps the rows of each as soon as it ends.

    A section of the JSON holds `cases`, the names of those that ran, their `rows`, `elapsed_s`, and whether it is
    `complete`. A case that fails leaves a row that says so.
    """

    def __init__(self, output: Path, bench: Bench) -> None:
        self.output = output
        self.bench = bench
        self.device_broken = False
        self.result: dict[str, Any] = {**provenance(bench.device), "code": code_hash(), "sections": {}}
        file = output.with_suffix(".json")
        if file.exists():
            earlier = json.loads(file.read_text())
            if all(earlier.get(key) == self.result[key] for key in SAME):
                self.result["sections"] = earlier["sections"]

    @property
    def sections(self) -> dict[str, Any]:
        return self.result["sections"]

    def run(self, name: str, cases: Iterable[Case], summarize: Callable[[list[Row]], Any] | None = None) -> None:
        """Runs those cases of a section that did not run yet, as far as the time goes."""
        section = self.sections.setdefault(name, {"complete": False, "elapsed_s": 0.0, "cases": [], "rows": []})
        section["complete"] = False
        for case, measure in cases:
            if case in section["cases"]:
                continue
            if self.bench.remaining_s() <= 0 or self.device_broken:
                break
            started = time.monotonic()
            try:
                rows = self._rows(case, measure)
            except OutOfTimeError:
                break
            finally:
                section["elapsed_s"] += time.monotonic() - started
            section["rows"] += rows
            section["cases"].append(case)
            self._write_json()
        else:
            section["complete"] = True
        if summarize is not None:
            section["summary"] = summarize(section["rows"])
        self.write()

    def _rows(self, case: str, measure: Callable[[], list[Row]]) -> list[Row]:
        try:
            return measure()
        except OutOfTimeError:
            raise
        except Exception as error:  # whatever the compiler or the driver says, the other cases are worth their time
            row = {"case": case, "failed": describe(error)}
        gc.collect()
        if torch.cuda.is_available():
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError:  # after an illegal access nothing runs any more in this process
                self.device_broken = True
        return [row]

    def failures(self) -> list[Row]:
        """Rows of a check that did not pass, and of cases that broke."""
        rows = [row for section in self.sections.values() for row in section["rows"]]
        return [row for row in rows if not row.get("passed", True) or ("case" in row and "failed" in row)]

    def write(self) -> None:
        self._write_json()
        self.output.with_suffix(".md").write_text(self._markdown())
        plot(self.sections, self.output.with_suffix(".png"))

    def _write_json(self) -> None:
        self.output.parent.mkdir(parents=True, exist_ok=True)
        file = self.output.with_suffix(".json")
        file.with_suffix(".partial").write_text(json.dumps(self.result, indent=1))
        file.with_suffix(".partial").replace(file)  # a run that is killed leaves a whole file

    def _markdown(self) -> str:
        """The whole result as tables; of checks that are many, the count and what did not pass."""
        facts = [f"- {key}: {value}" for key, value in self.result.items() if key not in ("sections", "machine")]
        lines = [f"# {self.result['machine']}", "", *facts]
        for name, section in self.sections.items():
            state = "" if section["complete"] else ", incomplete: run the command again"
            lines += ["", f"## {name} ({section['elapsed_s']:.0f} s{state})", ""]
            rows = section["rows"]
            if name in CHECKS:
                failed = [row for row in rows if not row.get("passed", False)]
                lines += [f"{len(rows) - len(failed)} of {len(rows)} results within the error budget.", ""]
                rows = failed
            if rows:
                lines.append(table(rows))
            summary = section.get("summary")
            if summary:
                text = f"```\n{summary}\n```" if isinstance(summary, str) else table([summary])
                lines += ["", text]
        return "\n".join(lines) + "\n"
