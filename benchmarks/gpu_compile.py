"""Compiles kernels in many processes before one process launches them, because compilation takes the longest.

The launcher finds the results in Triton's cache on disk (tests/benchmarks/test_gpu_compile.py).
"""

import contextlib
import functools
import multiprocessing
import os
import queue
import signal
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

import triton

from compile_kernels import TARGETS, Compiled, Source, compile_source
from flashmhf.benchmarking.layer import describe
from gpu_kernels import KernelCase, launches

TIME_LIMIT_S = 120.0
START_LIMIT_S = 120.0  # importing torch in one process per core, from a cold disk


def compile_ahead(target: str, cases: Iterable[KernelCase], time_limit_s: float = TIME_LIMIT_S) -> list[Compiled | str]:
    """What the first launch of each case compiles to on a device class, or the first error of any, in one line.

    Args:
        target: one of TARGETS.
        cases: each is planned before the next is requested, with the tables of tiles of that moment.
        time_limit_s: per kernel; a kernel that takes longer is abandoned.
    """
    # torch.compile sets this variable for the process, and later launches would use another cache.
    os.environ.setdefault("TRITON_CACHE_DIR", triton.knobs.cache.dir)
    planned = [_sources(target, case) for case in cases]
    unique = {source.key: source for sources in planned if not isinstance(sources, str) for source in sources}
    workers = min(len(unique), len(os.sched_getaffinity(0)))
    if not workers:
        return [sources if isinstance(sources, str) else "no launch" for sources in planned]
    with ThreadPoolExecutor(workers) as threads:
        done = dict(zip(unique, threads.map(functools.partial(_compile, time_limit_s), unique.values()), strict=True))
    results: list[Compiled | str] = []
    for sources in planned:
        of_case = [sources] if isinstance(sources, str) else [done[source.key] for source in sources]
        results.append(next((result for result in of_case if isinstance(result, str)), of_case[0]))
    return results


def _sources(target: str, case: KernelCase) -> list[Source] | str:
    try:
        return [Source.of(launch, TARGETS[target]) for launch in launches(target, case)]
    except Exception as error:
        return describe(error)


class Compiler:
    """A process that compiles one source after another.

    Raises:
        TimeoutError: not finished (or not started) within its limit.
        EOFError: the process died.
    """

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would share the GPU's context
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        self._answer(START_LIMIT_S)

    def compile(self, source: Source, limit_s: float) -> Compiled | str:
        """The result, or the compiler's error."""
        self._connection.send(source)
        result: Compiled | str = self._answer(limit_s)
        return result

    def _answer(self, limit_s: float) -> Any:
        if self._connection.poll(limit_s):
            with contextlib.suppress(EOFError, ConnectionError):
                return self._connection.recv()
            raise EOFError(f"the compiler's process ended with exit code {self._kill()}")
        self._kill()
        raise TimeoutError(f"no answer within {limit_s:g} s")

    def _kill(self) -> int | None:
        """Kills the process, and the assembler that it may wait for, and returns its exit code."""
        self._process.join(1)  # if it is exiting, its own exit code is wanted
        assert self._process.pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()  # in case it is not yet a group leader
        self._process.join()
        return self._process.exitcode


_idle: queue.SimpleQueue[Compiler] = queue.SimpleQueue()  # reused across calls: each takes seconds to import torch


def _compile(limit_s: float, source: Source) -> Compiled | str:
    try:
        try:
            compiler = _idle.get_nowait()
        except queue.Empty:
            compiler = Compiler()
        result = compiler.compile(source, limit_s)
    except (TimeoutError, EOFError) as error:  # LLVM aborts the process if an assertion fails
        return describe(error)
    _idle.put(compiler)
    return result


def _serve(connection: Connection) -> None:
    os.setpgrp()
    connection.send("ready")
    with contextlib.suppress(EOFError):
        while True:
            connection.send(_compiled(connection.recv()))


def _compiled(source: Source) -> Compiled | str:
    try:
        return compile_source(source)
    except Exception as error:
        return describe(error)
