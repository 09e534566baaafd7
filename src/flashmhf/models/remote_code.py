"""Values of a configuration that would make transformers download or run code, or read files that nobody checked."""

from pathlib import Path
from typing import Any

from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from flashmhf.errors import InputError
from flashmhf.untrusted import entries

ATTENTION = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
EXPERTS = ("experts_implementation", "_experts_implementation", "_experts_implementation_internal")
REFUSED = ("configuration_files", "transformers_weights", "use_kernels", "kernel_config", "custom_generate")


def refuse_code(config: dict[str, Any], file: Path) -> None:
    """Refuses such values in a configuration of any model type, in nested ones too.

    `auto_map` is not among them: it has no effect without trust_remote_code.
    """
    for name, value, _ in entries(config):
        if name in REFUSED and value:
            raise InputError(f"{file}: expected no {name}, which selects other files or code, got {value!r:.80}")
        if name in ATTENTION:
            check_attention(f"{file}: {name}", value)
        if name in EXPERTS and value is not None and (not isinstance(value, str) or "/" in value):
            raise InputError(f"{file}: {name}: expected one that is installed, got {value!r:.80}")


def check_attention(name: str, value: Any) -> None:
    """Raises InputError unless the implementation of attention is None or installed.

    Anything else is a kernel on the Hub for transformers, which is downloaded and run if the package `kernels` is
    installed; for flash_attention_N, too, if flash-attn is not.
    """
    installed = {key for key in ALL_ATTENTION_FUNCTIONS.valid_keys() if "flash" not in key and "/" not in key}
    installed |= {"eager"}
    installed |= {"flash_attention_2"} if is_flash_attn_2_available() else set()
    installed |= {"flash_attention_3"} if is_flash_attn_3_available() else set()
    if value is not None and (not isinstance(value, str) or value not in installed):
        raise InputError(f"{name}: expected what is installed ({', '.join(sorted(installed))}), got {value!r:.80}")
