"""`flashmhf train --fsdp`, in which accelerate shards the model after the optimizer was made."""

import json
import shutil
from pathlib import Path

import pytest

from flashmhf.data.config import DataConfig
from flashmhf.training.arguments import parse_arguments
from flashmhf.training.config import TrainConfig
from flashmhf.training.run import train
from torchrun import torchrun

STEPS = ("--max-steps", "6", "--save-steps", "3", "--learning-rate", "1e-2", "--logging-steps", "1", "--bf16", "false")
FSDP = (str(Path(__file__).with_name("fsdp_on_cpu.py")),)


@pytest.fixture(scope="module")
def run(corpus_folder, tmp_path_factory) -> TrainConfig:
    """Three blocks of K, U and V in each layer, for two processes."""
    file = tmp_path_factory.mktemp("configs") / "heads.json"
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    file.write_text(json.dumps({**sizes, "num_subnetworks": 3, "num_ffn_kv_heads": 1, "init": "scaled"}))
    data = DataConfig(source=str(corpus_folder), context_length=32, validation_tokens=63 * 32)
    return TrainConfig(model=str(file), data=data, optimizer="muon")


def losses(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [row["loss"] for row in history if "loss" in row]


@pytest.mark.slow
@pytest.mark.distributed
def test_muon_with_fsdp_trains_as_one_process_and_resumes(run, tmp_path):
    batch = ("--per-device-train-batch-size", "4", "--report-to", "none", "--eval-strategy", "no")
    alone = train(run, parse_arguments([*STEPS, *batch], str(tmp_path / "one")))
    ended = torchrun(run, tmp_path / "fsdp", 2, *STEPS, launcher=FSDP)
    assert ended.returncode == 0, ended.stderr
    expected = losses(tmp_path / "one")
    assert expected[-1] < expected[0] - 1
    assert losses(tmp_path / "fsdp") == pytest.approx(expected, rel=1e-4)
    assert json.loads(ended.stdout)["validation_loss"] == pytest.approx(alone.validation_loss, rel=1e-4)

    shutil.rmtree(tmp_path / "fsdp/checkpoint-6")
    ended = torchrun(run, tmp_path / "fsdp", 2, *STEPS, "--resume", launcher=FSDP)
    assert ended.returncode == 0, ended.stderr
    assert "resuming from checkpoint-3" in ended.stderr
    assert losses(tmp_path / "fsdp") == pytest.approx(expected, rel=1e-4)
