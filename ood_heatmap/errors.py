"""The errors that a user can mend.

This module imports nothing, so that every other may import it.
"""


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
