"""Runs a comparison in its folder: claim it, train, score, write the results."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from flashmhf.comparison.evaluate import HeldOut
from flashmhf.comparison.launcher import train_runs
from flashmhf.comparison.plan import Plan, Run
from flashmhf.comparison.results import RESULTS_FILE, ComparisonResult, write_comparison
from flashmhf.comparison.scoring import score_runs
from flashmhf.comparison.settings import Comparison
from flashmhf.comparison.summary import summarise, unigram_entropy
from flashmhf.data.corpus import load_corpus
from flashmhf.data.mixing import load_blocks
from flashmhf.data.tokenizer import load_tokenizer
from flashmhf.data.tokens import tokenize
from flashmhf.errors import InputError, RunError
from flashmhf.files import read_json, write_json
from flashmhf.training.resuming import LOCK_FILE, only_writer

SETTINGS_FILE = "compare.json"
VERSION = 1  # of its format; folders from before it had one are refused
GROWING = ("seeds", "variants", "ablations", "learning_rates")  # settings that may be extended


def compare(
    settings: Comparison,
    output_dir: Path,
    progress: Callable[[str], None],
    *,
    jobs: int = 1,
    environment: Mapping[str, str] | None = None,
) -> ComparisonResult:
    """Trains every variant with every seed, scores all of them and writes results.json into `output_dir`.

    Each run is a process and has a folder under `runs/`, with a model that `flashmhf eval` and `generate` can read and
    a log of every step. Called again with the same settings, or with further seeds, variants or ablations, it keeps
    finished runs and resumes unfinished ones.

    Args:
        settings: what to compare.
        output_dir: new, empty, or holding this comparison.
        progress: called with one line at the start of each run.
        jobs: runs at a time.
        environment: variables of the runs' processes, see `comparison.launcher`.

    Raises:
        InputError: the settings do not fit, the folder holds something else, or another process compares in it.
        RunError: every run failed. If only some did, the result names them and leaves them out of every mean.
    """
    if jobs < 1:
        raise InputError(f"jobs: expected 1 or more, got {jobs}")
    plan = Plan(settings, output_dir)
    with only_writer(output_dir):
        return _compare(plan, progress, jobs, environment)


def _compare(
    plan: Plan, progress: Callable[[str], None], jobs: int, environment: Mapping[str, str] | None
) -> ComparisonResult:
    settings, output_dir, variants = plan.settings, plan.output_dir, plan.variants
    tokenizer = load_tokenizer(settings.data.tokenizer)
    documents = _held_out_documents(settings, tokenizer)
    _claim(output_dir, settings)
    for variant in variants:
        write_json(plan.config_file(variant), variant.config.to_dict())
    runs = _train(plan, progress, jobs, environment)
    held_out = HeldOut.of(settings, documents, tokenizer)
    scores = score_runs(runs, held_out, jobs, progress)
    unigram = unigram_entropy(tokenize(documents, tokenizer))
    result = summarise(plan, runs, scores, held_out, jobs=jobs, unigram=unigram)
    write_comparison(result, output_dir / RESULTS_FILE)
    return result


def _train(plan: Plan, progress: Callable[[str], None], jobs: int, environment: Mapping[str, str] | None) -> list[Run]:
    """The sweep over learning rates, then the final runs, which it returns."""
    train_runs(plan.sweep(), jobs, environment, progress)
    runs = plan.final()
    train_runs(runs, jobs, environment, progress)
    if not any(run.finished for run in runs):
        where = "their standard error" if jobs == 1 else runs[0].log
        raise RunError(f"training failed in every run; {where} has the reason; the same command tries again")
    return runs


def _held_out_documents(settings: Comparison, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Reads and tokenises all data into the cache, too, so that what does not fit is reported before the first run."""
    data = settings.data
    corpus = load_corpus(data.source, text_column=data.text_column, bad_data=data.bad_data)
    load_blocks(data, tokenizer, corpora=[corpus])
    return corpus.validation


def _claim(output_dir: Path, settings: Comparison) -> None:
    """Writes compare.json, if the folder is free or holds this comparison."""
    if output_dir.exists() and not output_dir.is_dir():
        raise InputError(f"output-dir: expected a folder, got the file {output_dir}")
    content = sorted(path.name for path in output_dir.iterdir() if path.name != LOCK_FILE)
    if content and SETTINGS_FILE not in content:
        raise InputError(f"output-dir: expected a new or empty folder, got {output_dir} with {', '.join(content[:3])}")
    mine = json.loads(json.dumps(asdict(settings)))
    if content:
        earlier = read_json(output_dir / SETTINGS_FILE)
        if earlier.get("version") != VERSION:
            raise InputError(
                f"output-dir: expected version {VERSION} of {output_dir / SETTINGS_FILE}, got "
                f"{earlier.get('version', 'none')}; a comparison by another version of flashmhf cannot be continued"
            )
        for name, value in mine.items():
            if earlier.get(name) != value and not (name in GROWING and _extends(earlier.get(name), value)):
                raise InputError(
                    f"output-dir: {output_dir} holds a comparison with {name} {earlier.get(name)!r}; got {value!r}"
                )
    write_json(output_dir / SETTINGS_FILE, {"version": VERSION, **mine})


def _extends(earlier: Any, now: Any) -> bool:
    """Whether a list begins with the earlier one, or a table has all of the earlier one's rows, or extends them."""
    if isinstance(earlier, list) and isinstance(now, list):
        return now[: len(earlier)] == earlier
    if isinstance(earlier, dict) and isinstance(now, dict):
        return all(name in now and (now[name] == rows or _extends(rows, now[name])) for name, rows in earlier.items())
    return False
