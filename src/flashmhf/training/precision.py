"""Which devices compute in bfloat16 natively."""

import torch

CPU_FEATURES = ("avx512_bf16", "amx_bf16", "bf16")  # of x86, and of Arm; without them it is emulated, and slower


def computes_bfloat16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 are faster than in float32 on this device."""
    if device.type == "cpu":
        found = torch.cpu.get_capabilities()
        return any(found.get(feature, False) for feature in CPU_FEATURES)
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
