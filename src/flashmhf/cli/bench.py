"""flashmhf bench: time and memory of operator, layer and model."""

import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from flashmhf.cli.output import Device, Json, emit, pick_device, results_only
from flashmhf.errors import InputError

Runs = Iterator[tuple[str, Callable[[], list[dict[str, Any]]]]]  # a title, and what measures it
Kind = Literal["op", "layer", "decode", "model"]
KIND_HELP = "The operator on its backends; whole layers; whole layers at few tokens; training and generation of models."
Tokens = Annotated[
    str | None,
    typer.Option(help="Numbers of tokens, with commas. Default: 4096, or 1,2,4,8,16,32,64,128 for decode."),
]
Dtypes = Annotated[str, typer.Option(help="Of float32, bfloat16, float16, with commas.")]
Variants = Annotated[
    str | None,
    typer.Option(
        help="The first is what the ratios refer to. Default: swiglu,naive,flashmhf, or swiglu,flashmhf for decode, "
        "or reference,blockwise for op."
    ),
]
Repeats = Annotated[int, typer.Option(min=1, help="Timed calls of each variant.")]
Size = Annotated[int, typer.Option(min=1, help="Of op, layer and decode.")]
Models = Annotated[
    str | None, typer.Option(help="Of model: presets, files, folders. Default: swiglu-tiny,flashmhf-tiny.")
]
ModelSize = Annotated[int | None, typer.Option(min=1, help="Of model: sequences at a time. Default: 4.")]
ContextLength = Annotated[
    int | None, typer.Option(min=2, help="Of model: tokens of a sequence in training, and of a prompt. Default: 256.")
]
NewTokens = Annotated[int | None, typer.Option(min=1, help="Of model: tokens to generate. Default: 32.")]
Output = Annotated[
    str | None,
    typer.Option(
        metavar="DIR", help="Also write results.json, .csv and .png and report.html there, with machine and versions."
    ),
]
Compare = Annotated[
    str | None, typer.Option(metavar="OLD.json", help="Say what became faster or slower than in that results.json.")
]

DEFAULT_TOKENS = {"op": "4096", "layer": "4096", "decode": "1,2,4,8,16,32,64,128"}
DEFAULT_VARIANTS = {"op": "reference,blockwise", "layer": "swiglu,naive,flashmhf", "decode": "swiglu,flashmhf"}
DEFAULT_MODEL: dict[str, Any] = {
    "models": "swiglu-tiny,flashmhf-tiny",
    "batch_size": 4,
    "context_length": 256,
    "new_tokens": 32,
}
DTYPES = ("float32", "bfloat16", "float16")


def bench(
    kind: Annotated[Kind, typer.Argument(help=KIND_HELP)],
    tokens: Tokens = None,
    dtypes: Dtypes = "float32,bfloat16",
    variants: Variants = None,
    repeats: Repeats = 7,
    hidden_size: Size = 768,
    num_heads: Size = 6,
    num_subnetworks: Size = 8,
    subnetwork_size: Size = 256,
    models: Models = None,
    batch_size: ModelSize = None,
    context_length: ContextLength = None,
    new_tokens: NewTokens = None,
    device: Device = None,
    output: Output = None,
    compare: Compare = None,
    json: Json = False,
) -> None:
    """Time and memory of FlashMHF against SwiGLU of equal FLOPs and others, or of one backend against another."""
    of_layers = {"tokens": tokens, "variants": variants}
    of_models = {
        "models": models, "batch_size": batch_size, "context_length": context_length, "new_tokens": new_tokens
    }  # fmt: skip
    _refuse(kind, of_layers if kind == "model" else of_models)
    with results_only():
        from flashmhf.benchmarking import Shape, check_folder, complete, provenance, read_result, table
        from flashmhf.reports.benchmark_page import write_results

        if output is not None:
            check_folder(Path(output))
        old = None if compare is None else read_result(Path(compare))
        names = _choices("dtypes", dtypes, DTYPES)
        picked = pick_device(device)
        common = {"device": picked, "repeats": repeats}
        sizes: dict[str, Any]
        if kind == "model":
            sizes = DEFAULT_MODEL | {name: given for name, given in of_models.items() if given is not None}
            rows = _measure(kind, _model_runs(names, common, **sizes))
        else:
            shape = Shape(hidden_size, num_heads, num_subnetworks, subnetwork_size)
            sizes = {"shape": vars(shape)}
            rows = _measure(kind, _layer_runs(kind, shape, tokens, variants, names, common))
        result = {"kind": kind, **provenance(picked), **sizes, "rows": rows}
        result["rows"] = complete(result)
        text = [table(rows), *([] if old is None else _compare(old, result))]
        if output is not None:
            write_results(result, Path(output))
    emit(result, "\n".join(text), json)


