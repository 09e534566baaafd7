"""Whether a model fits a context length and a tokenizer."""

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from flashmhf.errors import InputError


def check_context_length(config: PreTrainedConfig, context_length: int | None) -> int:
    """`context_length`, or the model's maximum for None; raises InputError if it exceeds that."""
    longest = int(config.max_position_embeddings)
    if context_length is None:
        return longest
    if not 2 <= context_length <= longest:
        raise InputError(f"context-length: expected 2 to the model's {longest}, got {context_length}")
    return context_length


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises InputError if the tokenizer has more tokens than the model's vocabulary."""
    if len(tokenizer) > model.config.vocab_size:
        raise InputError(
            f"tokenizer: expected at most the model's {model.config.vocab_size} tokens, got {len(tokenizer)}"
        )
