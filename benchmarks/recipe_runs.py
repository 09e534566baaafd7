"""The training runs behind the recipe: models of the demo's size on the standard library, one JSON line per run.

    python benchmarks/recipe_runs.py OUTPUT.jsonl [--select 'muon and steps=400'] [--change 'seed=3'] [--list]

Repeats the runs recorded in benchmarks/results/recipe_runs.jsonl. What OUTPUT has already is kept; delete a line to
repeat its run. `--select` chooses among them (a word is the value of any field), `--change` trains them with other
values, as new runs; `--list` only prints. `recipe_table.py` prints the tables. Two processes of one thread each, one to
three minutes per run. The knobs are documented in `recipe_model.py`.

Ten steps of six settings of this script and of the one that recorded the rows end within 4e-4 nats of each other. How a
repeated run can differ from the recorded one:

- Rounding. The recorded runs had the norm of `qk_norm` around q_proj and k_proj; here it is Qwen3's attention.
- The text is the standard library of the running Python (recorded: 3.11).
- Muon's iterations run in bfloat16 where the CPU has instructions for it (recorded: bfloat16), elsewhere in float32.

Unlike `flashmhf train --optimizer muon`, Muon does not see the fixed scales of FlashMHF's matrices here: score_scale
multiplies the steps of K and U, as in the recorded runs; 1 is what `train` does whatever the scale. Nor are scores
given half the rate here: row_rate=0.5 is what `train` does. As recorded, the weights of `qk_norm` decay; those of all
other norms do not.
"""

import argparse
import json
import math
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from flashmhf.benchmarking.measuring import Row
from flashmhf.benchmarking.provenance import provenance
from flashmhf.training.muon import Muon, matrices
from recipe_model import FIELDS, RecipeRun, build, fade_guides

RECORDED = Path(__file__).parent / "results/recipe_runs.jsonl"
CONTEXT, VALIDATION_TOKENS, BLOCKS, EVALUATION_BATCH, LAST = 256, 2**16, 40_000, 16, 20
BETAS, CLIP, MIN_COSINE, CUTS = (0.9, 0.95), 1.0, 0.1, 4


def optimizer_of(model: nn.Module, run: RecipeRun) -> tuple[torch.optim.Optimizer, dict[str, Tensor]]:
    """The optimizer and, by the parameters' names, the tensors that it updates; they share the parameters' values."""
    of_optimizer = {name: blocks_of(name, parameter.detach(), run) for name, parameter in model.named_parameters()}
    of_muon = matrices(model)
    hidden = {of_optimizer[name] for name, parameter in model.named_parameters() if parameter in of_muon}
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in of_optimizer.items():
        rate = run.learning_rate
        if parameter in hidden:
            if run.optimizer == "muon":
                assert run.muon_learning_rate is not None
                rate = run.muon_learning_rate
            rate *= _factor(name, run)
        elif "embed_tokens" in name or "lm_head" in name:
            rate = run.embedding_learning_rate or rate
        elif "gate_weight" in name:
            rate = run.gate_learning_rate or rate
        decays = "norm" not in name or "self_attn" in name
        groups.setdefault((rate, run.weight_decay if decays else 0.0), []).append(parameter)
    made = [{"params": group, "lr": rate, "weight_decay": decay} for (rate, decay), group in groups.items()]
    if run.optimizer == "muon":
        return Muon(made, dict.fromkeys(hidden, 1.0), betas=BETAS, fused=True), of_optimizer
    return torch.optim.AdamW(made, betas=BETAS, fused=True), of_optimizer


