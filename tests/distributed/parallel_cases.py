"""What a tiny model computes in each layout over processes; `test_parallel.py` compares."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from flashmhf.benchmarking.measuring import peak_bytes
from flashmhf.distributed.parallel import shard_parameters, tensor_parallel
from flashmhf.distributed.sharded import load_sharded, save_sharded
from flashmhf.layers import PKV, FlashMHF, SwiGLU
from flashmhf.layers.former_shapes import former_shapes
from flashmhf.models import FlashMHFConfig, FlashMHFForCausalLM
from flashmhf.training.muon import Muon, gate_factors, matrices

BATCH, LENGTH = 4, 12
MODELS: dict[str, dict[str, Any]] = {
    "flashmhf": {"q_norm": True, "init": "scaled", "score_scale": 4.0, "gate_scale": 4.0, "output_scale": 3.0},
    "grouped": {"num_ffn_kv_heads": 2, "gate_type": "softmax", "tie_word_embeddings": True, "mlp_bias": True},
    "recomputed": {"recompute_q": True, "ffn_norm": False},
    "mhffn": {"ffn_type": "mhffn", "init": "scaled"},
    "pkv": {"ffn_type": "pkv"},
    "swiglu": {"ffn_type": "swiglu", "qk_norm": True, "num_key_value_heads": 2},
}
LAYERS = {
    "flashmhf": lambda: FlashMHF(32, 4, 3, 16, q_norm=True, bias=True),
    "pkv": lambda: PKV(32, 4, 16),
    "swiglu": lambda: SwiGLU(32, 48),
}


def build(name: str, **options: Any) -> FlashMHFForCausalLM:
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 50}
    ffn = {"intermediate_size": 48, "num_subnetworks": 1 if name in ("mhffn", "pkv", "swiglu") else 3}
    common = {**sizes, **ffn, "max_position_embeddings": 64, "pad_token_id": 7, "use_cache": False}
    return FlashMHFForCausalLM(FlashMHFConfig(**{**common, **MODELS[name], **options}))


def batch(step: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, 50, (BATCH, LENGTH), generator=generator)


def lay_out(model: nn.Module, layout: str) -> tuple[nn.Module, int, int]:
    """The model in a layout, the index of this rank's part of the batch, and the number of parts."""
    rank, world = dist.get_rank(), dist.get_world_size()
    if layout == "ddp":
        return DistributedDataParallel(model), rank, world
    if layout == "fsdp":
        return shard_parameters(model, init_device_mesh("cpu", (world,))), rank, world
    if layout == "uneven fsdp":  # as accelerate shards: every parameter over its first dimension
        mesh = init_device_mesh("cpu", (world,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh), rank, world
    if layout == "tp":
        return tensor_parallel(model, init_device_mesh("cpu", (world,))), 0, 1
    assert layout == "tp x fsdp"
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("data", "heads"))
    tensor_parallel(model, mesh["heads"])
    return shard_parameters(model, mesh["data"]), mesh["data"].get_local_rank(), world // 2


