"""Runs a comparison in its folder: claim it, train, score, write the results."""

import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from flashmhf.comparison.claim import Inputs, claim
from flashmhf.comparison.evaluate import HeldOut
from flashmhf.comparison.jobs import count_jobs
from flashmhf.comparison.launcher import Watch, train_runs
from flashmhf.comparison.plan import Plan, Run
from flashmhf.comparison.results import RESULTS_FILE, ComparisonResult, write_comparison
from flashmhf.comparison.scoring import score_runs
from flashmhf.comparison.settings import Comparison
from flashmhf.comparison.summary import summarise, unigram_entropy
from flashmhf.comparison.verdict import MIN_DOCUMENTS, MIN_SEEDS
from flashmhf.data.corpus import Corpus, load_corpus
from flashmhf.data.mixing import load_blocks
from flashmhf.data.tokenizer import load_tokenizer
from flashmhf.data.tokens import tokenize
from flashmhf.errors import InputError, RunError
from flashmhf.files import write_json
from flashmhf.training.resuming import only_writer
from flashmhf.training.run_files import read_fingerprints

logger = logging.getLogger(__name__)


def compare(
    settings: Comparison,
    output_dir: Path,
    progress: Callable[[str], None],
    *,
    jobs: int | None = 1,
    environment: Mapping[str, str] | None = None,
    watch: Watch = nullcontext,
) -> ComparisonResult:
    """Trains every variant with every seed, scores all of them and writes results.json into `output_dir`.

    Each run is a process and has a folder under `runs/`, with a model that `flashmhf eval` and `generate` can read and
    a log of every step. Called again with the same settings, or with further seeds, variants or ablations, it keeps
    finished runs and resumes unfinished ones.

    Args:
        settings: what to compare.
        output_dir: new, empty, or holding this comparison.
        progress: called with one line at the start of each run.
        jobs: runs at a time; None for as many as the machine has room for, see `comparison.jobs`.
        environment: variables of the runs' processes, see `comparison.launcher`.
        watch: the context that each run trains in.

    Raises:
        InputError: the settings do not fit, the folder holds something else, or another process compares in it.
        RunError: every run failed. If only some did, the result names them and leaves them out of every mean.
    """
    if jobs is not None and jobs < 1:
        raise InputError(f"jobs: expected 1 or more, got {jobs}")
    plan = Plan(settings, output_dir)
    if jobs is None:
        jobs = count_jobs(plan, environment or {})
    _warn_of_few("seeds", "seed", len(settings.seeds), MIN_SEEDS, settings)
    with only_writer(output_dir):
        return _compare(plan, progress, jobs, environment, watch)


def _compare(
    plan: Plan, progress: Callable[[str], None], jobs: int, environment: Mapping[str, str] | None, watch: Watch
) -> ComparisonResult:
    settings, output_dir = plan.settings, plan.output_dir
    corpus, tokenizer = prepare(plan)
    _warn_of_few("data", "held-out document", len(corpus.validation), MIN_DOCUMENTS, settings)
    runs = _train(plan, progress, jobs, environment, watch)
    check_same_data(runs, corpus)
    held_out = HeldOut.of(settings, corpus.validation, tokenizer)
    scores = score_runs(runs, held_out, jobs, progress)
    unigram = unigram_entropy(tokenize(corpus.validation, tokenizer))
    result = summarise(plan, runs, scores, held_out, jobs=min(jobs, len(runs)), unigram=unigram)
    write_comparison(result, output_dir / RESULTS_FILE)
    return result


def prepare(plan: Plan) -> tuple[Corpus, PreTrainedTokenizerBase]:
    """Reads the data, claims the folder and writes the configurations; the first two raise what does not fit."""
    settings, variants = plan.settings, plan.variants
    tokenizer = load_tokenizer(settings.data.tokenizer)
    corpus = _corpus(settings, tokenizer)
    claim(plan.output_dir, settings, Inputs.of(settings, corpus.fingerprint, tokenizer))
    for variant in variants:
        write_json(plan.config_file(variant), variant.config.to_dict())
    return corpus, tokenizer


def _warn_of_few(option: str, what: str, number: int, enough: int, settings: Comparison) -> None:
    """One line before the first run if there will be no verdict, since there are fewer than enough."""
    if number < enough and len(list(settings.all_variants())) > 1:
        given = f"1 {what} gives" if number == 1 else f"{number} {what}s give"
        logger.warning("%s: %s no verdict; %d or more do", option, given, enough)


def _train(
    plan: Plan, progress: Callable[[str], None], jobs: int, environment: Mapping[str, str] | None, watch: Watch
) -> list[Run]:
    """The sweep over learning rates, then the final runs, which it returns."""
    train_runs(plan.sweep(), jobs, environment, progress, watch)
    runs = plan.final()
    train_runs(runs, jobs, environment, progress, watch)
    if not any(run.finished for run in runs):
        raise RunError(f"training failed in every run; {runs[0].log} has the reason; the same command tries again")
    return runs


def check_same_data(runs: list[Run], corpus: Corpus) -> None:
    """Raises RunError if a run was trained on other text: each process reads the data itself, perhaps days later."""
    for run in runs:
        inputs = read_fingerprints(run.folder) if run.finished else None
        if inputs is not None and [key for _, key in inputs.data] != [corpus.fingerprint]:
            raise RunError(
                f"data: expected files that do not change between runs, but {run.label} read other text; "
                f"remove {run.folder} to train it again"
            )


def _corpus(settings: Comparison, tokenizer: PreTrainedTokenizerBase) -> Corpus:
    """Reads and tokenises all data into the cache, too, so that what does not fit is reported before the first run."""
    data = settings.data
    corpus = load_corpus(data.source, text_column=data.text_column, bad_data=data.bad_data)
    load_blocks(data, tokenizer, corpora=[corpus])
    return corpus