def blocks_of(name: str, matrix: Tensor, run: RecipeRun) -> Tensor:
    """A view (..., m, n) of the values, whose matrices Muon orthogonalises each by itself."""
    if run.blocks == "head" and name.endswith(("mlp.k", "mlp.u", "mlp.v")):
        return matrix.view(run.heads, -1, matrix.shape[-1])
    if run.blocks == "cut" and name.endswith(("gate_proj.weight", "up_proj.weight", "down_proj.weight")):
        m, n = matrix.shape
        return matrix.view(CUTS, m // CUTS, CUTS, n // CUTS).transpose(1, 2)
    return matrix


RATE_FIELDS = {
    "row_rate": ("mlp.k", "mlp.u", "mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "value_rate": ("mlp.v", "mlp.down_proj.weight"),
    "in_rate": ("mlp.in_proj.weight",),
    "out_rate": ("mlp.out_proj.weight",),
    "attention_rate": tuple(f"self_attn.{name}_proj.weight" for name in "qkvo"),
}


def _factor(name: str, run: RecipeRun) -> float:
    return next((getattr(run, field) for field, ends in RATE_FIELDS.items() if name.endswith(ends)), 1.0)


def rate_factor(run: RecipeRun, step: int) -> float:
    """The share of the learning rate in this step."""
    warmup = max(1, round(run.warmup * run.steps))
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, run.steps - warmup)
    if run.schedule == "linear":
        return 1 - done
    return MIN_COSINE + (1 - MIN_COSINE) * 0.5 * (1 + math.cos(math.pi * done))


def train(run: RecipeRun, blocks: Tensor, validation: Tensor, **sizes: int) -> Row:
    """Trains one model on `blocks` (blocks, context) in a random order and returns its row."""
    model = build(run, **sizes)
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(run.seed))
    optimizer, of_optimizer = optimizer_of(model, run)
    rates = [group["lr"] for group in optimizer.param_groups]
    losses, norms = [], []
    for step in range(run.steps):
        fade_guides(model, run, step)
        tokens = blocks[order[(step * run.batch + torch.arange(run.batch)) % len(order)]].long()
        loss = _losses(model, tokens).mean()
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * rate_factor(run, step)
        for name, parameter in model.named_parameters():
            if parameter.grad is None:  # of a guide that has faded out
                of_optimizer[name].grad = None
                continue
            of_optimizer[name].grad = blocks_of(name, parameter.grad, run)
        optimizer.step()
        model.zero_grad()
        losses.append(loss.item())
    warmup = max(1, round(run.warmup * run.steps))
    fade_guides(model, run, run.steps)
    results = {
        "validation_loss": evaluate(model, validation),
        "train_loss": sum(losses[-LAST:]) / len(losses[-LAST:]),
        "largest_norm": max(norms[warmup:]),
        "median_norm": sorted(norms)[len(norms) // 2],
    }
    origin = asdict(provenance(torch.device("cpu")))
    rounded = {name: round(value, 5) for name, value in results.items()}
    size = {"parameters": model.num_parameters()}
    return asdict(run) | rounded | size | {name: origin[name] for name in ("machine", "torch", "date")}


def _losses(model: nn.Module, tokens: Tensor) -> Tensor:
    """The loss of every predicted byte, nats: (blocks, context - 1)."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=tokens).logits
    return nnf.cross_entropy(logits[:, :-1].float().mT, tokens[:, 1:], reduction="none")


@torch.no_grad()
def evaluate(model: nn.Module, validation: Tensor) -> float:
    model.eval()
    return torch.cat([_losses(model, batch.long()) for batch in validation.split(EVALUATION_BATCH)]).mean().item()


def prepare(file: Path) -> None:
    """Writes the first blocks of the standard library, and those of its validation documents."""
    from flashmhf.data.config import DataConfig
    from flashmhf.data.mixing import load_blocks
    from flashmhf.data.tokenizer import load_tokenizer

    config = DataConfig(source="stdlib", context_length=CONTEXT, validation_tokens=VALIDATION_TOKENS)
    data = load_blocks(config, load_tokenizer("bytes"), seed=0)
    parts = [
        torch.stack([torch.as_tensor(blocks[index]["input_ids"]) for index in range(min(size, BLOCKS))])
        for blocks, size in ((data.train, len(data.train)), (data.validation, len(data.validation)))  # type: ignore[arg-type]
    ]
    torch.save([part.to(torch.int16) for part in parts], file)


def train_in_process(run: RecipeRun, data: Path) -> Row:
    torch.set_num_threads(1)
    return train(run, *torch.load(data))


def read(file: Path) -> list[Row]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def run_of(row: Row) -> RecipeRun:
    return RecipeRun(**{name: row[name] for name in FIELDS})


def values_of(text: str) -> Iterator[tuple[str, Any]]:
    """`name=value and name=value`, with JSON values or words; a word by itself has the name ""."""
    for term in filter(None, (part.strip() for part in text.split(" and "))):
        name, _, word = term.rpartition("=")
        if name and name not in FIELDS:
            raise SystemExit(f"expected one of {', '.join(FIELDS)}, got {name!r}")
        try:
            yield name, None if word == "None" else json.loads(word)
        except json.JSONDecodeError:
            yield name, word


def selected(runs: Iterable[RecipeRun], text: str) -> list[RecipeRun]:
    terms = list(values_of(text))
    return [
        run
        for run in runs
        if all(getattr(run, name) == value if name else value in asdict(run).values() for name, value in terms)
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--select", default="", help="only runs with these values: 'muon and steps=400'")
    parser.add_argument("--change", default="", help="train them with these values: 'seed=3'")
    parser.add_argument("--list", action="store_true", help="print the runs that are left and stop")
    arguments = parser.parse_args(argv)
    changes = dict(values_of(arguments.change))
    chosen = [replace(run, **changes) for run in selected(map(run_of, read(RECORDED)), arguments.select)]
    done = {run_of(row) for row in read(arguments.output)}
    waiting = [run for run in dict.fromkeys(chosen) if run not in done]
    if arguments.list:
        for run in waiting:
            print(run)
        return
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(2, max_tasks_per_child=1) as pool:
        if waiting:
            prepare(data := Path(folder) / "data.pt")
        for future in as_completed([pool.submit(train_in_process, run, data) for run in waiting]):
            line = json.dumps(future.result())
            with arguments.output.open("a") as file:
                file.write(line + "\n")
            print(line, flush=True)


if __name__ == "__main__":
    main()
