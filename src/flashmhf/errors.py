"""Errors for bad input, for a run that failed and for one that was told to stop, as opposed to bugs."""

import signal


class InputError(ValueError):
    """Something that the user gave does not fit. The message is one line: "argument: expected X, got Y"."""


class RunError(RuntimeError):
    """A run could not continue. The message is one line: "argument: expected X, got Y; what is kept"."""


def one_line_message(error: BaseException) -> str:
    """What a library's error says, in one line; its type if it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


class Interrupted(BaseException):
    """A signal asked the process to stop, as Ctrl-C does with KeyboardInterrupt; `then` says how to go on."""

    def __init__(self, number: int, then: str = "") -> None:
        super().__init__(signal.Signals(number).name + (f"; {then}" if then else ""))
        self.number = number
