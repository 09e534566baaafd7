"""Where bfloat16 is the default precision of training."""

import torch

# What torch.cpu.get_capabilities() calls instructions that multiply bfloat16: two of x86, two of ARM.
CPU_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")


def computes_bfloat16(*, use_cpu: bool) -> bool:
    """Whether the device that trains multiplies matrices in bfloat16 natively.

    On a CPU this takes both the instructions and oneDNN, which uses them.
    """
    if not use_cpu:
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    capabilities = torch.cpu.get_capabilities()
    return torch.backends.mkldnn.is_available() and any(capabilities.get(name, False) for name in CPU_INSTRUCTIONS)
