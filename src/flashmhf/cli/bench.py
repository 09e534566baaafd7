"""flashmhf bench: time and memory of operator, layer and model."""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from flashmhf import extras
from flashmhf.benchmarking.workloads import LayerShape, ModelWorkload
from flashmhf.cli.output import Device, Json, check_folder, emit, pick_device, results_only, table_text
from flashmhf.cli.terminal import say
from flashmhf.errors import InputError

if TYPE_CHECKING:
    from flashmhf.benchmarking.measuring import Row
    from flashmhf.benchmarking.results import BenchmarkResult

Runs = Iterable[tuple[str, Callable[[], "list[Row]"]]]  # titles and measurements
Kind = Literal["op", "layer", "decode", "model"]
KIND_HELP = "The operator on its backends; whole layers; layers with few tokens; training and generation of models."
DEFAULT_TOKENS = {"op": "4096", "layer": "4096", "decode": "1,2,4,8,16,32,64,128"}
DEFAULT_VARIANTS = {"op": "reference,blockwise", "layer": "swiglu,naive,flashmhf", "decode": "swiglu,flashmhf"}
SHAPE, MODELS = LayerShape(), ModelWorkload()
DTYPES = ("float32", "bfloat16", "float16")
Tokens = Annotated[
    str | None,
    typer.Option(help=f"Comma-separated. Default: {DEFAULT_TOKENS['op']}; for decode {DEFAULT_TOKENS['decode']}."),
]
Dtypes = Annotated[str, typer.Option(help="Comma-separated: float32, bfloat16, float16.")]
Variants = Annotated[
    str | None,
    typer.Option(
        help="Comma-separated; the first is the baseline of ratios. Default: "
        + "; ".join(f"{names} for {kind}" for kind, names in DEFAULT_VARIANTS.items())
        + "."
    ),
]
Repeats = Annotated[int, typer.Option(min=1, help="Timed calls per variant.")]
Size = Annotated[int, typer.Option(min=1, help="For op, layer and decode.")]
Models = Annotated[
    str | None, typer.Option(help=f"For model: presets, files, folders. Default: {','.join(MODELS.models)}.")
]
BatchSize = Annotated[
    int | None, typer.Option(min=1, help=f"For model: sequences per step. Default: {MODELS.batch_size}.")
]
ContextLength = Annotated[
    int | None,
    typer.Option(
        min=2, help=f"For model: tokens per training sequence and per prompt. Default: {MODELS.context_length}."
    ),
]
NewTokens = Annotated[
    int | None, typer.Option(min=1, help=f"For model: tokens to generate. Default: {MODELS.new_tokens}.")
]
Output = Annotated[
    str | None,
    typer.Option(
        metavar="DIR", help="Also write results.json, .csv and .png and report.html there, with machine and versions."
    ),
]
Compare = Annotated[
    str | None, typer.Option(metavar="OLD.json", help="Show what became faster or slower since that results.json.")
]


def bench(
    kind: Annotated[Kind, typer.Argument(help=KIND_HELP)],
    tokens: Tokens = None,
    dtypes: Dtypes = "float32,bfloat16",
    variants: Variants = None,
    repeats: Repeats = 7,
    hidden_size: Size = SHAPE.hidden_size,
    num_heads: Size = SHAPE.num_heads,
    num_subnetworks: Size = SHAPE.num_subnetworks,
    subnetwork_size: Size = SHAPE.subnetwork_size,
    models: Models = None,
    batch_size: BatchSize = None,
    context_length: ContextLength = None,
    new_tokens: NewTokens = None,
    device: Device = None,
    output: Output = None,
    compare: Compare = None,
    json: Json = False,
) -> None:
    """Time and memory of FlashMHF against SwiGLU at equal FLOPs and others, or of one backend against another."""
    for_layers = {"tokens": tokens, "variants": variants}
    for_models = {
        "models": models, "batch_size": batch_size, "context_length": context_length, "new_tokens": new_tokens
    }  # fmt: skip
    _refuse(kind, for_layers if kind == "model" else for_models)
    with results_only():
        from flashmhf.benchmarking.provenance import provenance
        from flashmhf.benchmarking.results import BenchmarkResult

        if output is not None or compare is not None:
            extras.check("flashmhf bench --output or --compare", "matplotlib")
        if output is not None:
            check_folder("output", output)
        old = None if compare is None else _earlier(Path(compare))
        names, picked = _choices("dtypes", dtypes, DTYPES), pick_device(device)
        workload: LayerShape | ModelWorkload
        if kind == "model":
            workload = _model_workload(for_models)
            runs = _model_runs(workload, names, device=picked, repeats=repeats)
        else:
            workload = LayerShape(
                hidden_size=hidden_size,
                num_heads=num_heads,
                num_subnetworks=num_subnetworks,
                subnetwork_size=subnetwork_size,
            )
            cases = _layer_cases(kind, tokens, variants, names)
            runs = _layer_runs(kind, workload, cases, device=picked, repeats=repeats)
        rows = tuple(_measure(kind, runs))
        result = BenchmarkResult(kind=kind, provenance=provenance(picked), workload=workload, rows=rows)
        if old is not None:
            result = result.compared_with(old)
        if output is not None:
            from flashmhf.reports.benchmark_page import write_results

            write_results(result, Path(output))
        text = _text(result)
    emit(result.to_json(), text, json)


