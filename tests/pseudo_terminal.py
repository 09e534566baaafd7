"""Commands on a terminal of 80 columns, as a person sees them."""

import fcntl
import os
import pty
import re
import select
import struct
import sys
import termios
import time

COLUMNS = 80
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
ERASED = re.compile(r".*(\x1b\[2K|\r)")  # what was on a line before


def on_terminal(*arguments: str, typed: tuple[str, str] | None = None, **environment: str) -> tuple[int, str]:
    """The exit code of `flashmhf` with these arguments, and everything it writes.

    Args:
        arguments: of the command line.
        typed: a text to wait for, and the keys that are typed then.
        environment: further variables.
    """
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update({"TERM": "xterm-256color", **environment})
        os.environ.pop("HF_HUB_DISABLE_PROGRESS_BARS", None)
        os.execv(sys.executable, [sys.executable, "-m", "flashmhf", *arguments])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, COLUMNS, 0, 0))
    written = b""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if select.select([terminal], [], [], 1)[0]:
            try:
                written += os.read(terminal, 2**16)
            except OSError:  # closed
                break
            if typed is not None and typed[0].encode() in written:
                os.write(terminal, typed[1].encode())
                typed = None
    else:
        os.kill(pid, 9)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), written.decode(errors="replace")


def seen(written: str) -> list[str]:
    """Lines as they stand after erasures, without bars and colours."""
    lines = [CONTROL.sub("", ERASED.sub("", line.rstrip("\r"))) for line in written.split("\n")]
    return [line.rstrip() for line in lines if line.strip() and "━" not in line]