def mean_over_ranks(loss: Tensor) -> float:
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def full(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def one_step(cases: list[tuple[str, str]]) -> dict[tuple[str, str], tuple[float, dict[str, Tensor]]]:
    """Loss and gradients by model and layout."""
    results = {}
    for name, layout in cases:
        model, part, parts = lay_out(build(name), layout)
        tokens = batch().chunk(parts)[part]
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        gradients = {n.removeprefix("module."): full(p.grad) for n, p in model.named_parameters()}
        results[name, layout] = mean_over_ranks(loss), gradients
    return results


def curve(model: nn.Module, part: int, parts: int, steps: int, optimizer: Optimizer | None = None) -> list[Tensor]:
    """The losses of training with clipped gradients."""
    optimizer = adam(model) if optimizer is None else optimizer
    losses = []
    for _ in range(steps):
        tokens = batch(0).chunk(parts)[part]
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


def in_former_shapes(model: nn.Module) -> nn.Module:
    """With K, U and V as they were; the model computes the same."""
    for name, shape in former_shapes(model).items():
        layer, _, own = name.rpartition(".")
        setattr(model.get_submodule(layer), own, nn.Parameter(model.get_parameter(name).data.view(shape)))
    return model


def adam(model: nn.Module) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def muon(model: nn.Module) -> Optimizer:
    model = model.module if isinstance(model, DistributedDataParallel) else model
    groups = [{"params": list(model.parameters()), "weight_decay": 0.1}]
    return Float32Muon(groups, matrices(model), gate_factors(model), lr=1e-2)


class Float32Muon(Muon):
    """Orthogonalises in float32: in bfloat16, rounding makes losses of different layouts drift apart in 20 steps."""

    def step(self, closure: Any = None) -> Any:
        with patch("flashmhf.training.muon.computes_bfloat16", lambda **_: False):
            return super().step(closure)


OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {"adamw": adam, "muon": muon}


def resumed(
    name: str, layouts: list[str], folder: str, *, optimizer: str = "adamw", former: bool = False, **options: Any
) -> dict[tuple[str, str], list[float]]:
    """Losses by both layouts: three steps, a sharded checkpoint, and three more in another layout.

    If `former`, the checkpoint has K, U and V in their former shape.
    """
    results = {}
    for first in layouts:
        model, part, parts = lay_out(
            in_former_shapes(build(name, **options)) if former else build(name, **options), first
        )
        first_half = OPTIMIZERS[optimizer](model)
        curve(model, part, parts, 3, first_half)
        save_sharded(Path(folder) / first, model, first_half)
        for second in layouts:
            model, part, parts = lay_out(build(name, **options, init="reference"), second)
            second_half = OPTIMIZERS[optimizer](model)
            load_sharded(Path(folder) / first, model, second_half)
            losses = curve(model, part, parts, 3, second_half)
            results[first, second] = [mean_over_ranks(loss) for loss in losses]
    return results


def curves(cases: list[tuple[str, str, str]], steps: int) -> dict[tuple[str, str, str], list[float]]:
    """Losses by optimizer, model and layout."""
    results = {}
    for optimizer, name, layout in cases:
        model, part, parts = lay_out(build(name), layout)
        losses = curve(model, part, parts, steps, OPTIMIZERS[optimizer](model))
        results[optimizer, name, layout] = [mean_over_ranks(loss) for loss in losses]
    return results


def muon_collectives(name: str, layouts: list[str]) -> dict[str, int]:
    """The number of collectives in a step of Muon, by layout."""
    counts = {}
    for layout in layouts:
        model, part, parts = lay_out(build(name), layout)
        optimizer = muon(model)
        model(batch().chunk(parts)[part], labels=batch().chunk(parts)[part]).loss.backward()
        with CommDebugMode() as step:
            optimizer.step()
        counts[layout] = step.get_total_counts()
    return counts


def collectives() -> dict[str, tuple[int, int]]:
    """The number of collectives in the forward and the backward pass, by layer."""
    mesh: DeviceMesh = init_device_mesh("cpu", (dist.get_world_size(),))
    counts = {}
    for name, make in LAYERS.items():
        layer = tensor_parallel(make(), mesh)
        x = torch.randn(5, 32, requires_grad=True)
        with CommDebugMode() as forward:
            out = layer(x).sum()
        with CommDebugMode() as backward:
            out.backward()
        counts[name] = forward.get_total_counts(), backward.get_total_counts()
    return counts


def training_peak_mib(config: FlashMHFConfig, layout: str | None, sequences: int, length: int) -> float:
    """The allocator's peak, from creating the model to its third step."""

    def train() -> None:
        model, parts = FlashMHFForCausalLM(config), 1
        if layout is not None:
            model, _, parts = lay_out(model, layout)
        assert parts in (1, 2)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        tokens = torch.zeros(sequences, length, dtype=torch.int64)
        for _ in range(3):
            model(tokens, labels=tokens, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    with patient_collectives():
        return peak_bytes(train, torch.device("cpu")) / 2**20


@contextmanager
def patient_collectives() -> Iterator[None]:
    """Waits longer for collectives: gloo's threads release buffers some time after one has ended."""
    wait = dist.Work.wait

    def wait_longer(work: dist.Work, *arguments: Any) -> bool:
        done = wait(work, *arguments)
        time.sleep(0.02)
        return done

    dist.Work.wait = wait_longer
    try:
        yield
    finally:
        dist.Work.wait = wait
