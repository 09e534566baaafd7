"""Provenance of the rows of a lease without a GPU."""

from pathlib import Path

FACTS = {
    "device": "Toy GPU", "device_class": "sm_90a", "torch": "2", "triton": "3", "commit": None, "code": "abc",
    "kernels": {"hopper": "h", "triton": "t"}, "date": "2026-01-01",
}  # fmt: skip
ROOT = Path(__file__).parents[2]
