"""The training comparison for a GPU, at toy sizes on the CPU: token files, models of equal size, budget, rows."""

import json
import math
import random
import time
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, TrainingArguments

from flashmhf.comparison.matching import match
from flashmhf.comparison.settings import Variant
from flashmhf.errors import InputError
from flashmhf.models.loading import load_config
from flashmhf.training.config import OPTIMIZERS, TrainConfig
from flashmhf.training.defaults import DEFAULTS, LEARNING_RATES, MIN_LR_RATE
from gpu_bench import Bench, OutOfTimeError
from gpu_budget import MIN_SEEDS, TOKENS_PER_PARAMETER, PairCost, fit_budget, table
from gpu_sizes import CONFIGS, CONTENDERS, SIZES, config_of, cost_of
from gpu_trainer import Recipe
from gpu_training import Pair, pairs, train_pair, trial
from training_tokens import read_tokens, write_tokens

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def token_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefgh", k=generator.randint(2, 6))) for _ in range(60)]
    for part, count in (("train", 6), ("validation", 2)):
        (folder / part).mkdir()
        for i in range(count):
            (folder / part / f"{i}.txt").write_text(" ".join(generator.choices(words, k=1500)))
    write_tokens({part: str(folder / part) for part in ("train", "validation")}, folder / "tokens", 400)
    return folder / "tokens"


TOY = Pair(
    size=SIZES["1m"],
    seed=0,
    steps=20,
    batch_size=4,
    context_length=32,
    recipe=Recipe(),
    validations=4,
    toy=True,
)


@pytest.fixture(scope="module")
def toy_rows(token_folder):
    torch.set_num_threads(1)
    return list(train_pair(TOY, read_tokens(token_folder), CPU, torch.float32))


def test_contenders_train_alternately_and_learn(toy_rows, token_folder):
    assert [(row["ffn_type"], row["steps"]) for row in toy_rows] == [
        (contender, steps) for steps in (5, 10, 15, 20) for contender in CONTENDERS
    ]
    size = read_tokens(token_folder).sizes["validation"]
    for contender in CONTENDERS:
        rows = [row for row in toy_rows if row["ffn_type"] == contender]
        assert rows[-1]["validation_nats_per_token"] < rows[0]["validation_nats_per_token"] - 0.3
        assert [row.get("final", False) for row in rows] == [False, False, False, True]
        per_byte = rows[-1]["validation_nats_per_token"] * size.tokens / size.text_bytes / math.log(2)
        assert rows[-1]["validation_bits_per_byte"] == pytest.approx(per_byte)
        assert rows[-1]["mode"] == "eager"
    json.dumps(toy_rows)


