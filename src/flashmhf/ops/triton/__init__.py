"""The portable GPU backend: Triton kernels for NVIDIA from sm_80 on and for AMD."""
