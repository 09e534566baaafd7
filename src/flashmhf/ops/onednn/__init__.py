"""FlashMHF on x86 CPUs: one parallel region per pass, with oneDNN's micro-kernels and code compiled by Numba."""
