"""Whole language models: a training step, and generation.

Training is that of `flashmhf train --bf16`: float32 parameters, matrix products in the lower precision, AdamW.
Generation has its parameters in that precision. Parameters, prompts and batches are random.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from flashmhf.benchmarking.measuring import Row, Times, dtype_name, interleaved_times, matmul_call, peak_bytes
from flashmhf.benchmarking.variants import backend_of
from flashmhf.benchmarking.workloads import ModelWorkload
from flashmhf.errors import InputError
from flashmhf.estimates.cost import model_cost
from flashmhf.models.loading import load_config, new_model
from flashmhf.ops.roofline import peak_tflops


def bench_training(
    workload: ModelWorkload, dtype: torch.dtype, device: torch.device, repeats: int, *, backend: str | None = None
) -> list[Row]:
    """Forward, loss, backward and AdamW: tokens/s, MFU by the measured and the data sheet's peak, memory.

    Model FLOPs are three times the forward pass's; what the backward pass recomputes does not count.

    Args:
        backend: of the operator, in place of the configurations' own.
    """
    steps = {name: TrainingStep(_config(name, backend), workload, dtype, device) for name in workload.models}
    matmul, matmul_flops = matmul_call(device, dtype)
    times = interleaved_times({"matmul": matmul, **steps}, device, repeats)
    matmul_tflops = matmul_flops / times["matmul"].median_ms / 1e9
    rows = []
    for name, step in steps.items():
        tflops = step.flops() / times[name].median_ms / 1e9
        peak = peak_tflops(device, half=dtype.itemsize == 2)
        rows.append(
            {
                **_row("training", name, workload, dtype, times),
                "backend": backend_of(step.model, step.batch.numel(), dtype),
                "tokens_per_s": 1e3 * step.batch.numel() / times[name].median_ms,
                "tflops": tflops,
                "matmul_tflops": matmul_tflops,
                "mfu_of_matmul": tflops / matmul_tflops,
                "mfu_of_data_sheet": None if peak is None else tflops / peak,
                "peak_mib": (step.state_bytes() + peak_bytes(step, device)) / 2**20,
            }
        )
    return rows


def bench_generation(
    workload: ModelWorkload,
    dtype: torch.dtype,
    device: torch.device,
    repeats: int,
    *,
    cache: str = "dynamic",
    backend: str | None = None,
) -> list[Row]:
    """Greedy continuation of random prompts: new tokens/s, prefill included, and peak memory.

    Args:
        cache: transformers' `cache_implementation`; with "static" it compiles the model on a GPU.
        backend: of the operator, in place of the configurations' own.
    """
    runs = {name: Generation(_config(name, backend), workload, dtype, device, cache) for name in workload.models}
    times = interleaved_times({**runs}, device, repeats)
    new_tokens = workload.batch_size * workload.new_tokens
    return [
        {
            **_row(f"generation, {cache} cache", name, workload, dtype, times),
            "new_tokens": workload.new_tokens,
            "backend": backend_of(run.model, workload.batch_size, dtype),
            "tokens_per_s": 1e3 * new_tokens / times[name].median_ms,
            "peak_mib": (run.weight_bytes() + peak_bytes(run, device)) / 2**20,
        }
        for name, run in runs.items()
    ]


class TrainingStep:
    """A model, its optimizer and a batch; a call is one step."""

    def __init__(
        self, config: PreTrainedConfig, workload: ModelWorkload, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (workload.batch_size, workload.context_length)
        _check_length(config, workload.context_length)
        self.config = config
        self.model = _build(config, torch.float32, device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.batch = torch.randint(config.vocab_size, shape, device=device)
        self.autocast = functools.partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)

    def __call__(self) -> None:
        with self.autocast():
            loss = self.model(self.batch, labels=self.batch, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def flops(self) -> float:
        """Model FLOPs of a step."""
        cost = model_cost(self.config, self.batch.shape[1])
        return self.batch.numel() * cost.training_flops_per_token

    def state_bytes(self) -> int:
        """Bytes of parameters and optimizer state, which outlive a step."""
        moments = (x for state in self.optimizer.state.values() for x in state.values())
        return sum(x.nbytes for x in (*self.model.parameters(), *moments))


class Generation:
    """A model and prompts; a call generates all new tokens once."""

    def __init__(
        self,
        config: PreTrainedConfig,
        workload: ModelWorkload,
        dtype: torch.dtype,
        device: torch.device,
        cache: str,
    ) -> None:
        _check_length(config, workload.context_length + workload.new_tokens)
        self.model = _build(config, dtype, device).eval()
        self.prompt = torch.randint(config.vocab_size, (workload.batch_size, workload.context_length), device=device)
        self.options = {"max_new_tokens": workload.new_tokens, "cache_implementation": cache}

    def __call__(self) -> Tensor:
        return self.model.generate(
            self.prompt,
            attention_mask=torch.ones_like(self.prompt),
            do_sample=False,
            eos_token_id=None,  # never stops early
            pad_token_id=0,
            **self.options,
        )

    def weight_bytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.model.parameters())


def _config(name: str, backend: str | None) -> PreTrainedConfig:
    config = load_config(name)
    if backend is not None:
        config.backend = backend
    return config


def _build(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> Any:
    with torch.device(device):
        model: nn.Module = new_model(config, dtype)
    return model


def _check_length(config: PreTrainedConfig, length: int) -> None:
    if length > config.max_position_embeddings:
        raise InputError(f"context-length: expected at most the model's {config.max_position_embeddings}, got {length}")


def _row(task: str, name: str, workload: ModelWorkload, dtype: torch.dtype, times: dict[str, Times]) -> Row:
    """What rows of both tasks have in common."""
    return {
        "task": task,
        "model": name,
        "batch_size": workload.batch_size,
        "context_length": workload.context_length,
        "dtype": dtype_name(dtype),
        **vars(times[name]),
        "ratio": times[name].median_ms / times[workload.models[0]].median_ms,
    }
