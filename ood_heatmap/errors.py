"""Errors that a user can fix, and text that is safe to show.

Imports nothing of the package, so that every other module may import it.
"""

import unicodedata


class OodHeatmapError(Exception):
    """Something about the data, the machine or a cache is wrong.

    The message is one line with the way out.
    """

    exit_code = 1


class UsageError(OodHeatmapError):
    """The arguments themselves are wrong."""

    exit_code = 2


class StaleCacheError(OodHeatmapError):
    """A cache was made from something else than what is asked for now."""


class DamagedCacheError(OodHeatmapError):
    """A file of a cache is missing, cut short or changed since it was written."""


def printable(text: str) -> str:
    r"""Return text as a single line for messages, figures and pages.

    Names of files and classes may hold anything. Line breaks, control characters and bytes that
    are not UTF-8 are escaped as in a Python string: ``a\nb``, ``\udcff``.
    """
    return "".join(
        character.encode("unicode_escape").decode("ascii")
        if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")
        else character
        for character in text
    )
