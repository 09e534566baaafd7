"""Roofline model of the kernels: FLOPs, bytes to and from memory, and the resulting lower bound on the time.

Each tensor is read or written once (an ideal cache), and accumulators in registers cost nothing.
benchmarks/static_model.py models the compiled kernels on a GPU's functional units instead.
"""

from dataclasses import dataclass

import torch

from flashmhf.ops.problem import Problem

GATE_BYTES = 4


@dataclass(frozen=True)
class Gpu:
    """Dense matrix throughput and memory bandwidth, from the vendor's data sheet."""

    tflops_16bit: float
    tflops_32bit: float  # without tensor cores
    bandwidth_tb_s: float


GPUS = {
    "a100": Gpu(312, 19.5, 2.0),
    "h100": Gpu(989, 67, 3.35),
    "h200": Gpu(989, 67, 4.8),
    "b200": Gpu(2250, 75, 8.0),
    "mi300x": Gpu(1307, 163, 5.3),
}


def peak_tflops(device: torch.device, half: bool) -> float | None:
    """Peak TFLOP/s of a device for dense 16-bit (`half`) or 32-bit products, or None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).lower()
    gpu = next((gpu for key, gpu in GPUS.items() if key in name), None)
    return None if gpu is None else gpu.tflops_16bit if half else gpu.tflops_32bit


@dataclass(frozen=True)
class Work:
    """FLOPs and memory traffic of one or more kernels."""

    flops: int
    read_bytes: int
    written_bytes: int

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.flops + other.flops, self.read_bytes + other.read_bytes, self.written_bytes + other.written_bytes
        )

    def min_ms(self, gpu: Gpu, dtype: torch.dtype) -> float:
        """The roofline: the longer of computing at peak throughput and moving every byte at peak bandwidth."""
        tflops = gpu.tflops_16bit if dtype.itemsize == 2 else gpu.tflops_32bit
        return max(self.flops / tflops, (self.read_bytes + self.written_bytes) / gpu.bandwidth_tb_s) / 1e9

    def bound(self, gpu: Gpu, dtype: torch.dtype) -> str:
        """What bounds the time: "compute" or "memory"."""
        tflops = gpu.tflops_16bit if dtype.itemsize == 2 else gpu.tflops_32bit
        moved = (self.read_bytes + self.written_bytes) / gpu.bandwidth_tb_s
        return "compute" if self.flops / tflops >= moved else "memory"


def forward_work(problem: Problem) -> Work:
    """Three products; reads q, gate, K, U and V, writes the output."""
    tokens, gate, weights = _bytes(problem)
    return Work(3 * _product_flops(problem), tokens + gate + 3 * weights, tokens)


def backward_dq_work(problem: Problem) -> Work:
    """Five products; reads q, dout, gate, K, U and V, writes dQ and dgate."""
    tokens, gate, weights = _bytes(problem)
    return Work(5 * _product_flops(problem), 2 * tokens + gate + 3 * weights, tokens + gate)


def backward_dkuv_work(problem: Problem) -> Work:
    """Six products; reads q, dout, gate, K, U and V, writes dK, dU and dV."""
    tokens, gate, weights = _bytes(problem)
    return Work(6 * _product_flops(problem), 2 * tokens + gate + 3 * weights, 3 * weights)


def backward_work(problem: Problem) -> Work:
    """Both kernels of the backward pass: eleven products, three of them recomputed (M, N and dA)."""
    return backward_dq_work(problem) + backward_dkuv_work(problem)


def _product_flops(problem: Problem) -> int:
    return 2 * problem.T * problem.H * problem.D * problem.E * problem.F


def _bytes(problem: Problem) -> tuple[int, int, int]:
    """Bytes of q, of the gate, and of each of K, U and V."""
    element = problem.dtype.itemsize
    tokens = problem.T * problem.H * problem.D * element
    gate = problem.T * problem.H * problem.E * GATE_BYTES if problem.has_gate else 0
    return tokens, gate, problem.H_kv * problem.E * problem.F * problem.D * element
