"""A kernel for the Kernel Hub, made by the command and loaded by the `kernels` package from a folder."""

import ast
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from kernels import LocalLayerRepository, Mode, get_local_kernel, kernelize, use_kernel_mapping
from kernels._rust import Digest, Metadata
from torch import nn

from flashmhf import FlashMHF, flash_mhf
from flashmhf.integrations.kernel_hub.__main__ import main
from tiny import tiny_model

ALONE = """
import sys
sys.modules["flashmhf"] = None  # as if it were not installed
from pathlib import Path
import torch
from kernels import LocalLayerRepository, Mode, get_local_kernel, kernelize, use_kernel_forward_from_hub
from kernels import use_kernel_mapping
from torch import nn

kernel = get_local_kernel(Path(sys.argv[1]))
assert kernel.__all__ == ["backends", "flash_mhf", "gated_mhf", "layers"]
reasons = kernel.backends()
assert reasons["blockwise"] is None and "not part of this build" in reasons["onednn"], reasons


@use_kernel_forward_from_hub("FlashMHF")
class PlainMHF(nn.Module):
    '''The formula, as a model's own code may have it.'''

    gate_type, q_norm, score_scale, gate_scale, output_scale = "sigmoid", None, 1.0, 1.0, 1.0
    head_dim, num_subnetworks = 8, 3

    def __init__(self):
        super().__init__()
        self.in_proj, self.out_proj = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)
        self.k, self.u, self.v = (nn.Parameter(torch.randn(4, 3, 20, 8)) for _ in range(3))
        self.gate_weight = nn.Parameter(torch.randn(4, 8, 3))

    def forward(self, x):
        q = self.in_proj(x).unflatten(-1, (4, 8))
        scores = torch.einsum("...hd,hde->...he", q, self.gate_weight).sigmoid()
        gate = scores / scores.sum(-1, keepdim=True)
        m, n = (torch.einsum("...hd,hefd->...hef", q, w) for w in (self.k, self.u))
        p = nn.functional.silu(m) * n * gate[..., None]
        return self.out_proj(torch.einsum("...hef,hefd->...hd", p, self.v).flatten(-2))


layer, x = PlainMHF(), torch.randn(2, 5, 32)
want = layer(x)
with use_kernel_mapping({"FlashMHF": {"cpu": LocalLayerRepository(Path(sys.argv[1]), layer_name="FlashMHF")}}):
    kernelize(layer, mode=Mode.TRAINING | Mode.TORCH_COMPILE, use_fallback=False)
assert layer.forward.__func__ is kernel.layers.FlashMHF.forward
torch.testing.assert_close(layer(x), want)
layer(x).sum().backward()
assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())
assert not [name for name in sys.modules if name.startswith("flashmhf.")]
assert not hasattr(torch.ops.flashmhf, "flash_mhf")
assert not {"numba", "llvmlite"} & set(sys.modules)
"""
OPTIONS = {
    "scaled": {"init": "scaled", "q_norm": True},
    "reference": {"bias": True},
    "grouped": {"num_kv_heads": 2, "init": "scaled", "gate_type": "softmax"},
    "no gate": {"gate_type": None, "output_scale": 0.5, "score_scale": 2.0},
    "no projections": {"projections": False, "q_norm": True, "score_scale": 3.0},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("kernels") / "flashmhf"
    assert main([str(folder), "--repo-id", "someone/flashmhf"]) == 0
    return folder


def python_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def in_the_mapping(folder: Path):
    return use_kernel_mapping({"FlashMHF": {"cpu": LocalLayerRepository(folder, layer_name="FlashMHF")}})


def test_it_works_where_the_package_is_not_installed(folder):
    subprocess.run([sys.executable, "-c", ALONE, str(folder)], check=True)


@pytest.mark.parametrize("gate", [True, False], ids=["gate", "no gate"])
def test_the_operator_is_the_packages_under_its_own_name(folder, gate):
    kernel = get_local_kernel(folder)
    inputs = [torch.randn(shape, requires_grad=True) for shape in ((2, 5, 4, 8), *[(2, 3, 20, 8)] * 3)]
    r = torch.rand(2, 5, 4, 3) if gate else None
    out, expected = kernel.flash_mhf(*inputs, r), flash_mhf(*inputs, r, backend="blockwise")
    assert torch.equal(out, expected)
    grads = torch.autograd.grad(out.sum(), inputs)
    for got, want in zip(grads, torch.autograd.grad(expected.sum(), inputs), strict=True):
        assert torch.equal(got, want)
    compiled = torch.compile(kernel.flash_mhf, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs, r), expected)
    metadata = json.loads(Path(kernel.__file__).with_name("metadata.json").read_text())  # of torch-cpu or torch-cuda
    assert kernel.__name__ == metadata["id"]
    assert {"flash_mhf", "gated_mhf"} <= set(dir(getattr(torch.ops, metadata["id"])))


