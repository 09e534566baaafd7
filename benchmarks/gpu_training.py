"""Steps of the plans `third` and `scaling`: SwiGLU and FlashMHF of equal size, trained on the same tokens.

    python benchmarks/training_tokens.py BOOKS/train BOOKS/val .lease/tokens     on a machine that has the text

`trial` measures each contender's tokens/s in each mode of training; `pairs` takes the fastest, and as many tokens and
seeds as fit the time that is left. The contenders of a seed are trained alternately, a tenth of their steps at a time,
and a pair that would not finish does not start. One row per logged step; a run's last has "final": true.
"""

import functools
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashmhf.benchmarking.measuring import Row
from flashmhf.errors import InputError
from gpu_bench import Bench, Case, OutOfTimeError
from gpu_budget import MAX_SEEDS, TOKENS_PER_PARAMETER, Budget, PairCost, fit_budget, seeds_that_fit
from gpu_sizes import CONTENDERS, CONTEXT_LENGTH, SIZES, TOY_VOCABULARY, VOCABULARY, Size, config_of, parameters_of
from gpu_trainer import EAGER_STEPS, ModelInTraining, Recipe
from training_tokens import PARTS, Stream, TokenFiles, read_tokens

TOKENS = Path(".lease/tokens")  # in the repository's root, carried to the machine
TRIAL_STEPS = 10
TOY_BATCH, TOY_CONTEXT, TOY_STEPS, TOY_SEEDS = 2, 16, 20, 3


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Both contenders of one size and seed; everything except the tokens."""

    size: Size
    seed: int
    steps: int
    batch_size: int
    context_length: int = CONTEXT_LENGTH
    recipe: Recipe = field(default_factory=Recipe)
    modes: dict[str, str] = field(default_factory=lambda: dict.fromkeys(CONTENDERS, "eager"))
    validations: int = 10
    toy: bool = False

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.context_length

    def model(self, contender: str, vocab_size: int, device: torch.device, dtype: torch.dtype) -> ModelInTraining:
        """A contender before its first step."""
        model = ModelInTraining(
            config_of(self.size, contender, vocab_size, toy=self.toy),
            self.recipe,
            batch=(self.batch_size, self.context_length),
            steps=self.steps,
            seed=self.seed,
            device=device,
            dtype=dtype,
        )
        model.use(self.modes[contender])
        return model


def trial(bench: Bench, sizes: list[str], modes: list[str]) -> Iterator[Case]:
    """Tokens/s of each contender in each mode, and the seconds until it trains at that speed."""
    for name in sizes:
        for mode in modes[:1] if bench.dry_run else modes:  # a CPU has no graphs
            pair = _pair(bench, SIZES[name], 0, EAGER_STEPS + 1 + TRIAL_STEPS, dict.fromkeys(CONTENDERS, mode))
            for contender in CONTENDERS:
                yield Case(
                    f"{name} {contender} {mode}",
                    functools.partial(_speed, bench, pair, contender),
                    {"size": name, "ffn_type": contender, "mode": mode},
                )


def _speed(bench: Bench, pair: Pair, contender: str) -> list[Row]:
    began = time.perf_counter()
    model = pair.model(contender, TOY_VOCABULARY if pair.toy else VOCABULARY, bench.device, bench.dtype)
    batch = torch.randint(TOY_VOCABULARY, (pair.batch_size, pair.context_length))
    for _ in range(EAGER_STEPS + 1):
        model(batch)
    bench.synchronize()
    started = time.perf_counter()
    losses = [model(batch) for _ in range(TRIAL_STEPS)]
    float(losses[-1])  # waits for the device
    seconds = (time.perf_counter() - started) / TRIAL_STEPS
    speed = {"mode": model.mode, "tokens_per_s": pair.tokens_per_step / seconds, "start_s": started - began}
    return [{"size": pair.size.name, "ffn_type": contender, **speed}]


def pairs(bench: Bench, sizes: list[str]) -> Iterator[Case]:
    """Seed by seed, from the smallest to the largest model.

    Raises:
        InputError: `trial` has no speed of a contender.
    """
    fastest = {name: {contender: _fastest(bench, name, contender) for contender in CONTENDERS} for name in sizes}
    costs = {name: _cost(bench, name, list(fastest[name].values())) for name in sizes}
    earlier = bench.rows("pairs")
    most = TOY_SEEDS if bench.dry_run else MAX_SEEDS
    planned = next((row for row in earlier if "tokens_per_parameter" in row), None)
    if planned is None:
        budget = fit_budget(bench.remaining_s(), list(costs.values()))
        budget = replace(budget, seeds=min(budget.seeds, most))
        yield Case("budget", functools.partial(_budget_row, budget, fastest))
    else:  # resumed: the runs must be as long as those before
        done = min(len({row["seed"] for row in earlier if row.get("final") and row["size"] == name}) for name in sizes)
        tokens = planned["tokens_per_parameter"]
        seeds = done + seeds_that_fit(bench.remaining_s(), list(costs.values()), tokens)
        budget = Budget(tokens_per_parameter=tokens, seeds=min(seeds, most))
    measured_s: dict[str, float] = {}
    for seed in range(budget.seeds):
        for name in sizes:
            size = SIZES[name]
            steps = int(budget.tokens_per_parameter * parameters_of(size)) // (size.batch_size * CONTEXT_LENGTH)
            pair = _pair(bench, size, seed, steps, {key: row["mode"] for key, row in fastest[name].items()})
            expected_s = costs[name].seconds(budget.tokens_per_parameter)
            measure = functools.partial(_train_if_it_fits, bench, pair, expected_s, measured_s)
            yield Case(f"{name} seed {seed}", measure, {"size": name, "seed": seed})


def _budget_row(budget: Budget, fastest: dict[str, dict[str, Row]]) -> list[Row]:
    modes = {f"{name} {contender}": row["mode"] for name, rows in fastest.items() for contender, row in rows.items()}
    failed = {} if budget.seeds else {"failed": "not one seed of both contenders fits the time that is left"}
    return [asdict(budget) | {"modes": modes} | failed]


def _fastest(bench: Bench, size: str, contender: str) -> Row:
    """The row of `trial` whose mode takes a run of this size the least time."""
    rows = [
        row
        for row in bench.rows("trial")
        if (row.get("size"), row.get("ffn_type")) == (size, contender) and "tokens_per_s" in row
    ]
    if not rows:
        raise InputError(f"trial: expected a speed of {contender} at {size}, got none; run the step trial first")
    rows = [{**row, "mode": row["mode"].partition(":")[0]} for row in rows]  # without the reason of a failed capture
    return min(rows, key=lambda row: _cost(bench, size, [row]).seconds(TOKENS_PER_PARAMETER))


def _cost(bench: Bench, size: str, rows: list[Row]) -> PairCost:
    toy_tokens = TOY_STEPS * TOY_BATCH * TOY_CONTEXT
    return PairCost(
        parameters=toy_tokens if bench.dry_run else parameters_of(SIZES[size]),
        start_s=sum(row["start_s"] for row in rows),
        s_per_token=sum(1 / row["tokens_per_s"] for row in rows),
    )


def _pair(bench: Bench, size: Size, seed: int, steps: int, modes: dict[str, str]) -> Pair:
    if bench.dry_run:
        toy: dict[str, Any] = {"batch_size": TOY_BATCH, "context_length": TOY_CONTEXT, "validations": 4, "toy": True}
        return Pair(size=size, seed=seed, steps=TOY_STEPS, modes=modes, **toy)
    return Pair(size=size, seed=seed, steps=max(1, steps), modes=modes, batch_size=size.batch_size)


def _train_if_it_fits(bench: Bench, pair: Pair, expected_s: float, measured_s: dict[str, float]) -> Iterator[Row]:
    """The pair's rows; what pairs of its size took before replaces the estimate of the trial."""
    if measured_s.get(pair.size.name, expected_s) > bench.remaining_s():
        raise OutOfTimeError
    began = time.monotonic()
    yield from train_pair(pair, toy_tokens() if bench.dry_run else _tokens(), bench.device, bench.dtype)
    measured_s[pair.size.name] = time.monotonic() - began