def test_the_last_validation_is_the_mean_over_all_tokens(toy_rows, token_folder):
    stream = read_tokens(token_folder).streams["validation"]
    blocks, rest = divmod(len(stream), TOY.context_length)
    predicted = [TOY.batch_size * 31] * (blocks // 4) + [blocks % 4 * 31] * (blocks % 4 > 0) + [rest - 1] * (rest > 1)
    parts = toy_rows[-1]["validation_parts_nats_per_token"]
    mean = sum(part * count for part, count in zip(parts, predicted, strict=True)) / sum(predicted)
    assert toy_rows[-1]["validation_nats_per_token"] == pytest.approx(mean, abs=1e-4)


def test_a_run_is_determined_by_its_seed(toy_rows, token_folder):
    files = read_tokens(token_folder)
    again, other = (
        next(iter(train_pair(replace(TOY, seed=seed), files, CPU, torch.float32)))["train_nats_per_token"]
        for seed in (0, 1)
    )
    assert toy_rows[0]["train_nats_per_token"] == again != other


def test_a_pair_that_diverges_ends_with_a_failure(token_folder):
    recipe = Recipe(learning_rate=1e30)
    rows = list(train_pair(replace(TOY, recipe=recipe), read_tokens(token_folder), CPU, torch.float32))
    assert "failed" in rows[-1]
    assert not any(row.get("final") for row in rows)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
def test_contenders_are_matched_as_flashmhf_compare_matches_them(size):
    recipe = load_config(str(CONFIGS / f"{size.name}.json"))
    assert match(recipe, Variant("swiglu")).intermediate_size == size.swiglu_width
    assert recipe.hidden_size == 64 * recipe.num_hidden_layers
    assert recipe.num_ffn_heads == math.ceil(recipe.hidden_size / 128)  # heads of up to 128
    one, two = (cost_of(size, contender).parameters_without_embeddings for contender in CONTENDERS)
    assert one == pytest.approx(two, rel=0.005)


def test_the_recipe_is_the_default_of_flashmhf_train():
    recipe = Recipe()
    assert recipe.optimizer == TrainConfig.optimizer
    assert recipe.learning_rate == LEARNING_RATES[recipe.optimizer]
    assert recipe.lr_scheduler_type == DEFAULTS["lr_scheduler_type"]
    assert recipe.lr_scheduler_kwargs == {"min_lr_rate": MIN_LR_RATE}
    assert recipe.betas == (TrainingArguments.adam_beta1, DEFAULTS["adam_beta2"])
    assert recipe.weight_decay == DEFAULTS["weight_decay"]
    assert recipe.max_grad_norm == TrainingArguments.max_grad_norm


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "sgd"}, "optimizer: expected adamw or muon, got 'sgd'"),
        ({"mup_base_width": 64}, "mup_base_width: expected None with muon, got 64"),
    ],
)
def test_recipes_that_do_not_exist(options, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**options)


def test_attention_equals_transformers_causal_attention():
    model = TOY.model("swiglu", 400, CPU, torch.float32).model
    usual = AutoModelForCausalLM.from_config(config_of(TOY.size, "swiglu", 400, toy=True), attn_implementation="eager")
    usual.load_state_dict(model.state_dict())
    ids = torch.randint(400, (2, 24))
    assert torch.allclose(model(ids).logits, usual(ids).logits, atol=1e-5)


