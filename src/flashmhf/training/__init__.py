"""Pretraining that survives: transformers' Trainer, with checkpoints that are whole or not there."""

from flashmhf.training.run import Run, parse_arguments, train

__all__ = ["Run", "parse_arguments", "train"]
