"""The backend's interface, as `ops/backends.py` loads it."""

from flashmhf.ops.triton.backward import backward
from flashmhf.ops.triton.forward import forward

__all__ = ["backward", "forward"]
