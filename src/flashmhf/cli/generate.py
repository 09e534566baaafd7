"""flashmhf generate: text from a trained model."""

from typing import Annotated

import typer

from flashmhf.cli.output import Device, Json, emit, pick_device, results_only


def generate(
    model: Annotated[str, typer.Argument(metavar="DIR", help="A trained model with its tokenizer.")],
    prompt: Annotated[str, typer.Option(help="Text to continue; empty starts a new document.")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 200,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")] = 0.8,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 0.95,
    seed: int = 0,
    device: Device = None,
    json: Json = False,
) -> None:
    """Continue a prompt."""
    with results_only():
        from flashmhf.generation import generate as run_generation
        from flashmhf.models.loading import load_model
        from flashmhf.tokenization import load_tokenizer

        loaded = load_model(model).to(pick_device(device))
        continuation = run_generation(
            loaded,
            load_tokenizer(model),
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
        )
    emit({"prompt": prompt, "continuation": continuation}, prompt + continuation, json)
