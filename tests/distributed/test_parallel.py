"""Each layout over processes computes what one process does."""

import functools

import pytest
import torch
from parallel_cases import (
    LAYERS,
    MODELS,
    OPTIMIZERS,
    batch,
    build,
    collectives,
    curve,
    curves,
    muon_collectives,
    one_step,
    resumed,
)
from torch.distributed.tensor.parallel import ParallelStyle

from flashmhf import FlashMHF
from flashmhf.distributed.parallel import tensor_parallel
from flashmhf.distributed.sharded import load_sharded
from flashmhf.models.loading import load_model
from ranks import run_ranks

LAYOUTS_OF_TWO = ["ddp", "fsdp", "tp"]
LAYOUTS_OF_FOUR = [*LAYOUTS_OF_TWO, "tp x fsdp"]
ONE_HEAD = {"num_ffn_kv_heads": 1}


resumed_from_former = functools.partial(resumed, former=True)


def two_processes(folder: str) -> dict:
    return {
        "step": one_step([(name, layout) for name in MODELS for layout in LAYOUTS_OF_TWO]),
        "collectives": collectives(),
        "collectives of Muon": muon_collectives("flashmhf", LAYOUTS_OF_TWO),
        "resumed": {
            name: resumed("flashmhf", LAYOUTS_OF_TWO, f"{folder}/{name}", optimizer=name) for name in OPTIMIZERS
        },
        "resumed from former": resumed("flashmhf", ["fsdp", "tp"], f"{folder}/former", former=True),
        "resumed, uneven": resumed("flashmhf", ["uneven fsdp"], f"{folder}/uneven", optimizer="muon", **ONE_HEAD),
        "resumed from former, grouped": resumed("flashmhf", ["fsdp"], f"{folder}/one head", former=True, **ONE_HEAD),
    }


@pytest.fixture(scope="module")
def folder_of_two(tmp_path_factory):
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def of_two(folder_of_two):
    return run_ranks(two_processes, 2, folder_of_two, str(folder_of_two))


def single_process(name: str) -> tuple[float, dict[str, torch.Tensor]]:
    model = build(name)
    loss = model(batch(), labels=batch()).loss
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters()}


def check_step(result, name: str) -> None:
    loss, gradients = single_process(name)
    assert result[0] == pytest.approx(loss, rel=1e-6)
    assert result[1].keys() == gradients.keys()
    for parameter, expected in gradients.items():
        error = (result[1][parameter] - expected).norm() / expected.norm()
        assert error < 1e-5, parameter


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layout", LAYOUTS_OF_TWO)
def test_loss_and_gradients_of_two_processes(of_two, layout, name):
    check_step(of_two["step"][name, layout], name)


@pytest.mark.parametrize("name", LAYERS)
def test_a_split_layer_costs_one_all_reduce_forward_and_one_backward(of_two, name):
    assert of_two["collectives"][name] == (1, 1)


def test_muon_gathers_projections_but_not_the_blocks_of_k_u_and_v(of_two):
    projections = 2 * 6  # layers; of attention, and before and after the heads
    assert of_two["collectives of Muon"] == {"ddp": 0, "fsdp": projections, "tp": projections}


@functools.cache
def one_process(optimizer: str, name: str, steps: int, **options: object) -> list[float]:
    """The losses of one process."""
    model = build(name, **options)
    return [loss.item() for loss in curve(model, 0, 1, steps, OPTIMIZERS[optimizer](model))]


def after_three_steps(optimizer: str = "adamw") -> list[float]:
    return one_process(optimizer, "flashmhf", 6)[3:]


@pytest.mark.parametrize("second", LAYOUTS_OF_TWO)
@pytest.mark.parametrize("first", LAYOUTS_OF_TWO)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_sharded_checkpoint_resumes_in_any_layout(of_two, optimizer, first, second):
    losses = of_two["resumed"][optimizer][first, second]
    assert losses == pytest.approx(after_three_steps(optimizer), rel=1e-4)


