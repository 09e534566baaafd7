"""The model for vLLM, which finds `register` through the entry-point group `vllm.general_plugins`."""

MODEL = "FlashMHFForCausalLM"


def register() -> None:
    """Makes vLLM know the model by its name; vLLM calls it in each of its processes and imports the model if needed."""
    from vllm import ModelRegistry

    ModelRegistry.register_model(MODEL, f"{__name__}.model:{MODEL}")
