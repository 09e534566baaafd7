"""A build of the operators and the layer for the Hugging Face Kernel Hub: `python -m flashmhf.integrations.kernel_hub`.

The build is made from this package's files and does not need the package afterwards.
"""
