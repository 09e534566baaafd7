"""Sizes that do not depend on the width or the cut into heads, and learning rates by fan-in."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import coordinate_check
import sweep_width
from coordinate_check import Case, measure
from flashmhf.data.config import DataConfig
from flashmhf.errors import InputError
from flashmhf.models import FlashMHFConfig, FlashMHFForCausalLM
from flashmhf.models.loading import load_model
from flashmhf.training.arguments import parse_arguments
from flashmhf.training.config import TrainConfig
from flashmhf.training.learning_rates import learning_rate_factors, scale_learning_rates
from flashmhf.training.run import train
from flashmhf.training.run_files import TrainResult
from tiny import tiny_model

INNER = {"scores", "gate", "ffn"}


def spread(values: list[float]) -> float:
    return max(values) / min(values)


def spreads(init: str, by_fan_in: bool, cuts: list[tuple[int, int]], variant: str) -> dict[str, tuple[float, float]]:
    """part -> how far the sizes, and the changes, of models of (width, heads) lie apart, as a factor."""
    measured = [measure(Case(variant, init, by_fan_in, width, heads)) for width, heads in cuts]
    return {
        part: (spread([m[part][0] for m in measured]), spread([m[part][1] for m in measured])) for part in measured[0]
    }


@pytest.mark.parametrize("variant", ["flashmhf", "mhffn", "swiglu"])
def test_sizes_and_changes_do_not_grow_with_the_width(variant):
    widths = [(64, 1), (256, 4)]
    scaled = spreads("scaled", True, widths, variant)
    if variant == "flashmhf":  # at width 64 it has one sub-network, whose gate is constant
        scaled["gate"] = spreads("scaled", True, [(128, 2), (512, 8)], variant)["gate"]
    for part in INNER & set(scaled):
        assert scaled[part][0] < 1.5, part
        assert scaled[part][1] < 2.5, part
    reference = spreads("reference", False, widths, variant)
    assert max(max(reference[part]) for part in scaled if part in INNER) > 3
    assert spreads("scaled", False, widths, variant)["ffn"][1] > 1.5 * scaled["ffn"][1]


def test_sizes_and_changes_do_not_depend_on_the_number_of_heads():
    cuts = [(256, 1), (256, 16)]
    scaled, reference = (spreads(init, False, cuts, "flashmhf") for init in ("scaled", "reference"))
    for part in INNER:
        assert max(scaled[part]) < 2, part
        assert max(reference[part]) > 3, part


def small(variant: str, **values: object) -> FlashMHFForCausalLM:
    heads = 2 if variant != "swiglu" else None
    bias = variant != "dense_moe"  # which has no projections
    defaults = {"num_ffn_heads": heads, "ffn_type": variant, "mlp_bias": bias, "init": "reference"}
    return tiny_model(**(defaults | values))


def named_factors(model: nn.Module, base_width: int) -> dict[str, float]:
    factors = learning_rate_factors(model, base_width)
    return {name: factors.get(parameter, 1.0) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("variant", ["flashmhf", "mhffn", "dense_moe", "swiglu"])
def test_every_matrix_of_a_scaled_model_gets_the_same_factor(variant):
    q_norm = variant in ("flashmhf", "mhffn")
    factors = named_factors(small(variant, num_subnetworks=3, init="scaled", q_norm=q_norm), 16)
    full = {name for name in factors if "norm" in name or "bias" in name or "embed" in name}
    assert {name for name, factor in factors.items() if factor == 1.0} == full
    assert {factor for name, factor in factors.items() if name not in full} == {0.5}


def test_without_scales_a_fan_in_of_one_head_gets_a_larger_learning_rate():
    factors = named_factors(small("flashmhf", num_subnetworks=3), 32)
    own = {name: factors[f"model.layers.0.mlp.{name}"] for name in ("k", "u", "v", "gate_weight", "in_proj.weight")}
    assert own == pytest.approx({"k": 2, "u": 2, "v": 3, "gate_weight": 2, "in_proj.weight": 1})


def test_a_tied_embedding_and_the_rows_of_pkv_keep_the_learning_rate():
    factors = named_factors(small("pkv", tie_word_embeddings=True), 16)
    assert factors["model.embed_tokens.weight"] == factors["model.layers.0.mlp.k"] == 1
    assert factors["model.layers.0.mlp.v"] == 1
    assert factors["model.layers.0.mlp.in_proj.weight"] == 0.5
    assert named_factors(small("pkv"), 16)["lm_head.weight"] == 0.5


def test_groups_keep_who_decays_and_how_fast():
    first, second, third = (nn.Parameter(torch.ones(2)) for _ in range(3))
    groups = [{"params": [first, second], "weight_decay": 0.1}, {"params": [third], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    scale_learning_rates(optimizer, {first: 0.25})
    found = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert found == {id(first): (0.0025, 0.4), id(second): (0.01, 0.1), id(third): (0.01, 0.0)}
    assert optimizer.param_groups[0]["lr"] == 0.01  # what the Trainer logs
    for parameter in (first, second):
        parameter.grad = torch.zeros(2)
    optimizer.step()
    assert torch.equal(first, second)


FLAGS = ["--per-device-train-batch-size", "4", "--report-to", "none", "--disable-tqdm", "true", "--save-steps", "3"]
FLAGS += ["--max-steps", "6", "--eval-strategy", "no", "--learning-rate", "1e-2"]


def start(run: TrainConfig, folder: Path, *flags: str, resume: bool = False) -> TrainResult:
    return train(run, parse_arguments([*FLAGS, *flags], str(folder)), resume=resume)


def test_a_run_with_scaled_learning_rates_resumes(corpus_folder, model_file, tmp_path):
    run = TrainConfig(
        model=str(model_file),
        data=DataConfig(source=str(corpus_folder), context_length=32, validation_tokens=2048),
        optimizer="adamw",
        mup_base_width=8,
    )
    start(run, tmp_path / "uninterrupted")
    start(run, tmp_path / "cut")
    state = torch.load(tmp_path / "cut/checkpoint-3/optimizer.pt", weights_only=True)
    rates = {(group["initial_lr"], group["weight_decay"]) for group in state["param_groups"]}
    assert rates == {(1e-2, 0.1), (2.5e-3, 0.4), (1e-2, 0.0)}
    shutil.rmtree(tmp_path / "cut/checkpoint-6")
    start(run, tmp_path / "cut", resume=True)
    first, second = (load_model(str(tmp_path / name)).state_dict() for name in ("uninterrupted", "cut"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = replace(run, mup_base_width=None)
    with pytest.raises(InputError, match="mup_base_width of the earlier run, 8, got None"):
        start(other, tmp_path / "cut", resume=True)


def test_a_base_width_must_be_positive(corpus_folder, model_file, tmp_path):
    run = TrainConfig(
        model=str(model_file),
        data=DataConfig(source=str(corpus_folder), context_length=32),
        optimizer="adamw",
        mup_base_width=0,
    )
    with pytest.raises(InputError, match="mup-base-width: expected a hidden size of at least 1, got 0"):
        start(run, tmp_path / "run")


def test_the_scripts_find_exponents_and_match_parameters():
    widths = [64, 256, 1024]
    assert coordinate_check.exponent(widths, [3 * math.sqrt(width) for width in widths]) == pytest.approx(0.5)
    for width in (64, 128, 256):
        runs = [sweep_width.Run(variant, width, 1e-3) for variant in ("flashmhf", "swiglu")]
        configs = [FlashMHFConfig(**sweep_width.configuration(run)) for run in runs]
        counts = [FlashMHFForCausalLM(config).num_parameters() for config in configs]
        assert spread(counts) < 1.01
    stored = Path(sweep_width.__file__).parent / "results/sweep_width.jsonl"
    known = set(sweep_width.runs())
    fields = sweep_width.Run.__dataclass_fields__
    found = [json.loads(line) for line in stored.read_text().splitlines()]
    assert {sweep_width.Run(**{name: row[name] for name in fields}) for row in found} <= known
