"""flashmhf info: what a model costs, and which backends run here."""

from typing import Annotated

import typer

from flashmhf.cli.output import Json, emit, results_only


def info(
    model: Annotated[str | None, typer.Argument(metavar="PRESET|FILE|DIR", show_default=False)] = None,
    context_length: Annotated[int | None, typer.Option(help="For the attention's FLOPs. Default: the longest.")] = None,
    json: Json = False,
) -> None:
    """Parameters, FLOPs and activation bytes a token, backends and why not. Without a model: presets, backends."""
    with results_only():
        from flashmhf.models import preset_names
        from flashmhf.ops.backends import backends

        report: dict = {"model": model}
        if model is None:
            report["presets"] = preset_names()
        else:
            from flashmhf.accounting import account
            from flashmhf.models.loading import load_config

            report |= account(load_config(model), context_length)
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
            f"FLOPs a token at context {report['context_length']}: {report['forward_flops_per_token']:,.0f} forward, "
            f"{report['training_flops_per_token']:,.0f} in training",
            f"each FFN: {report['parameters_per_ffn']:,} parameters; training keeps "
            f"{report['ffn_saved_bytes_per_token']:,.0f} bytes a token of it (bfloat16, its input included)",
        ]
    lines += ["backends:"]
    lines += [f"  {name}: {'runs here' if reason is None else reason}" for name, reason in report["backends"].items()]
    return "\n".join(lines)