def _compare(old: dict[str, Any], result: dict[str, Any]) -> list[str]:
    """Adds the comparison to the result; returns what to print of it."""
    from flashmhf.benchmarking import compare_results, comparison_summary, comparison_table, table

    result["comparison"] = comparison = compare_results(old, result)
    return ["", table(comparison_table(comparison)), "", *comparison_summary(comparison)]


def _measure(kind: str, runs: Runs) -> list[dict[str, Any]]:
    from rich.console import Console
    from rich.progress import Progress, TimeElapsedColumn

    rows = []
    chosen = list(runs)
    columns = (*Progress.get_default_columns()[:-1], TimeElapsedColumn())
    # Drawn once a second: more would take the processor away from what is timed.
    with Progress(*columns, console=Console(stderr=True), transient=True, refresh_per_second=1) as bar:
        task = bar.add_task(f"bench {kind}", total=len(chosen))
        for title, run in chosen:
            typer.echo(f"{kind}: {title}", err=True)
            try:
                rows += run()
            except ValueError as error:
                raise InputError(str(error)) from error
            bar.advance(task)
    return rows


def _layer_runs(
    kind: str, shape: Any, tokens: str | None, variants: str | None, dtypes: list[str], common: dict[str, Any]
) -> Runs:
    """What `op`, `layer` and `decode` have to measure."""
    import torch

    from flashmhf.benchmarking import LAYERS, bench_decode, bench_layer, bench_op
    from flashmhf.ops.backends import backends

    measure: dict[str, Callable[..., list[dict[str, Any]]]] = {
        "op": bench_op, "layer": bench_layer, "decode": bench_decode
    }  # fmt: skip
    known = tuple(backends()) if kind == "op" else tuple(LAYERS)
    chosen = tuple(_choices("variants", variants or DEFAULT_VARIANTS[kind], known))
    counts = (tokens or DEFAULT_TOKENS[kind]).split(",")
    for count in counts:
        if not count.isdigit() or int(count) < 1:
            raise InputError(f"tokens: expected whole numbers above 0, got {count!r}")
    for dtype, count in itertools.product(dtypes, counts):
        case = {"tokens": int(count), "dtype": getattr(torch, dtype), "variants": chosen}
        yield f"{count} tokens, {dtype}", functools.partial(measure[kind], shape, **case, **common)


def _model_runs(
    dtypes: list[str], common: dict[str, Any], models: str, batch_size: int, context_length: int, new_tokens: int
) -> Runs:
    """What `model` has to measure."""
    import torch

    from flashmhf.benchmarking.model import bench_generation, bench_training

    for dtype in dtypes:
        case = (tuple(models.split(",")), batch_size, context_length)
        options = {"dtype": getattr(torch, dtype), **common}
        yield f"training, {dtype}", functools.partial(bench_training, *case, **options)
        yield f"generation, {dtype}", functools.partial(bench_generation, *case, new_tokens, **options)


def _refuse(kind: str, options: dict[str, Any]) -> None:
    """Options of other kinds are said to be useless, not passed over."""
    for name, given in options.items():
        if given is not None:
            raise InputError(f"{name.replace('_', '-')}: expected nothing with bench {kind}, got {given!r}")


def _choices(option: str, given: str, known: tuple[str, ...]) -> list[str]:
    names = given.split(",")
    for name in names:
        if name not in known:
            raise InputError(f"{option}: expected some of {', '.join(known)}, got {name!r}")
    return names
