"""What is benchmarked: the shape of a layer, or models with their batches. Each default is spelled here."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """A FlashMHF layer; the defaults are the paper's 128M model."""

    hidden_size: int = 768
    num_heads: int = 6
    num_subnetworks: int = 8
    subnetwork_size: int = 256

    @property
    def swiglu_size(self) -> int:
        """Width of the SwiGLU with the same matrix FLOPs: its 3 d d_ff against 3 d d_ff + 2 d^2."""
        return self.num_subnetworks * self.subnetwork_size + 2 * self.hidden_size // 3


@dataclass(frozen=True, kw_only=True)
class ModelWorkload:
    """Language models, what they train on, and what they generate.

    Attributes:
        models: presets, JSON files or folders; the first is the baseline of ratios.
        batch_size: sequences per step, and prompts.
        context_length: tokens per sequence, and per prompt.
        new_tokens: to generate after each prompt.
    """

    models: tuple[str, ...] = ("swiglu-tiny", "flashmhf-tiny")
    batch_size: int = 4
    context_length: int = 256
    new_tokens: int = 32
