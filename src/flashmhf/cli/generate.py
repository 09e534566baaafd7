"""flashmhf generate: text from trained models."""

from typing import Annotated

import typer

from flashmhf.cli.output import Device, Json, emit, pick_device, results_only
from flashmhf.names import check_model_folder

MAX_SEED = 2**32 - 1  # of numpy


def generate(
    models: Annotated[
        list[str], typer.Argument(metavar="DIR...", help="Trained models with their tokenizers, side by side.")
    ],
    prompt: Annotated[
        list[str] | None, typer.Option(help="Text to continue; may be repeated. Default: start a new document.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 200,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy decoding.")] = 0.8,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 0.95,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Of every sample.")] = 0,
    device: Device = None,
    json: Json = False,
) -> None:
    """Continue prompts. With several prompts or models, --json prints {"samples": [...]}."""
    for model in models:
        check_model_folder(model)
    with results_only():
        from flashmhf.evaluation.generation import sample_models

        samples = sample_models(
            models,
            prompt or [""],
            pick_device(device),
            seed=seed,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
        )
    if len(samples) == 1:
        (sample,) = samples
        emit(sample.as_dict(), sample.prompt + sample.continuation, json, verbatim=True)
        return
    blocks = [f"--- {sample.model}\n{sample.prompt}{sample.continuation}\n" for sample in samples]
    emit({"samples": [sample.as_dict() for sample in samples]}, "\n".join(blocks), json, verbatim=True)