def test_muon_with_blocks_that_the_ranks_share_unevenly(of_two):
    """Three blocks of K, U and V for two ranks."""
    expected = one_process("muon", "flashmhf", 6, **ONE_HEAD)[3:]
    assert of_two["resumed, uneven"]["uneven fsdp", "uneven fsdp"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("second", ["fsdp", "tp"])
@pytest.mark.parametrize("first", ["fsdp", "tp"])
def test_a_sharded_checkpoint_with_the_former_shapes_resumes(of_two, first, second):
    assert of_two["resumed from former"][first, second] == pytest.approx(after_three_steps(), rel=1e-4)


def test_a_former_checkpoint_that_was_sharded_by_sub_networks_resumes(of_two):
    """One head of K, U and V for two ranks: these were sharded by another dimension than now."""
    expected = one_process("adamw", "flashmhf", 6, **ONE_HEAD)[3:]
    assert of_two["resumed from former, grouped"]["fsdp", "fsdp"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS_OF_TWO)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_sharded_checkpoint_becomes_a_plain_model(of_two, folder_of_two, tmp_path, name, layout):
    model = build("flashmhf", init="reference")
    optimizer = OPTIMIZERS[name](model)
    load_sharded(folder_of_two / name / layout, model, optimizer)
    model.save_pretrained(tmp_path)
    losses = [loss.item() for loss in curve(model, 0, 1, 3, optimizer)]
    assert losses == pytest.approx(after_three_steps(name), rel=1e-4)
    assert load_model(str(tmp_path))(batch(), labels=batch()).loss.item() == pytest.approx(losses[0], rel=1e-6)


@pytest.mark.slow
@pytest.mark.distributed
def test_loss_and_gradients_of_four_processes(tmp_path):
    cases = [("flashmhf", layout) for layout in LAYOUTS_OF_FOUR]
    cases += [("swiglu", layout) for layout in ("ddp", "fsdp", "tp x fsdp")]  # its two heads of keys: not over four
    results = run_ranks(one_step, 4, tmp_path, cases)
    for (name, _), result in results.items():
        check_step(result, name)


@pytest.mark.slow
@pytest.mark.distributed
def test_curves_of_four_processes(tmp_path):
    cases = [(optimizer, "flashmhf", layout) for optimizer in OPTIMIZERS for layout in LAYOUTS_OF_FOUR]
    cases += [("muon", "grouped", "uneven fsdp"), ("muon", "swiglu", "tp x fsdp")]  # six blocks for four ranks; QK-norm
    for (optimizer, name, layout), losses in run_ranks(curves, 4, tmp_path, cases, 20).items():
        expected = one_process(optimizer, name, 20)
        assert expected[-1] < expected[0] - 1
        assert losses == pytest.approx(expected, rel=1e-3), (optimizer, name, layout)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_sharded_checkpoint_with_the_former_shapes_resumes_on_four_processes(tmp_path):
    layouts = ["fsdp", "tp x fsdp"]
    results = run_ranks(resumed_from_former, 4, tmp_path, "flashmhf", layouts, str(tmp_path))
    for layouts_of_both, losses in results.items():
        assert losses == pytest.approx(after_three_steps(), rel=1e-4), layouts_of_both


class FakeMesh:
    """What is read of a mesh before anything is distributed."""

    def __init__(self, size: int, ndim: int = 1) -> None:
        self.size, self.ndim = lambda: size, ndim


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FlashMHF(24, 3, 2, 8), "num_heads: expected a multiple of the mesh's size 2, got 3"),
        (lambda: FlashMHF(24, 3, 2, 8, projections=False), "projections: expected True for a layer .*, got False"),
        (
            lambda: FlashMHF(32, 4, 2, 8, num_kv_heads=1),
            "num_kv_heads: expected a multiple of the mesh's size 2, got 1",
        ),
        (lambda: build("flashmhf", num_key_value_heads=1), "num_key_value_heads: expected a multiple .* 2, got 1"),
        (lambda: torch.nn.Linear(2, 2), "module: expected FlashMHF, .*, got Linear"),
    ],
)
def test_models_that_cannot_be_split(make, message, monkeypatch):
    def never(*_: object) -> None:
        raise AssertionError("changed before it was checked")

    monkeypatch.setattr(ParallelStyle, "_apply", never)
    with pytest.raises(ValueError, match=message):
        tensor_parallel(make(), FakeMesh(2))


def test_a_mesh_of_two_dimensions_is_refused():
    with pytest.raises(ValueError, match="mesh: expected one dimension, got 2"):
        tensor_parallel(FlashMHF(32, 4, 2, 8), FakeMesh(2, ndim=2))
