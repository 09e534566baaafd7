"""Models over many devices: heads over a mesh, FSDP2 over another, their checkpoints, and a Trainer that uses them."""
