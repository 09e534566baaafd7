"""benchmarks/recipe_runs.py and recipe_table.py: a run of two steps, its weights, the recorded rows and the tables."""

import json
import math
from dataclasses import asdict, replace

import pytest
import torch

import recipe_changes
import recipe_rates
import recipe_runs
import recipe_table
from flashmhf.layers import initialisation
from flashmhf.models import FlashMHFConfig, FlashMHFForCausalLM
from recipe_model import FIELDS, RecipeRun, build

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
SIZES |= {"num_key_value_heads": 2}
RESULTS = {"validation_loss", "train_loss", "largest_norm", "median_norm", "parameters", "machine", "torch", "date"}
RECIPE = RecipeRun(
    optimizer="muon",
    learning_rate=4e-3,
    muon_learning_rate=4e-3,
    schedule="linear",
    output_gain=0.3,
    in_proj="orthogonal",
    in_gain=1.0,
    out_proj="orthogonal",
    out_gain=0.3,
    qk_norm=True,
    score_scale=1.0,
    gate_scale=1.0,
)


def made_data(folder):
    blocks = torch.randint(0, 256, (8, 16), generator=torch.Generator().manual_seed(0)).to(torch.int16)
    torch.save([blocks, blocks[:4]], folder)


def made_rows(losses: dict[tuple[str, int], float]) -> list[dict]:
    """Variant and seed -> loss."""
    return [
        asdict(replace(RECIPE, variant=variant, seed=seed)) | {"validation_loss": loss}
        for (variant, seed), loss in losses.items()
    ]


class InThisProcess:
    """As much of a ProcessPoolExecutor as main needs."""

    def __init__(self, *_, **__): ...
    def __enter__(self):
        return self

    def __exit__(self, *_): ...
    def submit(self, function, *arguments):
        from concurrent.futures import Future

        future: Future = Future()
        future.set_result(function(*arguments))
        return future


