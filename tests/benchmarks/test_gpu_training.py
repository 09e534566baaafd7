"""The training comparison for a GPU, at toy sizes on the CPU: token files, models of equal size, rows."""

import json
import math
import random
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from flashmhf.errors import InputError
from flashmhf.estimates.cost import count_parameters
from gpu_training import FFNS, Trainer, TrainingRun, config_of, train
from gpu_training import TOY_BACKBONE as TOY
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


def toy(ffn_type: str, **changes) -> TrainingRun:
    values = {"seed": 0, "batch_size": 4, "context_length": 32, "tokens": 20 * 4 * 32, "validations": 4}
    return TrainingRun(ffn_type=ffn_type, **(values | changes))


def rows_of(run: TrainingRun, token_folder: Path) -> list:
    return list(train(run, read_tokens(token_folder), CPU, torch.float32, backbone=TOY))


@pytest.mark.parametrize("ffn_type", FFNS)
def test_a_run_learns_and_yields_a_row_per_validation(ffn_type, token_folder):
    rows = rows_of(toy(ffn_type), token_folder)
    assert [row["steps"] for row in rows] == [5, 10, 15, 20]
    first, last = rows[0], rows[-1]
    assert last["validation_nats_per_token"] < first["validation_nats_per_token"] - 0.3
    assert last["final"]
    assert last["mode"] == "eager"
    size = read_tokens(token_folder).sizes["validation"]
    per_byte = last["validation_nats_per_token"] * size.tokens / size.text_bytes / math.log(2)
    assert last["validation_bits_per_byte"] == pytest.approx(per_byte)
    assert last["settings"]["ffn_type"] == ffn_type
    json.dumps(rows)


def test_a_run_is_determined_by_its_seed(token_folder):
    losses = [
        [row["train_nats_per_token"] for row in rows_of(toy("flashmhf", seed=seed), token_folder)] for seed in (3, 3, 4)
    ]
    assert losses[0] == losses[1] != losses[2]


def test_a_run_that_diverges_ends_with_a_failure(token_folder):
    rows = rows_of(toy("swiglu", learning_rate=1e30), token_folder)
    assert "failed" in rows[-1]
    assert not any(row.get("final") and "failed" not in rows[-1] for row in rows)


def test_the_models_have_equal_parameters():
    sizes = [count_parameters(config_of(TrainingRun(ffn_type=ffn_type, seed=0), 8192)) for ffn_type in FFNS]
    assert max(sizes) / min(sizes) < 1.005
    assert all(29e6 < size < 30e6 for size in sizes)


def test_attention_equals_transformers_causal_attention(token_folder):
    config = config_of(toy("swiglu"), 400, TOY)
    trainer = Trainer(config, toy("swiglu"), CPU, torch.float32)
    usual = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    usual.load_state_dict(trainer.model.state_dict())
    ids = torch.randint(400, (2, 24))
    assert torch.allclose(trainer.model(ids).logits, usual(ids).logits, atol=1e-5)


class NoValues(TorchDispatchMode):
    """Raises if a tensor's value is read, which would synchronize and cannot be captured in a graph."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default), function
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("ffn_type", FFNS)
def test_a_training_step_never_synchronizes(ffn_type):
    run = toy(ffn_type)
    trainer = Trainer(config_of(run, 400, TOY), run, CPU, torch.bfloat16)
    with NoValues():
        with trainer.autocast():
            trainer.model(trainer.batch, labels=trainer.batch, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0, foreach=True)
    with pytest.raises(AssertionError), NoValues():
        bool(trainer.batch.any())


def test_norms_have_no_weight_decay():
    trainer = Trainer(config_of(toy("flashmhf"), 400, TOY), toy("flashmhf"), CPU, torch.float32)
    decayed, others = trainer.optimizer.param_groups
    assert decayed["weight_decay"] == 0.1
    assert others["weight_decay"] == 0
    norms = [p for name, p in trainer.model.named_parameters() if "norm" in name]
    assert {id(p) for p in others["params"]} == {id(p) for p in norms}


def test_the_learning_rate_warms_up_and_decays():
    run = toy("swiglu", tokens=100 * 4 * 32)
    rates = [run.learning_rate_at(step) for step in range(run.steps)]
    assert rates.index(max(rates)) in (9, 10)
    assert rates[0] == pytest.approx(run.learning_rate / 10)
    assert rates[-1] == pytest.approx(0.1 * run.learning_rate, rel=0.01)


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
