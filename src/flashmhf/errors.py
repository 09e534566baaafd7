"""The error that stands for bad input, as opposed to a bug."""


class InputError(ValueError):
    """Something the user gave does not fit. The message is one line: what it is about, what was expected, what was given."""
