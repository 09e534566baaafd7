"""FlashMHF and the feed-forward layers that it is compared with, as modules with plain arguments."""

from flashmhf.layers.baselines import PKV, SwiGLU
from flashmhf.layers.initialisation import INITS, Scales, default_scales
from flashmhf.layers.multi_head import MHFFN, DenseMoE, FlashMHF, HeadRMSNorm

__all__ = ["INITS", "MHFFN", "PKV", "DenseMoE", "FlashMHF", "HeadRMSNorm", "Scales", "SwiGLU", "default_scales"]