def _text(result: "BenchmarkResult") -> str:
    from flashmhf.reports.benchmark_tables import comparison_summary, comparison_table, rows_table
    from flashmhf.reports.table import cell

    rows, same = rows_table(result.rows)
    text = [table_text(rows)]
    if same:
        text += ["", "all: " + ", ".join(f"{name} {cell(value)}" for name, value in same.items())]
    if result.comparison is not None:
        text += ["", table_text(comparison_table(result.comparison)), "", *comparison_summary(result.comparison)]
    return "\n".join(text)


def _measure(kind: str, runs: Runs) -> "list[Row]":
    from rich.console import Console
    from rich.progress import Progress, TimeElapsedColumn

    rows = []
    chosen = list(runs)
    columns = (*Progress.get_default_columns()[:-1], TimeElapsedColumn())
    # Once per second: drawing more often would take CPU time from what is measured.
    with Progress(*columns, console=Console(stderr=True), transient=True, refresh_per_second=1) as bar:
        task = bar.add_task(f"bench {kind}", total=len(chosen))
        for title, run in chosen:
            say(f"{kind}: {title}")
            try:
                rows += run()
            except ValueError as error:
                raise InputError(str(error)) from error
            bar.advance(task)
    return rows


def _layer_cases(
    kind: str, tokens: str | None, variants: str | None, dtypes: list[str]
) -> Iterator[tuple[int, str, tuple[str, ...]]]:
    """Tokens, dtype and variants of each measurement of op, layer or decode."""
    from flashmhf.benchmarking.variants import LAYERS
    from flashmhf.ops.backends import backends

    known = tuple(backends()) if kind == "op" else tuple(LAYERS)
    chosen = tuple(_choices("variants", variants or DEFAULT_VARIANTS[kind], known))
    counts = (tokens or DEFAULT_TOKENS[kind]).split(",")
    for count in counts:
        if not count.isdigit() or int(count) < 1:
            raise InputError(f"tokens: expected whole numbers above 0, got {count!r}")
    for dtype, count in itertools.product(dtypes, counts):
        yield int(count), dtype, chosen


def _layer_runs(
    kind: str, shape: LayerShape, cases: Iterable[tuple[int, str, tuple[str, ...]]], **options: Any
) -> Runs:
    import torch

    from flashmhf.benchmarking.decode import bench_decode
    from flashmhf.benchmarking.layer import bench_layer, bench_op

    measure: dict[str, Callable[..., list[Row]]] = {"op": bench_op, "layer": bench_layer, "decode": bench_decode}
    for count, dtype, variants in cases:
        case = {"tokens": count, "dtype": getattr(torch, dtype), "variants": variants}
        yield f"{count} tokens, {dtype}", functools.partial(measure[kind], shape, **case, **options)


def _model_workload(given: dict[str, Any]) -> ModelWorkload:
    chosen = {name: value for name, value in given.items() if value is not None}
    if "models" in chosen:
        chosen["models"] = tuple(chosen["models"].split(","))
    return ModelWorkload(**chosen)


def _model_runs(workload: ModelWorkload, dtypes: list[str], **options: Any) -> Runs:
    import torch

    from flashmhf.benchmarking.model import bench_generation, bench_training

    for dtype in dtypes:
        for title, measure in (("training", bench_training), ("generation", bench_generation)):
            yield f"{title}, {dtype}", functools.partial(measure, workload, dtype=getattr(torch, dtype), **options)


def _earlier(file: Path) -> "BenchmarkResult":
    from flashmhf.benchmarking.results import read_result

    try:
        return read_result(file)
    except InputError as error:
        raise InputError(f"compare: {error}") from error


def _refuse(kind: str, options: dict[str, Any]) -> None:
    """Options that this kind of benchmark does not have are errors."""
    for name, given in options.items():
        if given is not None:
            raise InputError(f"{name.replace('_', '-')}: expected nothing with bench {kind}, got {given!r}")


def _choices(option: str, given: str, known: tuple[str, ...]) -> list[str]:
    names = given.split(",")
    for name in names:
        if name not in known:
            raise InputError(f"{option}: expected some of {', '.join(known)}, got {name!r}")
    return names