@functools.cache
def _tokens() -> TokenFiles:
    return read_tokens(TOKENS)


def train_pair(pair: Pair, files: TokenFiles, device: torch.device, dtype: torch.dtype) -> Iterator[Row]:
    """Trains both contenders alternately and yields their rows; a loss that is not finite ends both."""
    blocks = _blocks(files.streams["train"], pair).to(device)
    order = _order(len(blocks), pair).to(device)
    held_out = HeldOut(files, pair, device)
    runs = [OneRun(pair, contender, files.vocab_size, held_out, device, dtype) for contender in CONTENDERS]
    step = 0
    for number in range(1, pair.validations + 1):
        until = pair.steps * number // pair.validations
        if until == step:
            continue
        for run in runs:
            row = run.advance(blocks, order, step, until)
            yield row
            if "failed" in row:
                return
        step = until


class HeldOut:
    """The validation tokens in batches, the incomplete last block included."""

    def __init__(self, files: TokenFiles, pair: Pair, device: torch.device) -> None:
        stream, length = files.streams["validation"].to(device), pair.context_length
        self.size = files.sizes["validation"]
        end = len(stream) // length * length
        self.batches = list(stream[:end].view(-1, length).split(pair.batch_size))
        if len(stream) - end > 1:
            self.batches.append(stream[None, end:])
        if not self.batches:
            raise InputError(f"validation tokens: expected at least {length}, got {len(stream)}")

    def loss(self, model: ModelInTraining, *, everything: bool) -> tuple[float, list[float]]:
        """The mean over predicted tokens, and that of each batch; of the first batch only, unless `everything`."""
        batches = self.batches if everything else self.batches[:1]
        losses = model.validate(batches)
        predicted = [batch.shape[0] * (batch.shape[1] - 1) for batch in batches]
        total = sum(loss * count for loss, count in zip(losses, predicted, strict=True))
        return total / sum(predicted), losses


