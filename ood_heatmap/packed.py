"""Image files that lie inside larger files: each is a range of bytes, read by position."""

import hashlib
import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from ood_heatmap.encoded import EncodedReader
from ood_heatmap.errors import OodHeatmapError, printable
from ood_heatmap.images import ImageSet
from ood_heatmap.listing import ChainedNames, Labelling, Names, short_names, stamp_of

_MAX_OPEN_FILES = 16


@dataclass(frozen=True)
class PackedFile:
    """A file and the images in it.

    Args:
        path: The file.
        stamp: Its size and modification time as of the listing.
        names: Name of each image, within the file.
        offset: ``(N,)`` int64 position of its bytes.
        num_bytes: ``(N,)`` int64 number of its bytes.
    """

    path: str
    stamp: tuple[int, int]
    names: Names
    offset: NDArray[np.int64]
    num_bytes: NDArray[np.int64]


def set_of_packed(files: Sequence[PackedFile], labelling: Labelling, *, source: str) -> ImageSet:
    """Make an image set from images inside larger files.

    Args:
        files: The files, in the order of their rows.
        labelling: Labels and classes.
        source: Name for messages.
    """
    counts = [len(file.names) for file in files]
    prefixes = [f"{name}/" for name in short_names([file.path for file in files])]
    names = [file.names for file in files]
    full_names = ChainedNames([(f"{file.path}/", file.names) for file in files])
    listing = hashlib.sha256()
    for prefix, file in zip(prefixes, files, strict=True):
        listing.update(f"{prefix}\0{len(file.names)}\n".encode())
        for array in (*file.names.to_arrays(), file.num_bytes):
            listing.update(array.tobytes())
    labelling.update(listing)
    return ImageSet(
        source=printable(source),
        names=ChainedNames(list(zip(prefixes, names, strict=True))),
        labels=labelling.labels,
        classes=labelling.classes,
        reader=EncodedReader(_PackedReader(files).fetch, full_names.__getitem__),
        listing=listing.hexdigest(),
        has_class_names=labelling.has_class_names,
        stamps=np.repeat(np.array([file.stamp for file in files]), counts, axis=0),
    )


class _PackedReader:
    """Reads in any order, from several threads, with few files open at a time.

    Args:
        files: The files.
    """

    def __init__(self, files: Sequence[PackedFile]) -> None:
        self._files = files
        self._ends = list(accumulate(len(file.names) for file in files))
        # an evicted file is closed once no thread reads it any more
        self._open = lru_cache(_MAX_OPEN_FILES)(_OpenFile)

    def fetch(self, row: int) -> bytes:
        """Return the bytes of an image.

        Raises:
            OSError: The file cannot be read.
            ValueError: The file ends too early.
            OodHeatmapError: The file has changed since it was listed.
        """
        number = bisect_right(self._ends, row)
        file = self._files[number]
        local_row = row - self._ends[number] + len(file.names)
        num_bytes, offset = int(file.num_bytes[local_row]), int(file.offset[local_row])
        # the reference keeps the file open, also when another thread evicts it meanwhile
        opened = self._open(file.path, file.stamp)
        content = os.pread(opened.descriptor, num_bytes, offset)
        if len(content) != num_bytes:
            raise ValueError("truncated")
        return content


class _OpenFile:
    """A file open for reading, closed when nothing refers to it any more.

    Args:
        path: The file.
        stamp: Its size and modification time as of the listing.

    Raises:
        OodHeatmapError: The file has changed since it was listed.
    """

    descriptor: int = -1

    def __init__(self, path: str, stamp: tuple[int, int]) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        if stamp_of(self.descriptor) != stamp:
            raise OodHeatmapError(
                f"{printable(path)} has changed since it was listed. Run the command again."
            )

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
