"""The plans of benchmarks/gpu.py as data: which steps, in which order, for how long.

The most valuable steps come first, in case the machine goes away. A step of many minutes, such as a training run, is
one more line with a larger limit.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Step:
    """What one process measures, and its time limit.

    Attributes:
        limit_s: from the start of measuring; time that earlier steps saved is added.
        cases: "module:function", called with a `Bench` and the options; yields cases.
        case_limit_s: a case without a new row for this long is killed as hanging, and the step continues after it.
        shows: the quantity whose best values the summary shows.
    """

    name: str
    limit_s: int
    what: str
    cases: str
    options: dict[str, Any] = field(default_factory=dict)
    case_limit_s: int | None = None
    shows: str | None = None


@dataclass(frozen=True)
class Plan:
    """Steps that fit `seconds` in total, including the query of the device."""

    seconds: int
    steps: tuple[Step, ...]


FIRST = (
    Step("machine", 15, "versions, nvidia-smi, cuBLAS at 8192^3, copy", "gpu_machine:machine", shows="tflops"),
    Step("compile", 25, "what this plan launches, over all cores", "gpu_machine:compile_first"),
    Step(
        "smoke", 45, "every kernel at D=128, bfloat16, against float64; five repeats", "gpu_checks:smoke",
        case_limit_s=12,
    ),
    Step(
        "op", 75, "operator at 370M and 1.3B, 1k to 64k tokens, every Hopper tile", "gpu_speed:op",
        case_limit_s=20, shows="ratio_to_cublas",
    ),
    Step("layer", 70, "layer against SwiGLU eager, compiled, liger at 4k, 16k", "gpu_speed:layer", shows="ratio"),
    Step("decode", 25, "few tokens under CUDA graphs", "gpu_speed:decode", shows="ratio_to_copy"),
    Step("training", 55, "training step, 370M", "gpu_model:training", {"size": "370m"}, shows="mfu_of_matmul"),
)  # fmt: skip

SECOND = (
    Step("machine", 10, "versions, nvidia-smi, cuBLAS at 8192^3, copy", "gpu_machine:machine", shows="tflops"),
    Step("compile", 25, "what this plan launches, over all cores", "gpu_machine:compile_second"),
    Step("rounds", 35, "Hopper kernels at all head dims, 20 rounds", "gpu_checks:rounds", case_limit_s=15),
    Step("tiles", 45, "every portable tile, gate and norm, bfloat16 first", "gpu_checks:tiles", case_limit_s=15),
    Step(
        "dims", 25, "operator at other head dims and float16", "gpu_speed:dims", case_limit_s=12,
        shows="ratio_to_cublas",
    ),
    Step("sanitizer", 30, "compute-sanitizer memcheck on small cases", "gpu_sanitizer:sanitizer"),
    Step("graphs", 25, "CUDA graphs and reduce-overhead against eager", "gpu_graphs:graphs"),
    Step("tune", 35, "a grid of portable tiles", "tune:tune", shows="speedup"),
    Step("growth", 15, "forward + backward of a layer, 4k to 1M tokens", "gpu_speed:growth"),
    Step("training-1.3b", 20, "training step, 1.3B", "gpu_model:training", {"size": "1.3b"}, shows="mfu_of_matmul"),
    Step("generation", 15, "new tokens after a prompt, 370M", "gpu_model:generation", shows="tokens_per_s"),
)  # fmt: skip

# `trial` measures how fast each contender trains, `pairs` decides from it how many seeds and tokens fit, see
# gpu_budget.py. Both contenders of a seed are trained alternately, so that a run that is cut short has complete pairs.
THIRD = (
    Step(
        "trial", 60, "tokens/s of both contenders, eager, as a CUDA graph, compiled", "gpu_training:trial",
        {"sizes": ["30m"], "modes": ["eager", "graph", "compiled", "compiled graph"]}, case_limit_s=40,
        shows="tokens_per_s",
    ),
    Step(
        "pairs", 395, "SwiGLU against FlashMHF of 30M parameters, seed by seed", "gpu_training:pairs",
        {"sizes": ["30m"]}, case_limit_s=90, shows="tokens_per_s",
    ),
)  # fmt: skip

SCALING = (
    Step(
        "trial", 60, "tokens/s of both contenders at every size, eager and as a CUDA graph", "gpu_training:trial",
        {"sizes": ["1m", "3m", "10m", "30m"], "modes": ["eager", "graph"]}, case_limit_s=40, shows="tokens_per_s",
    ),
    Step(
        "pairs", 395, "SwiGLU against FlashMHF of 1M to 30M parameters, seed by seed", "gpu_training:pairs",
        {"sizes": ["1m", "3m", "10m", "30m"]}, case_limit_s=90, shows="tokens_per_s",
    ),
)  # fmt: skip

PLANS = {
    "first": Plan(340, FIRST),
    "second": Plan(300, SECOND),
    "third": Plan(480, THIRD),
    "scaling": Plan(480, SCALING),
}
