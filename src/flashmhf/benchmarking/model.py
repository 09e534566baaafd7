"""Whole language models: a training step, and generation.

Training is what `flashmhf train --bf16` does: float32 parameters, matrix products in the lower precision, AdamW. Models
generate with parameters in that precision. Parameters, prompts and batches are random.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from flashmhf.benchmarking.measuring import Row, interleaved_times, matmul_call, peak_bytes
from flashmhf.benchmarking.variants import backend_of
from flashmhf.errors import InputError
from flashmhf.estimates.cost import model_cost
from flashmhf.models.loading import load_config
from flashmhf.ops.roofline import GPUS, Gpu


def bench_training(
    names: tuple[str, ...],
    batch_size: int,
    context_length: int,
    dtype: torch.dtype,
    device: torch.device,
    repeats: int,
    *,
    backend: str | None = None,
) -> list[Row]:
    """Forward, loss, backward and AdamW: tokens/s, utilisation of the measured and the maker's peak, memory.

    Model FLOPs are three times those of the forward pass; what a backward pass computes again does not count.

    Args:
        names: presets, JSON files or folders; the first is what ratios refer to.
        batch_size, context_length: sequences of a step, tokens of each.
        backend: of the operator, in place of what the configurations say.
    """
    steps = {name: TrainingStep(_config(name, backend), batch_size, context_length, dtype, device) for name in names}
    matmul, matmul_flops = matmul_call(device, dtype)
    times = interleaved_times({"matmul": matmul, **steps}, device, repeats)
    matmul_tflops = matmul_flops / times["matmul"].median_ms / 1e9
    gpu = data_sheet(device)
    rows = []
    for name, step in steps.items():
        tokens = batch_size * context_length
        tflops = tokens * model_cost(step.config, context_length).training_flops_per_token / times[name].median_ms / 1e9
        rows.append(
            {
                **_common("training", name, batch_size, context_length, dtype),
                "backend": backend_of(step.model, tokens, dtype),
                **vars(times[name]),
                "ratio": times[name].median_ms / times[names[0]].median_ms,
                "tokens_per_s": 1e3 * tokens / times[name].median_ms,
                "tflops": tflops,
                "matmul_tflops": matmul_tflops,
                "mfu_of_matmul": tflops / matmul_tflops,
                "mfu_of_data_sheet": None if gpu is None else tflops / _promised_tflops(gpu, dtype),
                "peak_mib": (step.state_bytes() + peak_bytes(step, device)) / 2**20,
            }
        )
    return rows


def bench_generation(
    names: tuple[str, ...],
    batch_size: int,
    prompt_length: int,
    new_tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    repeats: int,
    *,
    cache: str = "dynamic",
    backend: str | None = None,
) -> list[Row]:
    """The likeliest continuation of random prompts: new tokens/s, the prompt's pass included, and peak memory.

    Args:
        names: presets, JSON files or folders; the first is what ratios refer to.
        cache: transformers' `cache_implementation`; with "static" it compiles the model on a GPU.
        backend: of the operator, in place of what the configurations say.
    """
    runs = {
        name: Generation(_config(name, backend), batch_size, prompt_length, new_tokens, dtype, device, cache)
        for name in names
    }
    times = interleaved_times({**runs}, device, repeats)
    return [
        {
            **_common(f"generation, {cache} cache", name, batch_size, prompt_length, dtype),
            "new_tokens": new_tokens,
            "backend": backend_of(run.model, batch_size, dtype),
            **vars(times[name]),
            "ratio": times[name].median_ms / times[names[0]].median_ms,
            "tokens_per_s": 1e3 * batch_size * new_tokens / times[name].median_ms,
            "peak_mib": (run.weight_bytes() + peak_bytes(run, device)) / 2**20,
        }
        for name, run in runs.items()
    ]


class TrainingStep:
    """A model, its optimizer and a batch; a call is one step."""

    def __init__(
        self, config: PreTrainedConfig, batch_size: int, context_length: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        _check_length(config, context_length)
        self.config = config
        self.model = _build(config, torch.float32, device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.batch = torch.randint(config.vocab_size, (batch_size, context_length), device=device)
        self.autocast = functools.partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)

    def __call__(self) -> None:
        with self.autocast():
            loss = self.model(self.batch, labels=self.batch, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state_bytes(self) -> int:
        """Of parameters and optimizer, which outlast a step."""
        moments = (x for state in self.optimizer.state.values() for x in state.values())
        return sum(x.nbytes for x in (*self.model.parameters(), *moments))


class Generation:
    """A model and prompts; a call is one generation of all new tokens."""

    def __init__(
        self,
        config: PreTrainedConfig,
        batch_size: int,
        prompt_length: int,
        new_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        cache: str,
    ) -> None:
        _check_length(config, prompt_length + new_tokens)
        self.model = _build(config, dtype, device).eval()
        self.prompt = torch.randint(config.vocab_size, (batch_size, prompt_length), device=device)
        self.options = {"max_new_tokens": new_tokens, "cache_implementation": cache}

    def __call__(self) -> Tensor:
        return self.model.generate(
            self.prompt,
            attention_mask=torch.ones_like(self.prompt),
            do_sample=False,
            eos_token_id=None,  # never ends early
            pad_token_id=0,
            **self.options,
        )

    def weight_bytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.model.parameters())


def data_sheet(device: torch.device) -> Gpu | None:
    """What the maker promises of a device, if it is one of `GPUS`."""
    if device.type != "cuda":
        return None
    words = torch.cuda.get_device_name(device).lower().replace("-", " ").split()
    return next((gpu for name, gpu in GPUS.items() if name in words), None)


def _promised_tflops(gpu: Gpu, dtype: torch.dtype) -> float:
    return gpu.tflops_16bit if dtype.itemsize == 2 else gpu.tflops_32bit


def _config(name: str, backend: str | None) -> PreTrainedConfig:
    config = load_config(name)
    if backend is not None:
        config.backend = backend
    return config


def _build(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> Any:
    with torch.device(device):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model


def _check_length(config: PreTrainedConfig, length: int) -> None:
    if length > config.max_position_embeddings:
        raise InputError(f"context-length: expected at most the model's {config.max_position_embeddings}, got {length}")


def _common(task: str, name: str, batch_size: int, context_length: int, dtype: torch.dtype) -> Row:
    return {
        "task": task,
        "model": name,
        "batch_size": batch_size,
        "context_length": context_length,
        "dtype": str(dtype).removeprefix("torch."),
    }