class NoValues(TorchDispatchMode):
    """Raises if a tensor's value is read, which would synchronize and cannot be captured in a graph."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default), function
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("contender", CONTENDERS)
def test_a_training_step_never_synchronizes(contender, optimizer):
    recipe = Recipe(optimizer=optimizer)
    trained = replace(TOY, recipe=recipe).model(contender, 400, CPU, torch.bfloat16)
    with NoValues():
        for _ in range(2):  # the first makes the optimizer's state
            trained._step()
    with pytest.raises(AssertionError), NoValues():
        bool(trained.batch.any())


def test_norms_have_no_weight_decay_and_rates_stay_the_same_tensors():
    trained = TOY.model("flashmhf", 400, CPU, torch.float32)
    groups = trained.optimizer.param_groups
    assert groups[0]["muon"] is False  # and its learning rate has no factor
    norms = {parameter for name, parameter in trained.model.named_parameters() if "norm" in name}
    assert {parameter for group in groups if not group["weight_decay"] for parameter in group["params"]} == norms
    tensors, rates = [group["lr"] for group in groups], []
    for _ in range(20):
        rates.append(float(tensors[0]))
        trained(torch.zeros(4, 32, dtype=torch.long))
    assert rates[:3] == pytest.approx([0, 2e-3, 4e-3])
    assert rates[-1] < 8e-4
    assert all(group["lr"] is tensor for group, tensor in zip(groups, tensors, strict=True))


@pytest.mark.slow
def test_compiled_steps_train_as_eager_ones():
    losses = []
    for mode in ("eager", "compiled"):
        trained = replace(TOY, modes=dict.fromkeys(CONTENDERS, mode)).model("flashmhf", 400, CPU, torch.float32)
        losses.append([float(trained(torch.arange(128).view(4, 32))) for _ in range(4)])
        trained.validate([torch.zeros(1, 7, dtype=torch.long)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


COST = PairCost(parameters=1_000_000, start_s=10, s_per_token=1e-5)  # 47.5 s with all tokens


@pytest.mark.parametrize(
    ("seconds", "tokens_per_parameter", "seeds"),
    [
        (400, TOKENS_PER_PARAMETER, 7),
        (10_000, TOKENS_PER_PARAMETER, 10),
        (100, 2.0, MIN_SEEDS),  # 90 s for three: 30 s each
        (40, 0.8, 2),
        (20, 0.8, 1),
        (10, 0.5, 0),
    ],
)
def test_a_budget_has_three_seeds_first_then_tokens_then_seeds(seconds, tokens_per_parameter, seeds):
    budget = fit_budget(seconds, [COST])
    assert budget.tokens_per_parameter == pytest.approx(tokens_per_parameter)
    assert budget.seeds == seeds
    assert budget.seeds * COST.seconds(budget.tokens_per_parameter) <= 0.9 * seconds + 1e-6


def trial_rows(tokens_per_s: float) -> list[dict]:
    row = {"step": "trial", "size": "30m", "start_s": 1.0}
    speeds = {"eager": tokens_per_s, "graph": 3 * tokens_per_s, "compiled": 2 * tokens_per_s}
    return [
        row | {"ffn_type": contender, "mode": mode, "tokens_per_s": speed}
        for contender in CONTENDERS
        for mode, speed in speeds.items()
    ]


def bench_with(seconds: float, rows: list[dict]) -> Bench:
    return Bench(True, time.monotonic() + seconds, rows)


def test_pairs_take_the_fastest_mode_and_keep_their_tokens_when_resumed():
    first, *others = pairs(bench_with(400, trial_rows(5e5)), ["30m"])
    (budget,) = first.measure()
    assert budget["seeds"] == len(others) == 3
    assert budget["modes"] == {"30m swiglu": "graph", "30m flashmhf": "graph"}
    finals = [{"step": "pairs", "size": "30m", "seed": seed, "final": True} for seed in (0, 1) for _ in CONTENDERS]
    rows = [*trial_rows(5e5), {"step": "pairs", **budget}, *finals]
    resumed = [case.name for case in pairs(bench_with(200, rows), ["30m"])]
    assert resumed == ["30m seed 0", "30m seed 1", "30m seed 2"]


def test_a_pair_that_does_not_fit_does_not_start():
    cases = list(pairs(bench := bench_with(400, trial_rows(5e5)), ["30m"]))
    bench._until = time.monotonic() + 1  # a pair starts in 2 s
    with pytest.raises(OutOfTimeError):
        next(iter(cases[1].measure()))
    (only,) = pairs(bench_with(2, trial_rows(5e5)), ["30m"])
    assert "failed" in only.measure()[0]


def test_pairs_without_a_trial_say_so():
    with pytest.raises(InputError, match=r"^trial: expected a speed of swiglu at 30m, got none; "):
        list(pairs(bench_with(400, []), ["30m"]))


def test_a_trial_measures_every_contender():
    rows = [row for case in trial(bench_with(60, []), ["1m"], ["eager", "graph"]) for row in case.measure()]
    assert [(row["ffn_type"], row["mode"]) for row in rows] == [("swiglu", "eager"), ("flashmhf", "eager")]
    assert all(row["tokens_per_s"] > 0 < row["start_s"] for row in rows)


def test_the_readme_has_the_estimates_of_the_budget():
    assert table() in (CONFIGS.parent.parent / "benchmarks/README.md").read_text()


@pytest.mark.parametrize("file", ["tokens.json", "train.xz", "validation.xz"])
@pytest.mark.parametrize("damage", ["missing", "cut", "other"])
def test_damaged_token_files_are_named(file, damage, token_folder, tmp_path):
    for one in token_folder.iterdir():
        (tmp_path / one.name).write_bytes(one.read_bytes())
    target = tmp_path / file
    if damage == "missing":
        target.unlink()
    elif damage == "cut":
        target.write_bytes(target.read_bytes()[:-9])
    else:
        target.write_bytes(b"no tokens")
    with pytest.raises(InputError, match=rf"{file}: expected what "):
        read_tokens(tmp_path)
