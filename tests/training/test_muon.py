"""Muon: against torch's, per block of K, U and V, and as the optimizer of a run."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import TrainingArguments

from flashmhf.data.config import DataConfig
from flashmhf.errors import InputError
from flashmhf.layers import MHFFN, PKV, DenseMoE, FlashMHF, SwiGLU
from flashmhf.models.loading import load_model
from flashmhf.training.arguments import parse_arguments
from flashmhf.training.config import TrainConfig
from flashmhf.training.muon import Muon, check_optimizer, gate_factors, matrices, orthogonalised
from flashmhf.training.run import train
from flashmhf.training.run_files import read_run
from tiny import tiny_model


def singular_values(matrix: torch.Tensor) -> torch.Tensor:
    return torch.linalg.svdvals(matrix.double())


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (6, 40, 12), (2, 3, 30, 10)])
def test_singular_values_become_about_one_and_directions_stay(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    result = orthogonalised(matrix)
    assert (result.shape, result.dtype) == (matrix.shape, matrix.dtype)
    values = singular_values(result)
    assert values.min() > 0.6
    assert values.max() < 1.3
    left, _, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    cosine = nn.functional.cosine_similarity((left @ right).flatten(-2), result.double().flatten(-2), dim=-1)
    assert cosine.min() > 0.95


def test_a_zero_gradient_changes_nothing_but_decays():
    assert torch.equal(orthogonalised(torch.zeros(3, 4, 5)), torch.zeros(3, 4, 5))


def test_a_matrix_is_updated_as_by_torchs_muon():
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.ones(24, 16)) for _ in range(2))
    options = {"lr": 0.02, "weight_decay": 0.1}
    muon = Muon([{"params": [ours]}], {ours: 1.0}, **options)
    other = torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **options)
    for _ in range(5):
        ours.grad = torch.randn(24, 16)
        theirs.grad = ours.grad.clone()
        muon.step()
        other.step()
    change = (theirs - 1).norm()
    assert change > 0.1
    assert (ours - theirs).norm() < 0.05 * change  # torch rounds the iteration to bfloat16 wherever it runs


def test_each_sub_network_is_a_matrix_of_its_own():
    torch.manual_seed(0)
    rows, alone = nn.Parameter(torch.zeros(3, 24, 16)), [nn.Parameter(torch.zeros(24, 16)) for _ in range(3)]
    together = Muon([{"params": [rows]}], {rows: 1.0}, lr=0.02)
    apart = Muon([{"params": alone}], dict.fromkeys(alone, 1.0), lr=0.02)
    rows.grad = torch.randn(3, 24, 16) * torch.tensor([1.0, 1e-4, 1e4]).view(3, 1, 1)
    for one, gradient in zip(alone, rows.grad, strict=True):
        one.grad = gradient.clone()
    together.step()
    apart.step()
    torch.testing.assert_close(rows.detach(), torch.stack([one.detach() for one in alone]), rtol=2e-2, atol=1e-5)


def test_other_parameters_are_updated_as_by_adamw():
    torch.manual_seed(0)
    model = tiny_model(q_norm=True, init="scaled")
    chosen = matrices(model)
    names = {name.rpartition("layers.0.")[2] for name, parameter in model.named_parameters() if parameter in chosen}
    inside = {f"self_attn.{name}_proj.weight" for name in "qkvo"} | {f"mlp.{name}" for name in "kuv"}
    assert {name for name in names if not name.startswith("model")} == inside | {
        "mlp.in_proj.weight",
        "mlp.out_proj.weight",
    }
    copies = {parameter: nn.Parameter(parameter.detach().clone()) for parameter in model.parameters()}
    rest = [parameter for parameter in model.parameters() if parameter not in chosen]
    muon = Muon([{"params": list(model.parameters())}], chosen, lr=0.01)
    adamw = torch.optim.AdamW([copies[parameter] for parameter in rest], lr=0.01)
    for _ in range(2):
        for parameter in rest:
            parameter.grad = torch.randn_like(parameter)
            copies[parameter].grad = parameter.grad.clone()
        muon.step()
        adamw.step()
    for parameter in rest:
        assert torch.equal(parameter, copies[parameter])
    for parameter in chosen:
        assert torch.equal(parameter, copies[parameter])  # without a gradient


@pytest.mark.parametrize("gate_type", ["sigmoid", None])
def test_a_scale_and_its_inverse_in_the_weights_train_alike(gate_type):
    """score_scale, gate_scale and output_scale describe the same function as other weights, and its training."""
    torch.manual_seed(0)
    one = {"score_scale": 1.0, "output_scale": 1.0, **({"gate_scale": 1.0} if gate_type else {})}
    other = {"score_scale": 4.0, "output_scale": 2.0, **({"gate_scale": 8.0} if gate_type else {})}
    plain, scaled = (tiny_model(q_norm=True, num_subnetworks=3, gate_type=gate_type, **s) for s in (one, other))
    state = dict(plain.state_dict())
    for name in state:
        end = name.rpartition(".")[2]
        factor = {"k": 4.0, "u": 4.0, "v": 2.0, "gate_weight": 8.0}.get(end if ".mlp." in name else "", 1.0)
        state[name] = state[name] / factor
    scaled.load_state_dict(state)
    tokens = torch.randint(0, 50, (2, 12))
    losses = []
    for model in (plain, scaled):
        groups = [{"params": list(model.parameters()), "weight_decay": 0.1}]
        muon = Muon(groups, matrices(model), gate_factors(model), lr=0.01, eps=1e-12)
        for _ in range(4):
            loss = model(input_ids=tokens, labels=tokens).loss
            muon.zero_grad()
            loss.backward()
            muon.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)
    assert losses[0] < 4.6  # from 5.7


@pytest.mark.parametrize("fused", [False, True])
def test_a_learning_rate_in_a_tensor_changes_no_bit(fused):
    rate = torch.tensor(4e-3)
    models = []
    for lr in (rate, rate.item()):
        torch.manual_seed(0)
        model = tiny_model(q_norm=True, init="scaled")
        groups = [{"params": list(model.parameters()), "weight_decay": 0.1}]
        muon = Muon(groups, matrices(model), gate_factors(model), lr=lr, fused=fused)
        for _ in range(3):
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            muon.step()
        models.append(model)
    first, second = (list(model.parameters()) for model in models)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("fused", [False, True])
def test_a_gradient_scaler_skips_steps_and_unscales(fused):
    parameter = nn.Parameter(torch.ones(4, 3))
    muon = Muon([{"params": [parameter]}], {parameter: 1.0}, lr=0.1, weight_decay=0, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024)
    gradients = torch.randn(2, 4, 3)
    gradients[0, 0, 0] = torch.inf
    for gradient in gradients:
        before = parameter.detach().clone()
        scaler.scale((parameter * gradient).sum()).backward()
        scaler.step(muon)
        scaler.update()
        muon.zero_grad()
        assert parameter.isfinite().all()
        assert torch.equal(parameter, before) != bool(gradient.isfinite().all())
    torch.testing.assert_close(muon.state[parameter]["momentum"], 0.05 * gradients[1])


def test_gate_and_norm_are_not_orthogonalised():
    layer = FlashMHF(32, 4, 3, 16, q_norm=True)
    model = tiny_model(q_norm=True)
    model.model.layers[0].mlp = layer
    assert layer.gate_weight not in matrices(model)
    assert layer.q_norm is not None
    assert layer.q_norm.weight not in matrices(model)
    assert model.lm_head.weight not in matrices(model)


def test_scores_have_half_the_rate():
    expected = {
        SwiGLU(32, 48): {"gate_proj.weight": 0.5, "up_proj.weight": 0.5, "down_proj.weight": 1.0},
        DenseMoE(32, 3, 16, score_scale=2.0): {"k": 0.25, "u": 0.25, "v": 3.0},
        MHFFN(32, 2, 48, score_scale=2.0): {"k": 0.25, "u": 0.25, "v": 1.0},
        PKV(32, 2, 24): {"k": 0.5 * 4.0},
        FlashMHF(32, 2, 3, 16, output_scale=6.0): {"k": 0.5, "u": 0.5, "v": 0.5, "in_proj.weight": 1.0},
    }
    for layer, factors in expected.items():
        found = matrices(OneLayer(layer))
        assert {name: found[layer.get_parameter(name)] for name in factors} == factors


def test_a_factor_multiplies_the_step_and_leaves_the_decay():
    whole, half = (nn.Parameter(torch.ones(6, 4)) for _ in range(2))
    optimizer = Muon([{"params": [whole, half]}], {whole: 1.0, half: 0.5}, lr=0.1, weight_decay=0.1)
    whole.grad = half.grad = torch.randn(6, 4)
    optimizer.step()
    torch.testing.assert_close(half.detach() - 0.99, (whole.detach() - 0.99) / 2)


def settings(tmp_path: Path, **options) -> TrainConfig:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(tiny_model(q_norm=True, init="scaled").config.to_dict()))
    return TrainConfig(
        model=str(config), data=DataConfig(source=str(text), context_length=32, validation_tokens=256), **options
    )


FLAGS = ["--max-steps", "6", "--per-device-train-batch-size", "4", "--learning-rate", "1e-2", "--report-to", "none"]
FLAGS += ["--save-steps", "3", "--disable-tqdm", "true"]


def test_a_resumed_run_ends_with_the_same_weights(tmp_path):
    config = settings(tmp_path, optimizer="muon")
    whole = train(config, parse_arguments(FLAGS, str(tmp_path / "whole")))
    train(config, parse_arguments(FLAGS, str(tmp_path / "cut")))
    cut = tmp_path / "cut"
    for name in ("result.json", "model.safetensors"):
        (cut / name).unlink()
    checkpoint = cut / "checkpoint-6"
    for file in checkpoint.iterdir():
        file.unlink()
    checkpoint.rmdir()
    resumed = train(config, parse_arguments(FLAGS, str(cut)), resume=True)
    assert resumed.validation_loss == whole.validation_loss
    first, second = (load_model(str(tmp_path / name)).state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_state_with_other_rates_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("flashmhf.training.muon.SCORE_RATE", 1.0)  # what it was
        train(settings(tmp_path, optimizer="muon"), parse_arguments(FLAGS, str(tmp_path / "run")))
    (tmp_path / "run" / "result.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    with pytest.raises(
        InputError, match=r"^resume: .* of a version of flashmhf with other rates, which can resume it$"
    ):
        train(settings(tmp_path, optimizer="muon"), parse_arguments(FLAGS, str(tmp_path / "run")), resume=True)


def test_a_run_without_the_option_was_one_with_adamw(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"version": 1, "model": "flashmhf-tiny"}))
    assert read_run(tmp_path).optimizer == "adamw"


@pytest.mark.parametrize(
    ("options", "flags", "message"),
    [
        ({"optimizer": "sgd"}, [], "optimizer: expected adamw or muon, got 'sgd'"),
        (
            {"optimizer": "muon"},
            ["--optim", "adafactor"],
            "optim: expected none with --optimizer muon, or --optimizer adamw, got adafactor",
        ),
        (
            {"optimizer": "muon", "mup_base_width": 8},
            [],
            "mup-base-width: expected none with --optimizer muon, .* or --optimizer adamw, got 8",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, options, flags, message):
    with pytest.raises(InputError, match=message):
        train(settings(tmp_path, **options), parse_arguments([*FLAGS, *flags], str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("version", "refused"), [(None, False), (2, False), (1, True)])
def test_fsdp_of_version_1_is_refused(tmp_path, monkeypatch, version, refused):
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # as TrainingArguments sets it
    config = None if version is None else {"version": version}
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, fsdp=True, fsdp_config=config)
    if refused:
        with pytest.raises(InputError, match=r"fsdp-config: expected version 2, .* adamw, got version 1"):
            check_optimizer("muon", arguments, None)
    else:
        check_optimizer("muon", arguments, None)


class OneLayer(nn.Module):
    """A layer by itself, with what `matrices` asks of a model."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.embeddings = layer, nn.Embedding(1, 1)

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def get_output_embeddings(self) -> None:
        return None


def change_by_a_step(layer: nn.Module, name: str) -> float:
    """Of the output, relative to it, by one step of the parameter alone along a random gradient."""
    parameter = layer.get_parameter(name)
    x = torch.randn(512, 256)
    with torch.no_grad():
        before = layer(x)
        optimizer = Muon([{"params": [parameter]}], {parameter: matrices(OneLayer(layer))[parameter]}, lr=4e-3)
        parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        return float((layer(x) - before).norm() / before.norm())


@pytest.mark.parametrize("name", ["k", "v"])
def test_steps_change_the_output_of_all_layers_alike(name):
    torch.manual_seed(0)
    flashmhf = FlashMHF(256, 4, 3, 192, q_norm=True, init="scaled")
    pkv = PKV(256, 4, 864, init="scaled")
    assert 0.5 < change_by_a_step(pkv, name) / change_by_a_step(flashmhf, name) < 2
