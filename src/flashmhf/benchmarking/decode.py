"""A few tokens through whole layers, as in generation, where reading the weights takes all the time."""

import functools

import torch

from flashmhf.benchmarking.measuring import Row, copy_call, dtype_name, graphed, interleaved_times
from flashmhf.benchmarking.variants import backend_of, build_layers
from flashmhf.benchmarking.workloads import LayerShape


def bench_decode(
    shape: LayerShape, tokens: int, dtype: torch.dtype, device: torch.device, repeats: int, variants: tuple[str, ...]
) -> list[Row]:
    """Time, and the weights' bytes over it as a ratio to the device's copy bandwidth in the same run.

    On a GPU each layer is the replay of a CUDA graph. A large copy before every timed call evicts the weights from the
    caches, as the other layers of a model do.

    Args:
        variants: names of `LAYERS`; the first is the baseline of ratios.
    """
    layers = build_layers(shape, variants, dtype, device)
    x = torch.randn(tokens, shape.hidden_size, dtype=dtype, device=device)
    copy, copied_bytes = copy_call(device)
    calls = {name: graphed(functools.partial(layer, x), device)[0] for name, layer in layers.items()}
    times = interleaved_times({"copy": copy, **calls}, device, repeats, before_each=copy)
    copy_gb_s = copied_bytes / times["copy"].median_ms / 1e6
    rows = []
    for name, layer in layers.items():
        weight_bytes = sum(parameter.nbytes for parameter in layer.parameters())
        weights_gb_s = weight_bytes / times[name].median_ms / 1e6
        rows.append(
            {
                "variant": name,
                "tokens": tokens,
                "dtype": dtype_name(dtype),
                "backend": backend_of(layer, tokens, dtype),
                **vars(times[name]),
                "ratio": times[name].median_ms / times[variants[0]].median_ms,
                "weights_mib": weight_bytes / 2**20,
                "weights_gb_s": weights_gb_s,
                "copy_gb_s": copy_gb_s,
                "ratio_to_copy": weights_gb_s / copy_gb_s,
            }
        )
    return rows
