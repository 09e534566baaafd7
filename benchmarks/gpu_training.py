"""Steps of the third plan: SwiGLU and FlashMHF models of equal size, trained on the same tokens in the same order.

    python benchmarks/training_tokens.py BOOKS/train BOOKS/val .lease/tokens     on a machine that has the text

One row per logged step, written immediately; the last one of a run has "final": true. On a GPU a step is one CUDA
graph, to exclude host time; if capture fails, training is eager, and `mode` in the rows says so.
"""

import functools
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from flashmhf.benchmarking.layer import describe
from flashmhf.benchmarking.measuring import Row
from flashmhf.errors import InputError
from flashmhf.models import FlashMHFConfig, FlashMHFForCausalLM
from gpu_bench import Bench, Case
from training_tokens import PARTS, Stream, TokenFiles, read_tokens

ATTENTION = "causal_sdpa"
TOKENS = Path(".lease/tokens")  # in the repository's root, carried to the machine
BACKBONE: dict[str, Any] = {
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5,
    "init": "scaled",
}
# 29.6 M parameters with a vocabulary of 8,192, equal to 0.4 %; sub-network widths are multiples of every tile.
FFNS: dict[str, dict[str, Any]] = {
    "swiglu": {"ffn_type": "swiglu", "intermediate_size": 1376},
    "flashmhf": {
        "ffn_type": "flashmhf",
        "intermediate_size": 1024,
        "num_ffn_heads": 4,
        "num_subnetworks": 4,
        "q_norm": True,
    },
}
TOY_BACKBONE = BACKBONE | {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TOY_VOCABULARY = 300
EAGER_STEPS = 4  # before a graph is captured: they allocate the optimizer's state and compile kernels


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """Settings of a run, except its tokens. The learning rate is not tuned for this size."""

    ffn_type: str
    seed: int
    learning_rate: float = 1e-3
    final_learning_rate: float = 0.1  # of the peak, at the end of the cosine
    warmup: float = 0.1  # of the steps
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = 1.0
    batch_size: int = 64
    context_length: int = 1024
    tokens: int = 60_000_000
    validations: int = 10
    backend: str = "auto"

    @property
    def steps(self) -> int:
        return max(1, self.tokens // (self.batch_size * self.context_length))

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, then cosine decay."""
        warmup = max(1, round(self.warmup * self.steps))
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        progress = (step - warmup) / max(1, self.steps - warmup)
        low = self.final_learning_rate
        return self.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress)))


def config_of(run: TrainingRun, vocab_size: int, backbone: dict[str, Any] = BACKBONE) -> FlashMHFConfig:
    """The model of a run."""
    ffn = FFNS[run.ffn_type]
    return FlashMHFConfig(vocab_size=vocab_size, pad_token_id=None, backend=run.backend, **(backbone | ffn))


class Trainer:
    """A model with its optimizer; a call trains on a batch and returns its loss as a tensor."""

    def __init__(self, config: FlashMHFConfig, run: TrainingRun, device: torch.device, dtype: torch.dtype) -> None:
        torch.manual_seed(run.seed)
        AttentionInterface.register(ATTENTION, causal_sdpa)  # without a mask, whose construction synchronizes
        with torch.device(device):
            self.model = FlashMHFForCausalLM._from_config(config, attn_implementation=ATTENTION).train()
        self.run, self.device = run, device
        self.learning_rate = torch.tensor(0.0, device=device)
        options: dict[str, Any] = {"lr": self.learning_rate, "betas": run.betas, "fused": True}
        options |= {"capturable": True} if device.type == "cuda" else {}
        self.optimizer = torch.optim.AdamW(_decayed(self.model, run.weight_decay), **options)
        # No cache of cast weights: a graph would keep reading those of its capture.
        self.autocast = functools.partial(
            torch.autocast, device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False
        )
        self.batch = torch.zeros(run.batch_size, run.context_length, dtype=torch.long, device=device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.loss: Tensor | None = None

    def __call__(self, batch: Tensor, step: int) -> Tensor:
        self.batch.copy_(batch)
        self.learning_rate.fill_(self.run.learning_rate_at(step))
        if self.graph is None:
            return self._step()
        self.graph.replay()
        assert self.loss is not None
        return self.loss

    def capture(self) -> None:
        """Makes later steps replays of a graph; if it raises, steps stay eager."""
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.loss = self._step()
        self.graph = graph

    def _step(self) -> Tensor:
        with self.autocast():
            loss = self.model(self.batch, labels=self.batch, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.run.max_grad_norm, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    @torch.no_grad()
    def validate(self, blocks: Tensor) -> list[float]:
        """Nats/token of each batch of `blocks` (N, context length)."""
        losses = []
        for batch in blocks.split(self.run.batch_size):
            ids = batch.to(self.device, torch.long)
            with self.autocast():
                losses.append(self.model(ids, labels=ids, use_cache=False).loss)
        return torch.stack(losses).float().tolist()


def training(bench: Bench, ffn_type: str, seed: int) -> Iterator[Case]:
    """One run, on the backend that `auto` selects."""
    run = TrainingRun(ffn_type=ffn_type, seed=seed)
    backbone = BACKBONE
    if bench.dry_run:
        run = replace(run, batch_size=2, context_length=16, tokens=20 * 2 * 16, validations=4)
        backbone = TOY_BACKBONE

    def measure() -> Iterator[Row]:
        files = toy_tokens() if bench.dry_run else read_tokens(TOKENS)
        return train(run, files, bench.device, bench.dtype, backbone=backbone)

    yield Case(f"{ffn_type} seed {seed}", measure, {"ffn_type": ffn_type, "seed": seed})


def train(
    run: TrainingRun,
    files: TokenFiles,
    device: torch.device,
    dtype: torch.dtype,
    *,
    backbone: dict[str, Any] = BACKBONE,
) -> Iterator[Row]:
    """Trains one model and yields rows of losses and speed; the last one has more."""
    trainer = Trainer(config_of(run, files.vocab_size, backbone), run, device, dtype)
    blocks, held_out = (_blocks(files.streams[part], run).to(device) for part in ("train", "validation"))
    order = _order(len(blocks), run).to(device)
    log = RunLog(trainer, files, held_out)
    for step in range(run.steps):
        if step == EAGER_STEPS and device.type == "cuda":
            log.mode = _capture(trainer)
            log.restart_clock(step)
        batch = blocks[order[step * run.batch_size : (step + 1) * run.batch_size]]
        log.losses.append(trainer(batch, step).clone())
        if log.is_due(step + 1):
            row = log.row(step + 1)
            yield row
            if "failed" in row:
                return
            log.restart_clock(step + 1)


class RunLog:
    """The rows of one run."""

    def __init__(self, trainer: Trainer, files: TokenFiles, held_out: Tensor) -> None:
        self.trainer, self.files, self.held_out = trainer, files, held_out
        self.run = trainer.run
        self.mode = "eager"
        self.losses: list[Tensor] = []
        self.started = time.perf_counter()
        self.restart_clock(0)

    def restart_clock(self, step: int) -> None:
        """Starts the interval of the next row's speed."""
        self._since, self._since_step = time.perf_counter(), step

    def is_due(self, step: int) -> bool:
        """At even intervals, and at the end."""
        run = self.run
        return step * run.validations // run.steps > (step - 1) * run.validations // run.steps

    def row(self, step: int) -> Row:
        """The interval since the last row; has "failed" if training has diverged."""
        run, final = self.run, step == self.run.steps
        loss = float(torch.stack(self.losses).mean())  # waits for the device
        self.losses = []
        tokens = (step - self._since_step) * run.batch_size * run.context_length
        tokens_per_s = tokens / (time.perf_counter() - self._since)
        common = {"ffn_type": run.ffn_type, "seed": run.seed, "learning_rate": run.learning_rate, "steps": step}
        if not math.isfinite(loss):
            return {**common, "failed": f"the training loss is {loss}"}
        validation = self.trainer.validate(self.held_out if final else self.held_out[: run.batch_size])
        row = {
            **common,
            "tokens": step * run.batch_size * run.context_length,
            "train_nats_per_token": loss,
            "validation_nats_per_token": sum(validation) / len(validation),
            "tokens_per_s": tokens_per_s,
            "mode": self.mode,
            "elapsed_s": time.perf_counter() - self.started,
        }
        return row | self._summary(validation) if final else row

    def _summary(self, validation: list[float]) -> Row:
        size = self.files.sizes["validation"]
        nats = sum(validation) / len(validation)
        cuda = self.trainer.device.type == "cuda"
        return {
            "final": True,
            "parameters": self.trainer.model.num_parameters(),
            "validation_bits_per_byte": nats * size.tokens / size.text_bytes / math.log(2),
            "validation_parts_nats_per_token": [round(part, 5) for part in validation],
            "peak_mib": torch.cuda.max_memory_allocated() / 2**20 if cuda else None,
            "settings": asdict(self.run),
        }


def _capture(trainer: Trainer) -> str:
    """Captures a step; returns the mode of later steps."""
    try:
        trainer.capture()
    except RuntimeError as error:  # an operation that cannot be captured: slower, but still a comparison
        trainer.optimizer.zero_grad(set_to_none=True)
        return f"eager, no graph: {describe(error)}"
    return "graph"


def causal_sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Causal attention with transformers' attention interface; never reads a mask."""
    out = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=options.get("scaling"))
    return out.transpose(1, 2).contiguous(), None


def _decayed(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: weight decay for matrices, none for norms."""
    named = list(model.named_parameters())
    norms = {name for name, parameter in named if "norm" in name or parameter.dim() < 2}
    return [
        {"params": [parameter for name, parameter in named if name not in norms], "weight_decay": weight_decay},
        {"params": [parameter for name, parameter in named if name in norms], "weight_decay": 0.0},
    ]


def _blocks(stream: Tensor, run: TrainingRun) -> Tensor:
    """(N, context length), int32; an incomplete last block is dropped."""
    count = len(stream) // run.context_length
    if count < run.batch_size:
        raise InputError(f"tokens: expected at least {run.batch_size * run.context_length}, got {len(stream)}")
    return stream[: count * run.context_length].view(count, -1).to(torch.int32)


def _order(blocks: int, run: TrainingRun) -> Tensor:
    """Indices of blocks for all steps, reshuffled every epoch; the same for all models with a seed."""
    generator = torch.Generator().manual_seed(run.seed)
    epochs = -(-run.steps * run.batch_size // blocks)
    return torch.cat([torch.randperm(blocks, generator=generator) for _ in range(epochs)])


def toy_tokens() -> TokenFiles:
    """A periodic stream for a dry run."""
    stream = torch.arange(4096) % TOY_VOCABULARY
    sizes = {part: Stream(tokens=len(stream), text_bytes=3 * len(stream)) for part in PARTS}
    return TokenFiles(vocab_size=TOY_VOCABULARY, sizes=sizes, streams=dict.fromkeys(PARTS, stream))
