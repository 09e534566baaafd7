"""The errors that stand for bad input and for a run that failed, as opposed to a bug."""


class InputError(ValueError):
    """Something that the user gave does not fit. The message is one line: about what, expected what, got what."""


class RunError(RuntimeError):
    """A run could not go on. The message is one line: about what, expected what, got what, and what is kept."""
