"""Find the files of a source with several files: a folder of shards, or a pattern of names."""

import glob
import os
import re
from collections.abc import Callable, Iterator
from itertools import islice

from ood_heatmap.errors import OodHeatmapError, UsageError, printable
from ood_heatmap.source_folder import entry_kind, image_suffixes, iter_visible, suffix_of

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"([0-9]{1,9})\.\.([0-9]{1,9})")
_MAX_FILES = 10**6


def is_pattern(source: str) -> bool:
    """Return whether a source is a pattern of file names, such as ``{000..147}.tar``."""
    return not os.path.exists(source) and bool(set(source) & set("*?[{"))


def find_files(pattern: str) -> list[str]:
    """Return the files that match a pattern: in the order of its braces, otherwise sorted.

    As in a shell, ``{000..147}`` expands to all numbers of a range, ``{a,b}`` to alternatives, and
    ``*``, ``?`` and ``[...]`` match existing files.

    Raises:
        OodHeatmapError: A file is missing, or no file matches.
        UsageError: There are too many.
    """
    names = list(islice(_expand_braces(pattern), _MAX_FILES + 1))
    if len(names) > _MAX_FILES:
        raise UsageError(f"{pattern} names more than {_MAX_FILES} files.")
    found = []
    for name in names:
        is_glob = glob.has_magic(name) and not os.path.exists(name)
        files = sorted(glob.glob(name)) if is_glob else [name] * os.path.isfile(name)
        if not files:
            raise OodHeatmapError(
                f"there is no file {printable(name)}, which {printable(pattern)} names. "
                "Correct the pattern, or add the file."
            )
        found += files
    return found


def _expand_braces(pattern: str) -> Iterator[str]:
    """Yield the expansions of the braces of a pattern; the last braces vary fastest."""
    braces = _BRACES.search(pattern)
    if braces is None:
        yield pattern
        return
    for choice in _choices(braces[1]):
        for rest in _expand_braces(pattern[braces.end() :]):
            yield pattern[: braces.start()] + choice + rest


def _choices(inside: str) -> Iterator[str]:
    """Yield the choices of one pair of braces; numbers are padded to the width of the first."""
    bounds = _RANGE.fullmatch(inside)
    if bounds is None:
        yield from inside.split(",")
        return
    first, last = int(bounds[1]), int(bounds[2])
    for number in range(first, last + 1):
        yield f"{number:0{len(bounds[1])}}"


def find_shards(folder: str, is_shard: Callable[[str], object]) -> list[str]:
    """Return the shards in a folder, sorted; none if it also has images or subfolders."""
    found = []
    try:
        for entry in iter_visible(folder):
            if suffix_of(entry.name) in image_suffixes() or entry_kind(entry) == "folder":
                return []
            if is_shard(entry.name):
                found.append(entry.path)
    except OSError:
        # reported when it is opened as a folder of images
        return []
    return sorted(found)
