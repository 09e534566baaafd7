"""The backend's interface, as `ops/backends.py` loads it."""

from flashmhf.ops.triton.backward import backward
from flashmhf.ops.triton.forward import forward
from flashmhf.ops.triton.prologue import prologue_backward, prologue_forward

__all__ = ["backward", "forward", "prologue_backward", "prologue_forward"]

RECORDABLE = True  # launches follow from the metadata of the tensors (`ops/call_cache.py`)
