"""The sizes of a FlashMHF layer with the parameters of a SwiGLU."""

from dataclasses import dataclass

from flashmhf.layers.initialisation import check_multiple, check_positive

MAX_HEAD_DIM = (
    128  # the best in arXiv 2512.06989 and here (docs/parametrisation.md), and what the kernels are tuned for
)
WIDTHS = (2, 4)  # of a sub-network, in head dims, around the paper's choice:
PAPER_WIDTH = 8 / 3
STEPS = (64, 16, 8)  # multiples that a sub-network's width is chosen from: the kernels' tiles, then finer
TOLERANCE = 0.02  # of the parameters: within it, the width closest to 8/3 head dims is taken; beyond it, a finer step


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Arguments of FlashMHF, except hidden_size."""

    num_heads: int
    num_subnetworks: int
    subnetwork_size: int


def default_num_heads(hidden_size: int) -> int:
    """Heads of 128, or of the largest divisor of hidden_size below that, a multiple of 8 if there is one."""
    divisors = [dim for dim in range(1, min(MAX_HEAD_DIM, hidden_size) + 1) if hidden_size % dim == 0]
    return hidden_size // max(divisors, key=lambda dim: (dim % 8 == 0, dim))


def sizes_like_swiglu(
    hidden_size: int,
    intermediate_size: int,
    *,
    num_heads: int | None = None,
    num_subnetworks: int | None = None,
    subnetwork_size: int | None = None,
    num_kv_heads: int | None = None,
    projections: bool = True,
) -> Sizes:
    """The sizes whose parameters come closest to the 3 x hidden_size x intermediate_size of a SwiGLU.

    Args:
        hidden_size, intermediate_size: of the SwiGLU.
        num_heads, num_subnetworks, subnetwork_size: what is given stays.
        num_kv_heads: heads with their own parameters. Default: all.
        projections: whether the layer has in_proj and out_proj.

    Raises:
        ValueError: an invalid size, or in_proj and out_proj alone have as many parameters as the SwiGLU.
    """
    given = {
        "num_heads": num_heads,
        "num_subnetworks": num_subnetworks,
        "subnetwork_size": subnetwork_size,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_kv_heads": num_kv_heads,
    }
    check_positive(**{name: size for name, size in given.items() if size is not None})
    num_heads = default_num_heads(hidden_size) if num_heads is None else num_heads
    check_multiple("hidden_size", hidden_size, "num_heads", num_heads)
    kv_share = 1.0 if num_kv_heads is None else num_kv_heads / num_heads
    head_dim = hidden_size // num_heads
    rows = (intermediate_size - (2 / 3 * hidden_size if projections else 0)) / kv_share  # E F, but for the gate
    if rows < 1:
        raise ValueError(
            f"intermediate_size: expected more than 2/3 of hidden_size {hidden_size}, since in_proj and out_proj have "
            f"as many parameters, got {intermediate_size} (projections=False leaves them out)"
        )

    def missed(sizes: tuple[int, int]) -> float:
        subnetworks, size = sizes
        gate = subnetworks / (3 * kv_share)  # in rows
        return abs(subnetworks * size + gate - rows) / rows

    def nearest(size: int) -> int:
        """The number of sub-networks of this size."""
        return num_subnetworks or max(1, round(rows / (size + 1 / (3 * kv_share))))

    for step in STEPS:
        widths = [subnetwork_size] if subnetwork_size else _widths(head_dim, rows, num_subnetworks, step)
        found = [(nearest(size), size) for size in widths]
        best = min(found, key=lambda sizes: (max(TOLERANCE, missed(sizes)), abs(sizes[1] - PAPER_WIDTH * head_dim)))
        if missed(best) <= TOLERANCE:
            break
    return Sizes(num_heads=num_heads, num_subnetworks=best[0], subnetwork_size=best[1])


def _widths(head_dim: int, rows: float, num_subnetworks: int | None, step: int) -> list[int]:
    """Multiples of `step` that a sub-network may have."""
    if num_subnetworks is not None:
        return [max(1, round(rows / num_subnetworks / step)) * step]
    smallest, largest = (times * head_dim for times in WIDTHS)
    between = list(range(-(-smallest // step) * step, largest + 1, step))
    one = max(1, round(rows / step)) * step  # a layer with one sub-network
    return between if between and rows >= smallest else [one]
