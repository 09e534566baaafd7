"""Kernels with one line changed, to show that a test catches it."""

import inspect
import linecache
import sys
from itertools import count

from triton.runtime.jit import JITFunction

NUMBERS = count()


def package(function: JITFunction) -> str:
    return function.fn.__module__.rpartition(".")[0]


def mutated(kernel, old: str, new: str):
    """`kernel` with `old` replaced by `new` in its source or in what it calls in its package; `old` must be unique."""
    modules = [kernel.fn.__module__]
    for module in modules:  # grows
        called = [f for f in vars(sys.modules[module]).values() if isinstance(f, JITFunction)]
        modules += dict.fromkeys(f.fn.__module__ for f in called if package(f) == package(kernel)).keys() - set(modules)
    scope = {name: value for module in reversed(modules) for name, value in vars(sys.modules[module]).items()}
    mine = {f.fn for f in scope.values() if isinstance(f, JITFunction) and f.fn.__module__ in modules}
    source = "\n\n".join(inspect.getsource(function) for function in sorted(mine, key=lambda f: f.__qualname__))
    assert source.count(old) == 1, f"{old!r} is {source.count(old)} times in the source"
    lines = source.replace(old, new).splitlines(keepends=True)
    name = f"mutant{next(NUMBERS)}.py"
    linecache.cache[name] = (len(source), None, lines, name)
    exec(compile("".join(lines), name, "exec"), scope)
    return scope[kernel.fn.__name__]
