"""Kernels broken on purpose, to show that a test would notice."""

import inspect
import linecache
from itertools import count

from triton.runtime.jit import JITFunction

NUMBERS = count()


def mutated(kernel, old: str, new: str):
    """`kernel` after one change of the source of its module's jitted functions, which `old` must name exactly."""
    scope = dict(kernel.fn.__globals__)
    mine = [f for f in scope.values() if isinstance(f, JITFunction) and f.fn.__module__ == kernel.fn.__module__]
    source = "\n\n".join(inspect.getsource(function.fn) for function in mine)
    assert source.count(old) == 1, f"{old!r} is {source.count(old)} times in the source"
    lines = source.replace(old, new).splitlines(keepends=True)
    name = f"mutant{next(NUMBERS)}.py"
    linecache.cache[name] = (len(source), None, lines, name)
    exec(compile("".join(lines), name, "exec"), scope)
    return scope[kernel.fn.__name__]
