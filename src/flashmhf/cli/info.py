"""flashmhf info: what a model costs, and which backends run here."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashmhf.cli.output import Json, emit, results_only
from flashmhf.names import check_model

if TYPE_CHECKING:
    from flashmhf.estimates.cost import ModelCost, OperatorCost
    from flashmhf.estimates.memory import TrainingEstimate
    from flashmhf.estimates.presets import PresetSize
    from flashmhf.reports.table import Table

TINY = 2**23  # parameters: the presets below come first
HAVE_OPERATOR = ("flashmhf", "mhffn", "dense_moe")  # as ffn_type


def info(
    model: Annotated[str | None, typer.Argument(metavar="PRESET|FILE|DIR", show_default=False)] = None,
    context_length: Annotated[
        int | None, typer.Option(help="For the attention's FLOPs. Default: the model's maximum.")
    ] = None,
    tokens: Annotated[
        int, typer.Option(min=1, help="Of the operator's estimate; with --gpus, of the complete training run.")
    ] = 65536,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="Estimate a training run on this many GPUs: memory of each, and hours.")
    ] = None,
    sequences: Annotated[int, typer.Option(min=1, help="With --gpus: sequences per GPU and step.")] = 1,
    utilisation: Annotated[float, typer.Option(help="With --gpus: MFU, the share of peak throughput.")] = 0.4,
    gpu: Annotated[str, typer.Option(help="For the estimates: a100, h100, h200, b200 or mi300x.")] = "h200",
    json: Json = False,
) -> None:
    """Parameters, FLOPs and saved bytes per token, and backends. Without a model: presets and backends."""
    if model is not None:
        check_model(model)
    with results_only():
        from flashmhf.ops.backends import backends, interprets_triton

        report: dict[str, Any] = {"model": model}
        if model is None:
            from flashmhf.estimates.presets import preset_sizes

            sizes = preset_sizes()
            report["presets"] = {name: asdict(size) for name, size in sizes.items()}
            lines = [_presets_table(sizes).aligned(), ""]
        else:
            from flashmhf.estimates.cost import model_cost, operator_cost
            from flashmhf.models import FlashMHFConfig
            from flashmhf.models.loading import load_config

            config = load_config(model)
            cost = model_cost(config, context_length)
            report |= asdict(cost)
            lines = _cost_lines(model, cost)
            if gpus is not None:
                from flashmhf.estimates.memory import TrainingSetup, estimate_training

                setup = TrainingSetup(
                    gpus=gpus, gpu=gpu, tokens=tokens, sequences=sequences, context_length=context_length, bf16=True,
                    utilisation=utilisation,
                )  # fmt: skip
                estimate = estimate_training(config, setup)
                report["training"] = asdict(estimate)
                lines += _training_lines(estimate)
            elif isinstance(config, FlashMHFConfig) and config.ffn_type in HAVE_OPERATOR:
                operator = operator_cost(config, tokens, gpu)
                report["operator"] = asdict(operator)
                lines += _operator_lines(operator)
        report["backends"] = backends()
        lines += ["backends:"]
        runs = {"triton": "runs here, in Triton's interpreter"} if interprets_triton() else {}
        for name, reason in report["backends"].items():
            lines.append(f"  {name}: {reason or runs.get(name, 'runs here')}")
    emit(report, "\n".join(lines), json)


def _presets_table(sizes: "dict[str, PresetSize]") -> "Table":
    """Parameters (tied embeddings once), width, layers, attention heads, and the feed-forward layer's sizes."""
    from flashmhf.reports.table import Table

    columns = ["preset", "parameters", "width", "layers", "attention", "FFN: H, E x F"]
    order = sorted(
        sizes.items(), key=lambda item: (item[1].parameters > TINY, item[0].split("-")[0], item[1].parameters)
    )
    rows = [
        [
            name,
            f"{size.parameters / 1e6:,.1f} M",
            size.hidden_size,
            size.num_hidden_layers,
            size.num_attention_heads,
            _ffn(size),
        ]
        for name, size in order
    ]
    return Table(columns, rows)


def _ffn(size: "PresetSize") -> str:
    rows = f"{size.intermediate_size:,}"
    if size.num_subnetworks is not None:
        rows = f"{size.num_subnetworks} x {size.subnetwork_size}"
    return rows if size.num_heads is None else f"{size.num_heads}, {rows}"


def _cost_lines(model: str, cost: "ModelCost") -> list[str]:
    return [
        f"{model}: {cost.parameters:,} parameters, {cost.parameters_without_embeddings:,} without embeddings",
        f"FLOPs/token at context {cost.context_length}: {cost.forward_flops_per_token:,.0f} forward, "
        f"{cost.training_flops_per_token:,.0f} in training",
        f"each FFN: {cost.parameters_per_ffn:,} parameters; training saves "
        f"{cost.ffn_saved_bytes_per_token:,.0f} bytes/token of it (bfloat16, its input included)",
    ]


def _operator_lines(operator: "OperatorCost") -> list[str]:
    lines = [f"the operator of one layer, {operator.tokens:,} tokens in bfloat16; a model, not a measurement:"]
    for name, work in (("forward", operator.forward), ("backward", operator.backward)):
        lines.append(
            f"  {name}: {work.gflop:,.0f} GFLOP, {work.read_mib:,.0f} MiB read, {work.written_mib:,.0f} MiB written; "
            f"at least {work.min_ms:.3f} ms on an {operator.gpu} ({work.bound}-bound)"
        )
    return lines


def _training_lines(estimate: "TrainingEstimate") -> list[str]:
    setup = estimate.setup
    lines = [
        f"training on {setup.tokens:,} tokens with {setup.gpus} x {setup.gpu}, {setup.sequences} x "
        f"{setup.context_length} tokens per step and GPU, bfloat16 autocast, AdamW; estimates, not measurements:",
        f"  {estimate.hours:,.1f} hours, {estimate.gpu_hours:,.1f} GPU hours at {setup.utilisation:.0%} utilisation",
    ]
    for parallelism, memory in estimate.memory.items():
        if isinstance(memory, str):
            lines.append(f"  {parallelism}: {memory}")
        else:
            parts = ", ".join(f"{name} {mib:,.0f}" for name, mib in vars(memory).items() if name != "peak")
            lines.append(f"  {parallelism}: peak {memory.peak:,.0f} MiB per GPU; {parts}")
    return lines