def test_runs_are_appended_and_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(recipe_runs, "prepare", made_data)
    monkeypatch.setattr(recipe_runs, "ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr(recipe_runs, "build", lambda run: build(run, **SIZES))
    recorded = tmp_path / "recorded.jsonl"
    recorded.write_text(
        "".join(json.dumps(row) + "\n" for row in made_rows({("flashmhf", 0): 1.0, ("swiglu", 0): 1.0}))
    )
    monkeypatch.setattr(recipe_runs, "RECORDED", recorded)
    output = tmp_path / "rows.jsonl"
    command = [str(output), "--change", "steps=2 and batch=2"]
    recipe_runs.main([*command, "--select", "muon and variant=swiglu"])
    (first,) = recipe_runs.read(output)
    assert (first["variant"], first["steps"], set(first)) == ("swiglu", 2, {*FIELDS, *RESULTS})
    assert math.isfinite(first["validation_loss"])
    recipe_runs.main(command)
    assert [row["variant"] for row in recipe_runs.read(output)] == ["swiglu", "flashmhf"]
    assert recipe_runs.read(output)[0] == first
    capsys.readouterr()
    recipe_runs.main([*command, "--list"])
    assert capsys.readouterr().out.strip() == ""
    with pytest.raises(SystemExit, match=r"expected one of variant, .* got 'step'"):
        recipe_runs.main([str(output), "--select", "step=2"])


def test_a_run_is_repeatable_and_muon_steps_matter():
    blocks = torch.randint(0, 256, (8, 16))
    run = replace(RECIPE, steps=3, batch=2)
    losses = [
        recipe_runs.train(changed, blocks, blocks[:2], **SIZES)["validation_loss"]
        for changed in (run, run, replace(run, muon_learning_rate=1e-3), replace(run, row_rate=2.0))
    ]
    assert losses[0] == losses[1]
    assert len(set(losses)) == 3


@pytest.mark.parametrize("variant", ["flashmhf", "swiglu"])
def test_the_recipe_starts_as_the_package_does(variant):
    """RECIPE's explicit values are those of init="scaled" with score_scale = gate_scale = 1, but for the heads."""
    model = build(replace(RECIPE, variant=variant, heads=2))
    scales = {"score_scale": 1.0, "gate_scale": 1.0} if variant == "flashmhf" else {}
    expected = FlashMHFForCausalLM(FlashMHFConfig.from_preset(f"{variant}-tiny", **scales))
    for name, weight in model.state_dict().items():
        tolerance = 5 / math.sqrt(weight.numel())  # of the ratio of two samples, five standard deviations
        std = expected.state_dict()[name].std().item()
        assert weight.std().item() == pytest.approx(std, rel=tolerance), name
    for own, its in zip(model.model.layers, expected.model.layers, strict=True):
        for name in ("score_scale", "gate_scale", "output_scale"):
            assert getattr(own.mlp, name, None) == getattr(its.mlp, name, None)
    if variant == "flashmhf":
        square = model.model.layers[0].mlp.out_proj.weight
        torch.testing.assert_close(square @ square.T, torch.eye(256) * initialisation.SCALED_OUT_GAIN**2)


@pytest.mark.parametrize(("schedule", "last"), [("linear", 1 / 90), ("cosine", 0.1)])
def test_the_schedule(schedule, last):
    run = RecipeRun(steps=100, schedule=schedule)
    factors = [recipe_runs.rate_factor(run, step) for step in range(100)]
    assert factors[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert factors[10] == 1
    assert factors[99] == pytest.approx(last, rel=0.01)


def test_every_recorded_row_is_one_run_with_known_fields():
    rows = recipe_runs.read(recipe_runs.RECORDED)
    assert rows
    assert {frozenset(row) for row in rows} == {frozenset({*FIELDS, *RESULTS})}
    runs = [recipe_runs.run_of(row) for row in rows]
    assert len(set(runs)) == len(runs)
    assert all(math.isfinite(row["validation_loss"]) for row in rows)
    assert {run.optimizer for run in runs} <= {"adamw", "muon"}
    assert {run.schedule for run in runs} <= {"cosine", "linear"}
    assert {kind for run in runs for kind in (run.in_proj, run.out_proj)} <= {"xavier", "orthogonal"}
    assert {run.attention for run in runs} <= {"llama", "fan_in"}
    assert all((run.muon_learning_rate is None) == (run.optimizer == "adamw") for run in runs)


def test_tables_of_made_rows():
    losses = {("swiglu", 0): 1.0, ("swiglu", 1): 2.0, ("swiglu", 2): 9.0, ("flashmhf", 0): 1.5, ("flashmhf", 1): 2.25}
    rows = made_rows(losses)
    assert recipe_table.effort_table(rows).rows[0] == ["flashmhf", 2, 2 * 350 * 8]
    means = {row[0].split(":")[0]: row[2:] for row in recipe_table.settings_table(rows).rows}
    assert means["swiglu"] == ["4.000 +- 4.359 (3)", "0: 1.000, 1: 2.000, 2: 9.000"]
    (line,) = recipe_table.differences_table(rows).rows
    assert line[3:] == ["+0.500, +0.250", "0.177", "3 / 2"]


def test_one_shared_seed_decides_nothing():
    (line,) = recipe_table.differences_table(made_rows({("swiglu", 0): 1.0, ("flashmhf", 0): 1.5})).rows
    assert line[4] == "one seed: not decided"


def test_the_best_setting_is_among_those_with_the_most_seeds():
    rows = made_rows({("swiglu", 0): 1.0, ("swiglu", 1): 1.2, ("flashmhf", 0): 1.5, ("flashmhf", 1): 1.6})
    lucky = asdict(replace(RECIPE, output_gain=0.1)) | {"validation_loss": 0.5}
    (line,) = recipe_table.differences_table([*rows, lucky]).rows
    assert line[3] == "+0.500, +0.400"


def test_a_change_is_measured_on_shared_seeds_only():
    rows = made_rows({("flashmhf", 0): 1.0, ("flashmhf", 1): 2.0, ("flashmhf", 2): 4.0})
    smaller = [row | {"out_gain": 0.1, "validation_loss": row["validation_loss"] + 0.5} for row in rows[:2]]
    cells = recipe_changes.settings([*rows, *smaller, asdict(RECIPE) | {"heads": 2, "validation_loss": 3.0}])
    assert recipe_changes.effect(cells, (RECIPE, {"out_gain": 0.1})) == "1.500 -> 2.000: +0.500 +- 0.000 (2)"
    assert recipe_changes.effect(cells, (RECIPE, {"heads": 2})) == "1.000 -> 3.000: +2.000 (1)"
    assert recipe_changes.effect(cells, (RECIPE, {"heads": 8})) == ""


def test_the_interval_is_students():
    assert recipe_changes.with_interval([1.0, 2.0, 3.0]) == "+2.000 +- 2.484 (3)"  # 4.303 / sqrt(3)


@pytest.mark.parametrize("changes", [recipe_changes.CHANGES, recipe_rates.RATES])
def test_every_change_is_in_the_recorded_rows_and_in_the_documentation(changes):
    rows = recipe_runs.read(recipe_runs.RECORDED)
    table = recipe_changes.changes_table(rows, changes)
    pairs = [pair for change in changes for pair in (change.swiglu, change.flashmhf) if pair]
    assert len([cell for line in table.rows for cell in line[2:] if cell]) == len(pairs)
    for change in changes:
        both = [pair[0] for pair in (change.swiglu, change.flashmhf) if pair]
        assert len({(run.steps, run.batch, run.optimizer, run.learning_rate, run.qk_norm) for run in both}) == 1
    text = (recipe_runs.RECORDED.parents[2] / "docs/parametrisation.md").read_text()
    for shown in (recipe_table.effort_table(rows), recipe_table.recipe_table(rows), table):
        assert shown.markdown() in text
