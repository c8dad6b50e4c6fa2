"""Errors that a user can fix, and escaping of text for display.

Imports nothing from the package, so that every other module may import it.
"""

import unicodedata


class OodHeatmapError(Exception):
    """An error that the user can fix: of the data, the machine or a cache.

    The message is one line and includes the remedy.
    """


class UsageError(OodHeatmapError):
    """Invalid arguments."""


class StaleCacheError(OodHeatmapError):
    """A cache was built from inputs other than the current ones."""


class DamagedCacheError(OodHeatmapError):
    """A file of a cache is missing, truncated or changed since it was written."""


def printable(text: str) -> str:
    r"""Return text as a single line for messages, figures and HTML.

    Names of files and classes may contain anything. Line breaks, control characters and bytes that
    are not UTF-8 are escaped as in a Python string: ``a\nb``, ``\udcff``.
    """
    if text.isprintable():
        return text
    return "".join(
        character.encode("unicode_escape").decode("ascii")
        if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")
        else character
        for character in text
    )
