"""Text from a trained model."""

from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from flashmhf.errors import InputError
from flashmhf.evaluation import check_vocabulary


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
) -> str:
    """Continues `prompt`; returns the continuation alone.

    An empty prompt starts a new document. Temperature 0 always takes the likeliest token.

    Raises:
        InputError: prompt and continuation are longer than the model's context, or the tokenizer is another model's.
    """
    check_vocabulary(model, tokenizer)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"] if prompt else []
    input_ids = torch.tensor([[tokenizer.eos_token_id, *ids]], device=model.device)
    longest = model.config.max_position_embeddings
    if input_ids.shape[1] + max_new_tokens > longest:
        raise InputError(
            f"max-new-tokens: expected at most {max(longest - input_ids.shape[1], 0)} after this prompt "
            f"(the model's context is {longest}), got {max_new_tokens}"
        )
    set_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    output = cast(Any, model).generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        **(sampling if temperature > 0 else {"do_sample": False}),
    )
    return str(tokenizer.decode(output[0, input_ids.shape[1] :], skip_special_tokens=True))
