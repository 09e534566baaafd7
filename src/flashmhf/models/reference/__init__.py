"""Checkpoints of the published reference code: their format, and conversion of folders both ways."""
