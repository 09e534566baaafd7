"""Runs a comparison in its folder: claim it, train, score, write table and page."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flashmhf.comparison.launcher import run_trials
from flashmhf.comparison.plan import Plan
from flashmhf.comparison.results import collect
from flashmhf.comparison.settings import Comparison
from flashmhf.data.mixing import load_blocks
from flashmhf.data.tokenizer import load_tokenizer
from flashmhf.errors import InputError, RunError
from flashmhf.files import atomic_write, read_json, write_json
from flashmhf.reports.comparison import markdown_table, write_report

SETTINGS_FILE = "compare.json"
GROWING = ("seeds", "variants", "ablations", "learning_rates")  # settings that may be added to


def compare(
    settings: Comparison,
    output_dir: Path,
    progress: Callable[[str], None],
    *,
    jobs: int = 1,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Trains every contender with every seed and writes table.md, results.json and report.html into `output_dir`.

    Each run is a process and a folder of its own under `runs/`, with a model that `flashmhf eval` and `generate` can
    read and a line of JSON for every step. Called again with the same settings, or with further seeds, variants or
    ablations, finished runs are kept and an unfinished one goes on.

    Args:
        settings: what to compare.
        output_dir: new, empty, or holding this comparison.
        progress: called with one line at the start of each run.
        jobs: runs at a time.
        environment: variables of the runs' processes, see `comparison.launcher`.

    Raises:
        InputError: the settings do not fit, or the folder holds something else.
        RunError: no run ended well. Where some did, the results name those that died and leave them out of every mean.
    """
    if jobs < 1:
        raise InputError(f"jobs: expected 1 or more, got {jobs}")
    plan = Plan(settings, output_dir)
    entries = plan.entries
    _check_data(settings)
    _claim(output_dir, settings)
    for entry in entries:
        write_json(plan.config_file(entry), entry.config.to_dict())
    run_trials([run.trial for run in plan.sweep()], jobs, environment, progress)
    runs = plan.final()
    run_trials([run.trial for run in runs], jobs, environment, progress)
    if not any(run.trial.finished for run in runs):
        where = "what they printed" if jobs == 1 else runs[0].trial.log
        raise RunError(f"training failed in every run; {where} says why")
    results = {**collect(settings, plan.sweep(), runs, progress), "jobs": jobs}
    write_json(output_dir / "results.json", results)
    atomic_write(output_dir / "table.md", markdown_table(results) + "\n")
    write_report(results, output_dir / "report.html")
    return results


def _check_data(settings: Comparison) -> None:
    """Reads and tokenises all of it, once for all runs, so that what does not fit is said before the first."""
    load_blocks(settings.data, load_tokenizer(settings.data.tokenizer))


def _claim(output_dir: Path, settings: Comparison) -> None:
    content = sorted(path.name for path in output_dir.iterdir()) if output_dir.is_dir() else []
    if output_dir.exists() and not output_dir.is_dir():
        raise InputError(f"output-dir: expected a folder, got the file {output_dir}")
    mine = json.loads(json.dumps(asdict(settings)))
    if content and SETTINGS_FILE not in content:
        raise InputError(f"output-dir: expected a new or empty folder, got {output_dir} with {', '.join(content[:3])}")
    if content:
        earlier = read_json(output_dir / SETTINGS_FILE)
        for name, value in mine.items():
            if earlier.get(name) != value and not (name in GROWING and _continues(earlier.get(name), value)):
                raise InputError(
                    f"output-dir: {output_dir} holds a comparison with {name} {earlier.get(name)!r}; got {value!r}"
                )
    write_json(output_dir / SETTINGS_FILE, mine)


def _continues(earlier: Any, now: Any) -> bool:
    """Whether a list begins with the earlier one, or a table has all of the earlier one's rows, continued."""
    if isinstance(earlier, list) and isinstance(now, list):
        return now[: len(earlier)] == earlier
    if isinstance(earlier, dict) and isinstance(now, dict):
        return all(name in now and (now[name] == rows or _continues(rows, now[name])) for name, rows in earlier.items())
    return False
