"""flashmhf bench: time and memory of operator and layer."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from flashmhf.cli.output import Device, Json, emit, pick_device, results_only

Tokens = Annotated[str, typer.Option(help="Numbers of tokens, with commas.")]
Dtypes = Annotated[str, typer.Option(help="Of float32, bfloat16, float16, with commas.")]
Variants = Annotated[
    str | None,
    typer.Option(
        help="The first is what the ratios refer to. Default: swiglu,naive,flashmhf, or reference,blockwise for op."
    ),
]
Repeats = Annotated[int, typer.Option(min=1, help="Timed calls of each variant.")]
HiddenSize = Annotated[int, typer.Option(min=1)]
Output = Annotated[
    str | None, typer.Option(help="Also write the rows, with machine, versions and commit, to this JSON.")
]


DEFAULT_VARIANTS = {"layer": "swiglu,naive,flashmhf", "op": "reference,blockwise"}


def bench(
    kind: Annotated[Literal["layer", "op"], typer.Argument(help="Whole layers, or the operator on its backends.")],
    tokens: Tokens = "4096",
    dtypes: Dtypes = "float32,bfloat16",
    variants: Variants = None,
    repeats: Repeats = 7,
    hidden_size: HiddenSize = 768,
    num_heads: HiddenSize = 6,
    num_subnetworks: HiddenSize = 8,
    subnetwork_size: HiddenSize = 256,
    device: Device = None,
    output: Output = None,
    json: Json = False,
) -> None:
    """Time and memory: FlashMHF against SwiGLU of equal FLOPs and a naive layer, or backend against backend."""
    with results_only():
        import torch

        from flashmhf import benchmarking
        from flashmhf.errors import InputError
        from flashmhf.ops.backends import backends

        names = tuple((variants or DEFAULT_VARIANTS[kind]).split(","))
        known = ("swiglu", "naive", "flashmhf") if kind == "layer" else tuple(backends())
        for name in names:
            if name not in known:
                raise InputError(f"variants: expected some of {', '.join(known)}, got {name!r}")
        run = benchmarking.bench_layer if kind == "layer" else benchmarking.bench_op
        shape = benchmarking.Shape(hidden_size, num_heads, num_subnetworks, subnetwork_size)
        picked = pick_device(device)
        rows = []
        for dtype in dtypes.split(","):
            if dtype not in ("float32", "bfloat16", "float16"):
                raise InputError(f"dtypes: expected float32, bfloat16 or float16, got {dtype!r}")
            for count in tokens.split(","):
                if not count.isdigit() or int(count) < 1:
                    raise InputError(f"tokens: expected whole numbers above 0, got {count!r}")
                typer.echo(f"{kind}: {count} tokens, {dtype}", err=True)
                try:
                    rows += run(shape, int(count), getattr(torch, dtype), picked, repeats, names)
                except ValueError as error:
                    raise InputError(str(error)) from error
        result = {**benchmarking.provenance(), "shape": vars(shape), "rows": benchmarking.as_dicts(rows)}
        if output is not None:
            from flashmhf.training import write_json

            write_json(Path(output), result)
    emit(result, benchmarking.markdown(rows), json)
