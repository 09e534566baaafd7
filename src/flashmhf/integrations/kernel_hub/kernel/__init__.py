"""Multi-head feed-forward layers for Transformers, with fused kernels (arXiv 2512.06989)."""

from flashmhf.integrations.kernel_hub.kernel import layers
from flashmhf.ops.backends import backends
from flashmhf.ops.flash_mhf import flash_mhf
from flashmhf.ops.gated_mhf import gated_mhf

__all__ = ["backends", "flash_mhf", "gated_mhf", "layers"]
