"""flashmhf info: what a model costs, and which backends run here."""

from dataclasses import asdict
from typing import Annotated

import typer

from flashmhf.cli.output import Json, emit, results_only


def info(
    model: Annotated[str | None, typer.Argument(metavar="PRESET|FILE|DIR", show_default=False)] = None,
    context_length: Annotated[int | None, typer.Option(help="For the attention's FLOPs. Default: the longest.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="T of the operator's estimate, or see --gpus.")] = 65536,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="Memory of each of so many and time, --tokens being the whole training's.")
    ] = None,
    sequences: Annotated[int, typer.Option(min=1, help="With --gpus: of the context's length, on a GPU at once.")] = 1,
    utilisation: Annotated[float, typer.Option(help="With --gpus: share of the peak that the model uses.")] = 0.4,
    gpu: Annotated[str, typer.Option(help="Of the estimates: a100, h100, h200, b200 or mi300x.")] = "h200",
    json: Json = False,
) -> None:
    """Parameters, FLOPs and activation bytes/token, backends and why not. Without a model: presets, backends."""
    with results_only():
        from flashmhf.models import preset_names
        from flashmhf.ops.backends import backends

        report: dict = {"model": model}
        if model is None:
            report["presets"] = preset_names()
        else:
            from flashmhf.estimates.cost import model_cost, operator_work
            from flashmhf.models import FlashMHFConfig
            from flashmhf.models.loading import load_config

            config = load_config(model)
            report |= asdict(model_cost(config, context_length))
            if gpus is not None:
                from flashmhf.estimates.memory import plan

                report["plan"] = plan(
                    config,
                    gpus,
                    tokens=tokens,
                    sequences=sequences,
                    context_length=context_length,
                    gpu=gpu,
                    utilisation=utilisation,
                )
            elif isinstance(config, FlashMHFConfig) and config.ffn_type in ("flashmhf", "mhffn", "dense_moe"):
                report["operator"] = operator_work(config, tokens, gpu)
        report["backends"] = backends()
    emit(report, _text(report), json)


def _text(report: dict) -> str:
    lines = []
    if report["model"] is None:
        lines += ["presets: " + ", ".join(report["presets"])]
    else:
        lines += [
            f"{report['model']}: {report['parameters']:,} parameters, "
            f"{report['parameters_without_embeddings']:,} without embeddings",
            f"FLOPs/token at context {report['context_length']}: {report['forward_flops_per_token']:,.0f} forward, "
            f"{report['training_flops_per_token']:,.0f} in training",
            f"each FFN: {report['parameters_per_ffn']:,} parameters; training keeps "
            f"{report['ffn_saved_bytes_per_token']:,.0f} bytes/token of it (bfloat16, its input included)",
        ]
    if "operator" in report:
        operator = report["operator"]
        lines += [f"the operator of one layer, {operator['tokens']:,} tokens in bfloat16; a model, not a measurement:"]
        lines += [
            f"  {name}: {work['gflop']:,.0f} GFLOP, {work['read_mib']:,.0f} MiB read, "
            f"{work['written_mib']:,.0f} MiB written; "
            f"at least {work['least_ms']:.3f} ms on an {operator['gpu']} ({work['bound']}-bound)"
            for name, work in operator.items()
            if name in ("forward", "backward")
        ]
    if "plan" in report:
        lines += _plan_lines(report["plan"])
    lines += ["backends:"]
    lines += [f"  {name}: {'runs here' if reason is None else reason}" for name, reason in report["backends"].items()]
    return "\n".join(lines)


def _plan_lines(plan: dict) -> list[str]:
    lines = [
        f"training on {plan['tokens']:,} tokens with {plan['gpus']} x {plan['gpu']}, {plan['sequences']} x "
        f"{plan['context_length']} tokens at once, bfloat16 autocast, AdamW; estimates, not measurements:",
        f"  {plan['hours']:,.1f} hours, {plan['gpu_hours']:,.1f} GPU hours at {plan['utilisation']:.0%} utilisation",
    ]
    for layout, memory in plan["memory"].items():
        if isinstance(memory, str):
            lines += [f"  {layout}: {memory}"]
        else:
            parts = ", ".join(f"{name} {mib:,.0f}" for name, mib in memory.items() if name != "peak")
            lines += [f"  {layout}: {memory['peak']:,.0f} MiB each at the peak; {parts}"]
    return lines
