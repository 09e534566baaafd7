"""Pretraining on transformers' Trainer: exact resuming, complete checkpoints, non-finite steps, hangs."""
