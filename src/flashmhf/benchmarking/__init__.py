"""Time and memory of the operator, of whole layers and of models, against what they replace.

Variants are timed in turn, A B A B, on random inputs, and compared by medians within one run, because the speed of a
machine drifts. Memory is that of activations: the peak of the allocator above what was there before, without the
parameters' gradients, which every layer has to return. Results are rows, dicts with units in their keys.
"""

from flashmhf.benchmarking.comparing import compare_results, comparison_summary, comparison_table
from flashmhf.benchmarking.decode import bench_decode
from flashmhf.benchmarking.layer import bench_layer, bench_op
from flashmhf.benchmarking.measuring import Row, peak_bytes
from flashmhf.benchmarking.provenance import provenance, table
from flashmhf.benchmarking.results import check_folder, complete, read_result
from flashmhf.benchmarking.variants import LAYERS, Shape

__all__ = [
    "LAYERS",
    "Row",
    "Shape",
    "bench_decode",
    "bench_layer",
    "bench_op",
    "check_folder",
    "compare_results",
    "comparison_summary",
    "comparison_table",
    "complete",
    "peak_bytes",
    "provenance",
    "read_result",
    "table",
]
