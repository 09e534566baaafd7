"""A run whose checkpoints have K, U and V, and what the optimizer keeps of them, in their former shape."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from flashmhf.data.config import DataConfig
from flashmhf.layers.former_shapes import former_shapes
from flashmhf.models.loading import load_model
from flashmhf.training.arguments import parse_arguments
from flashmhf.training.config import TrainConfig
from flashmhf.training.manifest import write_manifest
from flashmhf.training.run import train

FLAGS = ["--per-device-train-batch-size", "2", "--report-to", "none", "--disable-tqdm", "true", "--max-steps", "4"]
FLAGS += ["--save-steps", "2", "--eval-strategy", "no", "--learning-rate", "1e-2"]


def make_former(checkpoint: Path) -> None:
    model = load_model(str(checkpoint))
    shapes = former_shapes(model)
    weights = checkpoint / "model.safetensors"
    tensors = {n: t.view(shapes[n]) if n in shapes else t for n, t in load_file(weights).items()}
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, weights, metadata={"format": "pt"})
    (shape,) = set(shapes.values())
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    moments = [
        (v, n) for v in state["state"].values() for n, t in v.items() if t.ndim == 3 and t.numel() == shape.numel()
    ]
    assert len(moments) == 2 * len(shapes)
    for values, name in moments:
        values[name] = values[name].view(shape).clone()
    torch.save(state, checkpoint / "optimizer.pt")
    write_manifest(checkpoint)


def test_it_resumes_and_ends_like_the_uninterrupted_run(corpus_folder, model_file, tmp_path):
    data = DataConfig(source=str(corpus_folder), context_length=16, validation_tokens=64)
    run = TrainConfig(model=str(model_file), data=data, optimizer="adamw")
    train(run, parse_arguments(FLAGS, str(tmp_path / "run")))
    former = Path(shutil.copytree(tmp_path / "run", tmp_path / "former"))
    shutil.rmtree(former / "checkpoint-4")
    make_former(former / "checkpoint-2")
    train(run, parse_arguments(FLAGS, str(former)), resume=True)
    found, expected = (load_file(folder / "model.safetensors") for folder in (former, tmp_path / "run"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
