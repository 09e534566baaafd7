"""The error that stands for bad input, as opposed to a bug."""


class InputError(ValueError):
    """Something that the user gave does not fit. The message is one line: about what, expected what, got what."""
