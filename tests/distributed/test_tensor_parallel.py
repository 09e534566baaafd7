"""--tensor-parallel computes what one process does, and resumes from and into checkpoints of any layout."""

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from parallel_cases import build
from safetensors.torch import load_file

from flashmhf.data.config import DataConfig
from flashmhf.distributed.sharded import SHARDS
from flashmhf.distributed.tensor_parallel import check_tensor_parallel, configure_tensor_parallel
from flashmhf.errors import InputError
from flashmhf.models.loading import load_model
from flashmhf.training.arguments import parse_arguments
from flashmhf.training.config import TrainConfig
from flashmhf.training.manifest import check
from flashmhf.training.run import train
from flashmhf.training.run_files import TrainResult
from torchrun import torchrun

STEPS = ("--max-steps", "8", "--save-steps", "4", "--bf16", "false", "--max-grad-norm", "0.5")  # every step is clipped
ONE = [*STEPS, "--learning-rate", "1e-2", "--logging-steps", "1", "--per-device-train-batch-size", "4"]
ONE += ["--report-to", "none", "--eval-strategy", "no", "--disable-tqdm", "true"]
LAYOUTS = {"tp": (2, "4"), "tp x fsdp": (4, "2")}  # processes, sequences of each group of two; four sequences a step


@pytest.fixture(scope="module")
def run(corpus_folder, tmp_path_factory) -> TrainConfig:
    """Two layers with a norm per head and untied embeddings; 63 validation blocks, not a multiple of any batch."""
    file = tmp_path_factory.mktemp("configs") / "heads.json"
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    file.write_text(json.dumps({**sizes, "num_subnetworks": 3, "q_norm": True, "init": "scaled"}))
    data = DataConfig(source=str(corpus_folder), context_length=32, validation_tokens=63 * 32)
    return TrainConfig(model=str(file), data=data, optimizer="adamw")


@pytest.fixture(scope="module")
def one(run, tmp_path_factory) -> tuple[Path, TrainResult]:
    """The folder and the result of one process."""
    folder = tmp_path_factory.mktemp("one") / "run"
    return folder, train(run, parse_arguments(ONE, str(folder)))


def split(run: TrainConfig, folder: Path, layout: str, *flags: str):
    processes, sequences = LAYOUTS[layout]
    batch = ("--per-device-train-batch-size", sequences, "--per-device-eval-batch-size", str(16 // processes))
    return torchrun(run, folder, processes, *STEPS, *batch, "--tensor-parallel", "2", *flags)


def rows(folder: Path, name: str) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [row[name] for row in history if "loss" in row]


@pytest.fixture(scope="module")
def trained(run, tmp_path_factory) -> Callable[[str], tuple[Path, dict]]:
    """The folder and the result of a layout, trained on first use."""

    @functools.cache
    def of_layout(layout: str) -> tuple[Path, dict]:
        folder = tmp_path_factory.mktemp("split") / "run"
        ended = split(run, folder, layout)
        assert ended.returncode == 0, ended.stderr
        return folder, json.loads(ended.stdout)

    return of_layout


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensor_parallel_trains_as_one_process(one, trained, layout):
    (folder, expected), (split_folder, result) = one, trained(layout)
    assert rows(split_folder, "loss") == pytest.approx(rows(folder, "loss"), rel=1e-5)
    assert rows(split_folder, "grad_norm") == pytest.approx(rows(folder, "grad_norm"), rel=1e-4)
    assert min(rows(folder, "grad_norm")) > 0.5
    assert result["validation_loss"] == pytest.approx(expected.validation_loss, rel=1e-6)
    for name in ("steps", "tokens", "parameters", "tokens_used"):
        assert result[name] == getattr(expected, name), name


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_model_and_the_checkpoints_are_plain_models(one, trained, layout):
    folder, _ = trained(layout)
    expected = load_file(one[0] / "model.safetensors")
    for saved in (folder, folder / "checkpoint-8"):
        weights = load_file(saved / "model.safetensors")
        assert weights.keys() == expected.keys()
        for name, value in weights.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4, msg=name)
        assert load_model(str(saved)).config.num_attention_heads == 2
    checkpoint = folder / "checkpoint-8"
    assert check(checkpoint) is None
    assert (checkpoint / SHARDS).is_dir()
    assert not (checkpoint / "optimizer.pt").exists()


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("first", "second"),
    [("tp", "one"), ("tp", "tp x fsdp"), ("tp x fsdp", "tp x fsdp"), ("tp x fsdp", "ddp"), ("one", "tp x fsdp")],
)
def test_resuming_in_another_layout(run, one, trained, tmp_path, first, second):
    folder = Path(shutil.copytree(one[0] if first == "one" else trained(first)[0], tmp_path / "run"))
    shutil.rmtree(folder / "checkpoint-8")
    validation_loss = resume(run, folder, second)
    for name, error in (("loss", 1e-5), ("grad_norm", 1e-4), ("learning_rate", 1e-9)):
        assert rows(folder, name) == pytest.approx(rows(one[0], name), rel=error), name
    assert validation_loss == pytest.approx(one[1].validation_loss, rel=1e-6)


