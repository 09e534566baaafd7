"""Pretraining that survives: transformers' Trainer, with checkpoints that are whole or not there."""