@pytest.fixture
def extensible(monkeypatch):
    """`kernels.replace_kernel_forward_from_hub(FlashMHF, "FlashMHF")`, undone after the test."""
    monkeypatch.setattr(FlashMHF, "kernel_layer_name", "FlashMHF", raising=False)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_the_layer_is_the_packages(folder, options, extensible):
    layer = FlashMHF(32, 4, 3, 20, dtype=torch.float64, **options)  # the error is of the formula, not of rounding
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.4)
    x = torch.randn(2, 5, 32, dtype=torch.float64, requires_grad=True)
    inputs = [x, *layer.parameters()]
    expected = layer(x)
    grads = torch.autograd.grad(expected.square().sum(), inputs)
    with in_the_mapping(folder):
        kernelize(layer, mode=Mode.TRAINING | Mode.TORCH_COMPILE, use_fallback=False)
    assert "forward" in layer.__dict__
    out = layer(x)
    torch.testing.assert_close(out, expected)
    for got, want in zip(torch.autograd.grad(out.square().sum(), inputs), grads, strict=True):
        torch.testing.assert_close(got, want)


def test_a_model_is_kernelized(folder, extensible):
    model = tiny_model(num_hidden_layers=2, num_subnetworks=3, q_norm=True).eval()
    ids = torch.randint(320, (2, 9))
    expected = model(ids).logits
    with in_the_mapping(folder):
        kernelize(model, mode=Mode.INFERENCE, use_fallback=False)
    layers = get_local_kernel(folder).layers
    assert all(block.mlp.forward.__func__ is layers.FlashMHF.forward for block in model.model.layers)
    torch.testing.assert_close(model(ids).logits, expected)


def test_the_folder_is_as_the_hub_requires(folder):
    """https://huggingface.co/docs/kernels/kernel-requirements"""
    project = tomllib.loads((folder / "build.toml").read_text())
    assert project["general"]["hub"]["repo-id"] == "someone/flashmhf"
    assert {f"torch-{device}" for device in project["general"]["backends"]} == {p.name for p in folder.glob("build/*")}
    assert not (folder / "torch-ext/flashmhf/_ops.py").exists()  # kernel-builder writes it
    for build in folder.glob("build/*"):
        metadata = Metadata.read_from_file(build / "metadata.json")
        assert metadata.id.isidentifier()
        metadata.digest.validate(Digest.hash_variant(metadata.digest.algorithm, build))
    for file in python_files(folder):
        tree = ast.parse(file.read_text(), feature_version=(3, 10))
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names.append(node.module)
            modules = {name.split(".")[0] for name in names}
            assert modules <= {"torch", "triton"} | sys.stdlib_module_names, (file, modules)


def test_the_same_sources_make_the_same_build(folder, tmp_path, capsys):
    assert main([str(tmp_path / "again"), "--repo-id", "someone/flashmhf"]) == 0
    files = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".pyc"]
    assert all((folder / file).read_bytes() == (tmp_path / "again" / file).read_bytes() for file in files)
    capsys.readouterr()
    assert main([str(folder)]) == 2
    assert capsys.readouterr().err == f"error: OUT: expected a new or empty folder, got {folder}\n"