def resume(run: TrainConfig, folder: Path, layout: str) -> float:
    if layout == "one":
        return train(run, parse_arguments(ONE, str(folder)), resume=True).validation_loss
    ended = torchrun(run, folder, 2, *STEPS, "--resume") if layout == "ddp" else split(run, folder, layout, "--resume")
    assert ended.returncode == 0, ended.stderr
    assert "resuming from checkpoint-4" in ended.stderr
    return json.loads(ended.stdout)["validation_loss"]


@pytest.mark.slow
@pytest.mark.distributed
def test_muon_trains_as_one_process_and_resumes_from_its_checkpoint(run, tmp_path):
    """With a norm of queries and keys, and of the heads of the layer, on four processes."""
    values = {**json.loads(Path(run.model).read_text()), "qk_norm": True}
    (tmp_path / "model.json").write_text(json.dumps(values))
    muon = dataclasses.replace(run, model=str(tmp_path / "model.json"), optimizer="muon")
    alone, together = tmp_path / "one", tmp_path / "four"
    validation_loss = train(muon, parse_arguments(ONE, str(alone))).validation_loss
    losses = rows(alone, "loss")
    assert losses[-1] < losses[0] - 1
    ended = split(muon, together, "tp x fsdp")
    assert ended.returncode == 0, ended.stderr
    shutil.rmtree(alone / "checkpoint-8")
    resumed = split(muon, alone, "tp x fsdp", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming from checkpoint-4" in resumed.stderr
    for folder, process in ((together, ended), (alone, resumed)):
        assert rows(folder, "loss") == pytest.approx(losses, rel=1e-4)
        assert json.loads(process.stdout)["validation_loss"] == pytest.approx(validation_loss, rel=1e-4)


@pytest.mark.slow
@pytest.mark.distributed
def test_non_finite_steps_end_a_tensor_parallel_run_with_a_complete_checkpoint(run, model_file, tmp_path):
    """The model has tied embeddings, which are saved once."""
    tied, folder = dataclasses.replace(run, model=str(model_file)), tmp_path / "run"
    flags = ("--learning-rate", "1e30", "--warmup-steps", "0", "--max-non-finite-steps", "2", "--save-steps", "100")
    ended = split(tied, folder, "tp x fsdp", *flags)
    assert ended.returncode == 1
    assert "max-non-finite-steps: expected a finite loss" in ended.stderr
    (checkpoint,) = folder.glob("checkpoint-*")
    assert check(checkpoint) is None
    assert "lm_head.weight" not in load_file(checkpoint / "model.safetensors")
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    bad = [row["blocks"] for row in history if "skipped" in row]
    assert len(bad) == 2
    assert all(len(blocks) == len(set(blocks)) == 4 for blocks in bad)


def arguments(processes: int, **options: object) -> SimpleNamespace:
    """Everything that `configure_tensor_parallel` reads and sets."""
    flags = {"fsdp": [], "deepspeed": None, "torch_compile": False, "auto_find_batch_size": False}
    flags |= {"save_on_each_node": False}
    return SimpleNamespace(
        **{**flags, "world_size": processes, "average_tokens_across_devices": True, **options},
        parallelism_config=None,
        accelerator_config=SimpleNamespace(dispatch_batches=None),
    )


@pytest.mark.parametrize(
    ("given", "processes", "message"),
    [
        (arguments(4), 3, "tensor-parallel: expected a divisor of the 4 processes, got 3"),
        (arguments(4), 0, "tensor-parallel: expected 1 or more, got 0"),
        (arguments(1), 2, "tensor-parallel: expected torchrun with a multiple of 2 processes"),
        (arguments(2, fsdp=["full_shard"]), 2, "fsdp: expected none together with tensor-parallel, got it"),
        (arguments(2, torch_compile=True), 2, "torch-compile: expected none together with tensor-parallel, got it"),
        (
            arguments(2, save_on_each_node=True),
            2,
            "save-on-each-node: expected none together with tensor-parallel",
        ),
        (arguments(2, average_tokens_across_devices=False), 2, "average-tokens-across-devices: expected true"),
    ],
)
def test_processes_and_flags_that_do_not_fit_are_refused(given, processes, message):
    with pytest.raises(InputError, match=message):
        configure_tensor_parallel(given, processes)
    assert given.parallelism_config is None


def test_a_model_whose_heads_cannot_be_split_is_refused():
    given = arguments(6)
    configure_tensor_parallel(given, 3)
    with pytest.raises(InputError, match=r"tensor-parallel: the model's num_attention_heads: expected a multiple .* 3"):
        check_tensor_parallel(build("flashmhf"), given, compiled=False, fused_loss=False)
    check_tensor_parallel(
        build("flashmhf", num_attention_heads=3, hidden_size=24), given, compiled=False, fused_loss=False
    )


def test_a_size_of_one_changes_nothing(tmp_path):
    given = parse_arguments([], str(tmp_path))
    configure_tensor_parallel(given, 1)
    assert given.parallelism_config is None
