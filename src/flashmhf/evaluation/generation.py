"""Text from trained models."""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from flashmhf.data.tokenizer import load_tokenizer
from flashmhf.errors import InputError
from flashmhf.evaluation.non_finite import finite_logits
from flashmhf.models.checks import check_vocabulary
from flashmhf.models.loading import check_folder, load_model

logger = logging.getLogger(__name__)

SET_HERE = {  # of a generation_config.json: what `generate` sets itself, and what has no effect on the text
    *("bos_token_id", "eos_token_id", "pad_token_id", "do_sample", "temperature", "top_p", "top_k"),
    *("max_length", "max_new_tokens", "use_cache", "output_attentions", "output_hidden_states"),
    *("_from_model_config", "transformers_version"),
}


@dataclass(frozen=True)
class Sample:
    """A prompt and how a model continued it."""

    model: str
    prompt: str
    seed: int
    continuation: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def sample_models(
    folders: Sequence[str], prompts: Sequence[str], device: torch.device, *, seed: int = 0, **options: Any
) -> list[Sample]:
    """Every prompt continued by every model, prompt by prompt, each from the same seed.

    A sample is what `generate` returns for its model, prompt and seed; it does not depend on the other models and
    prompts. One model at a time is in memory.

    Args:
        folders: trained models with their tokenizers.
        prompts: texts to continue.
        device: where to run.
        seed: of every sample.
        options: see `generate`.

    Raises:
        InputError: see `load_model`, `load_tokenizer` and `generate`.
    """
    for folder in folders:
        check_folder(folder)  # before the first one generates
    written = {}
    for folder in folders:
        model, tokenizer = cast(Any, load_model(folder)).to(device), load_tokenizer(folder)
        for prompt in prompts:
            written[folder, prompt] = generate(model, tokenizer, prompt, seed=seed, **options)
    return [Sample(folder, prompt, seed, written[folder, prompt]) for prompt in prompts for folder in folders]


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
    """Continues `prompt`; returns only the continuation.

    An empty prompt starts a new document. Temperature 0 is greedy decoding.

    Raises:
        InputError: prompt and continuation are longer than the model's context, or the tokenizer is another model's.
        RunError: the model's logits are not finite.
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
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    options: dict[str, Any] = sampling if temperature > 0 else {"do_sample": False}
    own = GenerationConfig(eos_token_id=end, pad_token_id=end if pad is None else pad)
    with _generation_config(model, own), finite_logits(model):
        output = cast(Any, model).generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=max_new_tokens,
            trust_remote_code=False,
            **options,
        )
    return str(tokenizer.decode(output[0, input_ids.shape[1] :], skip_special_tokens=True))


@contextlib.contextmanager
def _generation_config(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Gives a model other settings for generation than those that it came with: beam search and penalties would give
    other text than the options say, and some settings download code."""
    own = cast(Any, model).generation_config
    unused = sorted(own.to_diff_dict().keys() - SET_HERE)
    if unused:
        logger.warning("generation_config.json: %s: not used", ", ".join(unused))
    cast(Any, model).generation_config = config
    try:
        yield
    finally:
        cast(Any, model).generation_config = own
