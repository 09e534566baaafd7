"""Names and text of others on a terminal: what would move the cursor, change colours or hide text is escaped."""

import re

# C0 and C1 controls but newline and tab, what changes the direction of writing, line separators, lone surrogates.
_ACTIVE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """The text with such characters as Python writes them: `\\x1b` for an escape."""
    return _ACTIVE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def one_line(text: str) -> str:
    """The same for newlines and tabs, too."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")
