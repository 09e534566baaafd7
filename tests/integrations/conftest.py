"""Leaves out the tests of libraries that are not installed: `make test` runs these in an environment of their own."""

from importlib.util import find_spec

collect_ignore = [
    file
    for file, library in (("test_kernel_hub.py", "kernels"), ("test_quantisation.py", "torchao"))
    if find_spec(library) is None
]
