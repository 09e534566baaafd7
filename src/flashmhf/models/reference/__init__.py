"""Checkpoints of the published reference code: their format, and conversion in both directions."""