class OneRun:
    """One contender of a pair, and its rows."""

    def __init__(
        self,
        pair: Pair,
        contender: str,
        vocab_size: int,
        held_out: HeldOut,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.pair, self.contender, self.held_out = pair, contender, held_out
        self.model = pair.model(contender, vocab_size, device, dtype)
        self.elapsed_s = 0.0

    def advance(self, blocks: Tensor, order: Tensor, first: int, until: int) -> Row:
        """Trains from one step to another and validates; the row has "failed" if training has diverged."""
        began, size = time.perf_counter(), self.pair.batch_size
        losses = [self.model(blocks[order[step * size : (step + 1) * size]]) for step in range(first, until)]
        loss = float(torch.stack(losses).mean())  # waits for the device
        seconds = time.perf_counter() - began
        self.elapsed_s += seconds
        row = {
            "size": self.pair.size.name,
            "ffn_type": self.contender,
            "seed": self.pair.seed,
            "steps": until,
            "tokens": until * self.pair.tokens_per_step,
        }
        if not math.isfinite(loss):
            return row | {"failed": f"the training loss is {loss}"}
        final = until == self.pair.steps
        validation, parts = self.held_out.loss(self.model, everything=final)
        row |= {
            "train_nats_per_token": loss,
            "validation_nats_per_token": validation,
            "tokens_per_s": (until - first) * self.pair.tokens_per_step / seconds,
            "mode": self.model.mode,
            "elapsed_s": self.elapsed_s,
        }
        return row | self._summary(validation, parts) if final else row

    def _summary(self, validation: float, parts: list[float]) -> Row:
        model, size = self.model, self.held_out.size
        embeddings = model.model.get_input_embeddings().weight.numel()  # tied
        cuda = model.device.type == "cuda"
        return {
            "final": True,
            "parameters": model.model.num_parameters(),
            "parameters_without_embeddings": model.model.num_parameters() - embeddings,
            "validation_bits_per_byte": validation * size.tokens / size.text_bytes / math.log(2),
            "validation_parts_nats_per_token": [round(part, 5) for part in parts],
            "peak_mib": torch.cuda.max_memory_allocated() / 2**20 if cuda else None,
            "batch_size": self.pair.batch_size,
            "context_length": self.pair.context_length,
            "recipe": asdict(self.pair.recipe),
        }


def _blocks(stream: Tensor, pair: Pair) -> Tensor:
    """(N, context length), int32; an incomplete last block is dropped."""
    count = len(stream) // pair.context_length
    if count < pair.batch_size:
        raise InputError(f"tokens: expected at least {pair.tokens_per_step}, got {len(stream)}")
    return stream[: count * pair.context_length].view(count, -1).to(torch.int32)


def _order(blocks: int, pair: Pair) -> Tensor:
    """Indices of blocks for all steps, reshuffled every epoch; the same for all models with a seed."""
    generator = torch.Generator().manual_seed(pair.seed)
    epochs = -(-pair.steps * pair.batch_size // blocks)
    return torch.cat([torch.randperm(blocks, generator=generator) for _ in range(epochs)])


def toy_tokens() -> TokenFiles:
    """A periodic stream for a dry run."""
    stream = torch.arange(4096) % TOY_VOCABULARY
    sizes = {part: Stream(tokens=len(stream), text_bytes=3 * len(stream)) for part in PARTS}
    return TokenFiles(vocab_size=TOY_VOCABULARY, sizes=sizes, streams=dict.fromkeys(PARTS, stream))
