"""The verdicts of a comparison in words, and what their numbers are."""

from flashmhf.comparison.results import ComparisonResult, Differences
from flashmhf.comparison.settings import ABLATED
from flashmhf.comparison.verdict import BETTER, MAX_SEEDS_NEEDED, MIN_SEEDS, UNDECIDED, WORSE

OUTCOMES = {BETTER: "better", WORSE: "worse", UNDECIDED: "not decided"}


def verdict_lines(result: ComparisonResult) -> list[str]:
    """A sentence per variant but the first of each backbone; of an ablation, about the layer that it changes."""
    first = result.settings.variants[0]
    return [
        _sentence(row.variant, row.effect, ABLATED) if row.ablation else _sentence(row.variant, row.difference, first)
        for row in result.variants
        if row.ablation or row.ffn_type != first
    ]


def outcome(differences: Differences | None) -> str:
    """For a cell of a table."""
    return "" if differences is None else OUTCOMES[differences.verdict.outcome]


def difference_cell(differences: Differences | None) -> str:
    """The mean and, if there are enough seeds, the interval."""
    if differences is None:
        return ""
    found = differences.nats_per_token
    ends = "" if found.interval is None else f" [{found.interval[0]:+.3f}, {found.interval[1]:+.3f}]"
    return f"{found.mean:+.3f}{ends}"


def resolution_cell(differences: Differences | None) -> str:
    resolution = None if differences is None else differences.verdict.resolution
    return "" if resolution is None else f"{resolution:.3f}"


def about_numbers(result: ComparisonResult) -> str:
    """What losses, differences, intervals and resolution are."""
    documents = max((row.documents.number or 0 for row in result.variants), default=0)
    return (
        f"Held-out loss: nats/token on the first {result.settings.document_bytes:,} bytes of each of {documents} "
        "held-out documents, mean ± standard deviation over seeds. Differences are paired by seed and document; from "
        f"{MIN_SEEDS} seeds on with a 95 % interval over seeds (Student's t) and documents (bootstrap). Resolution: "
        "standard deviation over seeds of the difference."
    )


def about_verdicts() -> str:
    """What a verdict is worth."""
    return (
        f"A verdict requires {MIN_SEEDS} seeds that both finished and an interval that excludes 0. If there were no "
        "differences, about one comparison in twenty would have a verdict nevertheless; adding seeds until there is "
        "one makes that more frequent. The number of seeds that would decide is a rough estimate, since it takes mean "
        "and spread of few seeds for the true ones."
    )


def _sentence(name: str, differences: Differences | None, first: str) -> str:
    if differences is None:
        return f"{name} against {first}: no verdict, since no seed of both finished."
    baseline, verdict = differences.baseline, differences.verdict
    seeds = "1 seed" if verdict.seeds == 1 else f"{verdict.seeds} seeds"
    if verdict.outcome != UNDECIDED:
        return f"{name} is {OUTCOMES[verdict.outcome]} than {baseline}: {_in_words(differences)}, {seeds}."
    if verdict.seeds < MIN_SEEDS:
        why = f"a verdict needs {MIN_SEEDS} or more"
    elif verdict.more_documents:
        why = "more seeds alone would not decide, more documents are needed"
    elif verdict.seeds_needed is None:
        why = f"more than {MAX_SEEDS_NEEDED:,} would be needed for a difference of this size"
    else:
        why = f"about {verdict.seeds_needed:,} would decide a difference of this size"
    return f"{name} against {baseline}: not decided by {seeds} ({_in_words(differences)}); {why}."


def _in_words(differences: Differences) -> str:
    """The difference of the held-out losses."""
    found = differences.nats_per_token
    mean = f"held-out loss {found.mean:+.3f} nats/token"
    return (
        mean
        if found.interval is None
        else f"{mean}, 95 % interval {found.interval[0]:+.3f} to {found.interval[1]:+.3f}"
    )
