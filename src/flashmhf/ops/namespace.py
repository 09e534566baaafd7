"""Where the operators are registered: torch.ops.flashmhf. A Kernel Hub build replaces this file."""

NAMESPACE = "flashmhf"
