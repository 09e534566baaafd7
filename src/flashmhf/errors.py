"""The errors that stand for bad input, a run that failed and one that was told to end, as opposed to a bug."""

import signal


class InputError(ValueError):
    """Something that the user gave does not fit. The message is one line: about what, expected what, got what."""


class RunError(RuntimeError):
    """A run could not go on. The message is one line: about what, expected what, got what, and what is kept."""


class Interrupted(BaseException):
    """A signal asked for the end, as KeyboardInterrupt is for Ctrl-C."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number
