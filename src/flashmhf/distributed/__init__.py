"""Models over many devices: tensor parallelism by heads, FSDP2, sharded checkpoints, and their use in training."""
