"""FlashMHF in torchtitan: Llama 3 with other feed-forward layers, as a module that torchtitan's trainer loads.

torchrun --nproc-per-node 8 -m torchtitan.train --module torchtitan_model --config flashmhf_debugmodel
python examples/torchtitan_model.py        # without the trainer: a few steps by hand

The first needs this folder in PYTHONPATH. Written against torchtitan 0.3.0. On a CPU, torchtitan finds the config, and
the model is built, initialised and trained by hand; the trainer needs a GPU and was not run. Tensor parallelism is
refused: torchtitan has no sharding for K, U and V.
"""

import argparse
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as nnf
from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.config import ParallelismConfig
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.common.decoder import Decoder
from torchtitan.models.llama3 import config_registry, model_registry
from torchtitan.models.llama3.model import Llama3Model
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.protocols.module import Module
from torchtitan.trainer import Trainer

from flashmhf import FlashMHF


class FlashMHFFeedForward(Module):
    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        dim: int
        hidden_dim: int

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.layer = FlashMHF.like_swiglu(config.dim, config.hidden_dim)

    def reset_parameters(self) -> None:  # torchtitan builds on the meta device and then calls this
        self.layer.reset_parameters()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


class FlashMHFLlama(Llama3Model):
    @dataclass(kw_only=True, slots=True)
    class Config(Llama3Model.Config):
        def update_from_config(self, *, config, **kwargs) -> None:
            if config.parallelism.tensor_parallel_degree > 1:
                raise NotImplementedError("tensor_parallel_degree: expected 1")
            Decoder.Config.update_from_config(self, config=config, **kwargs)  # Llama's sets how w1, w2, w3 are sharded


def flashmhf_registry(flavor: str, attn_backend: str = "flex") -> ModelSpec:
    """torchtitan's Llama 3 of this flavor, with every feed-forward layer replaced."""
    spec = model_registry(flavor, attn_backend=attn_backend)
    for layer in spec.model.layers:
        w1 = layer.feed_forward.w1
        layer.feed_forward = FlashMHFFeedForward.Config(dim=w1.in_features, hidden_dim=w1.out_features)
    values = {field.name: getattr(spec.model, field.name) for field in fields(spec.model)}
    spec.name, spec.model, spec.state_dict_adapter = "flashmhf", FlashMHFLlama.Config(**values), None
    return spec


def flashmhf_debugmodel() -> Trainer.Config:
    """torchtitan's llama3_debugmodel with another model; `--config` names this function."""
    config = config_registry.llama3_debugmodel()
    config.model_spec = flashmhf_registry("debugmodel")
    vocabulary = config.model_spec.model.vocab_size
    config.loss = ChunkedLossWrapper.Config(loss_fn=CrossEntropyLoss.Config(global_vocab_size=vocabulary))
    config.parallelism = ParallelismConfig(spmd_backend="partial_dtensor")
    return config


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    torch.manual_seed(0)
    spec = flashmhf_registry("debugmodel")
    for layer in spec.model.layers:  # torchtitan's own choice, flex attention, has no gradients on a CPU
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    with torch.device("meta"):
        model = spec.model.build()
    model.to_empty(device="cpu")
    model.init_states(buffer_device=torch.device("cpu"))
    print(f"{spec.name} {spec.flavor}: {sum(p.numel() for p in model.parameters()):,} parameters")
    tokens = torch.randint(256, (2, 129))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(1, options.steps + 1):
        loss = nnf.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}: {loss:.3f}")


if __name__ == "__main__":
    main()
