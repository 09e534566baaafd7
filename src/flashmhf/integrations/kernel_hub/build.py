"""Writes the folder of a kernel: what kernel-builder builds from, and the builds themselves.

The kernels are Python and Triton, which need no compiler, so a build is the source with a namespace for its operators
and a description. Format: https://huggingface.co/docs/kernels/kernel-requirements
"""

import base64
import hashlib
import json
from pathlib import Path

from flashmhf.errors import InputError
from flashmhf.integrations.kernel_hub.sources import sources
from flashmhf.new_folder import new_folder

NAME = "flashmhf"
VERSION = 0  # by the Hub's convention, before its interface is stable
LICENSE = "Apache-2.0"
DEVICES = ("cpu", "cuda", "rocm")

BUILD_TOML = """[general]
name = "{name}"
version = {version}
edition = 5
license = "{license}"
backends = [{devices}]

[general.hub]
repo-id = "{repo_id}"

[torch-noarch]
pyext = ["py", "json"]
"""

FLAKE_NIX = """{
  description = "FlashMHF for the Kernel Hub";
  inputs.kernel-builder.url = "github:huggingface/kernels";
  outputs = { self, kernel-builder }:
    kernel-builder.lib.genKernelFlakeOutputs {
      inherit self;
      path = ./.;
    };
}
"""

CARD = """---
license: apache-2.0
tags:
- kernels
---

# FlashMHF

A multi-head replacement for a Transformer's feed-forward layer (arXiv 2512.06989), whose kernels never write the
L x d_ff activations to memory. PyTorch 2.11 or later, Python 3.10 or later.

```python
from kernels import get_kernel

flashmhf = get_kernel("{repo_id}", version={version}, trust_remote_code=True)
out = flashmhf.flash_mhf(q, k, u, v, gate)  # q (..., H, D); k, u, v (H_kv, E, F, D); gate (..., H, E)
```

`layers.FlashMHF` is for `kernels.kernelize`. Made by `python -m flashmhf.integrations.kernel_hub`.
"""

OPS = '''"""The namespace of this build's operators, so that builds can be loaded side by side."""

import torch

ops = torch.ops.{id}


def add_op_namespace_prefix(name: str) -> str:
    return f"{id}::{{name}}"
'''


def write_kernel(destination: Path, *, repo_id: str) -> None:
    """Writes `torch-ext/` with build.toml, and `build/` with a build for each of DEVICES.

    Args:
        destination: a new or empty folder.
        repo_id: the Hub repository that kernel-builder uploads to.

    Raises:
        InputError: the folder is not empty.
    """
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise InputError(f"OUT: expected a new or empty folder, got {destination}")
    texts = sources()
    with new_folder("OUT", destination) as folder:
        values = {"name": NAME, "version": VERSION, "license": LICENSE, "repo_id": repo_id}
        devices = ", ".join(f'"{device}"' for device in DEVICES)
        (folder / "build.toml").write_text(BUILD_TOML.format(**values, devices=devices))
        (folder / "flake.nix").write_text(FLAKE_NIX)
        (folder / "CARD.md").write_text(CARD.format(**values))
        _write(folder / "torch-ext" / NAME, texts)
        for device in DEVICES:
            _write_build(folder / "build" / f"torch-{device}", device, texts)


def _write_build(folder: Path, device: str, texts: dict[str, str]) -> None:
    build_id = f"_{NAME}_{device}_{_hash(texts)}"
    texts = texts | {"_ops.py": OPS.format(id=build_id)}
    _write(folder, texts)
    files = {path: _sha256(text) for path, text in sorted(texts.items())}
    metadata = {
        "name": NAME,
        "id": build_id,
        "version": VERSION,
        "license": LICENSE,
        "python-depends": [],
        "backend": {"type": device},
        "digest": {"algorithm": "sha256", "files": files},
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


def _write(folder: Path, texts: dict[str, str]) -> None:
    for path, text in texts.items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text.encode())


def _hash(texts: dict[str, str]) -> str:
    """Names the sources: the same for the same text."""
    return hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()[:10]


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
