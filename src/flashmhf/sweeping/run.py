"""Runs a sweep in its folder: claim it, train rung by rung, write what was found."""

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

from flashmhf.comparison.jobs import count_jobs
from flashmhf.comparison.launcher import Watch, train_runs
from flashmhf.comparison.plan import Run
from flashmhf.comparison.run import check_same_data, prepare
from flashmhf.comparison.verdict import MIN_SEEDS
from flashmhf.errors import InputError
from flashmhf.sweeping.plan import SweepPlan
from flashmhf.sweeping.results import TUNING_FILE, TuningResult, write_tuning
from flashmhf.sweeping.settings import Sweep
from flashmhf.sweeping.summary import summarise
from flashmhf.training.checkpoints import checkpoints
from flashmhf.training.resuming import only_writer

logger = logging.getLogger(__name__)

WEIGHTS = "*.safetensors"


def sweep(
    settings: Sweep,
    output_dir: Path,
    progress: Callable[[str], None],
    *,
    jobs: int | None = 1,
    environment: Mapping[str, str] | None = None,
    watch: Watch = nullcontext,
) -> TuningResult:
    """Trains the grid of every contender rung by rung and writes sweep.json into `output_dir`.

    Each run is a process with a folder under `runs/`. Called again with the same settings, or with further values of
    the grid, seeds or variants, it keeps finished runs and resumes unfinished ones. Models are kept of the last rung.

    Args:
        settings: what to sweep.
        output_dir: new, empty, or holding this sweep.
        progress: called with one line for each rung and at the start of each run.
        jobs: runs at a time; None for as many as the machine has room for, see `comparison.jobs`.
        environment: variables of the runs' processes, see `comparison.launcher`.
        watch: the context that each run trains in.

    Raises:
        InputError: the settings do not fit, the folder holds something else, or another process sweeps in it.
        RunError: every run of a contender failed.
    """
    if jobs is not None and jobs < 1:
        raise InputError(f"jobs: expected 1 or more, got {jobs}")
    plan = SweepPlan(settings, output_dir)
    if jobs is None:
        jobs = count_jobs(plan.comparison, environment or {})
    if len(settings.seeds) < MIN_SEEDS:
        logger.warning("seeds: fewer than %d hardly tell cells apart, got %d", MIN_SEEDS, len(settings.seeds))
    with only_writer(output_dir):
        corpus, _ = prepare(plan.comparison)
        for rung, number in enumerate(settings.halving.cells):
            runs = plan.runs(rung)
            progress(
                f"rung {rung + 1} of {len(settings.halving.cells)}: {number} cells of each contender, "
                f"{settings.halving.lengths[rung]:,} steps"
            )
            train_runs(runs, jobs, environment, progress, watch)
            plan.check_trained(rung)
            check_same_data(runs, corpus)
            _free_disk(runs, last=rung == len(settings.halving.cells) - 1)
        result = summarise(plan)
        write_tuning(result, output_dir / TUNING_FILE)
    return result


def _free_disk(runs: Sequence[Run], last: bool) -> None:
    """Of finished runs, deletes the checkpoints, and before the last rung the weights: the result holds the loss."""
    for run in runs:
        if run.finished:
            for checkpoint in checkpoints(run.folder):
                shutil.rmtree(checkpoint)
            for weights in () if last else run.folder.glob(WEIGHTS):
                weights.unlink()
