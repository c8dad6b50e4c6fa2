"""Encoded images inside larger files: each is a range of bytes, read by its offset."""

import hashlib
import os
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from ood_heatmap.encoded import EncodedReader
from ood_heatmap.errors import OodHeatmapError, printable
from ood_heatmap.images import ImageSet
from ood_heatmap.listing import ChainedNames, Labelling, Names, short_names

_MAX_OPEN_FILES = 16


@dataclass(frozen=True)
class Shard:
    """A file that holds many images.

    Args:
        path: The file.
        stamp: Its size and modification time as of the listing.
        names: Name of each image, within the file.
        sizes: int64 sizes that are known without reading the images, for the hash of the listing.
    """

    path: str
    stamp: tuple[int, int]
    names: Names
    sizes: NDArray[np.int64]


@dataclass(frozen=True)
class PackedFile(Shard):
    """A file in which every image is a range of bytes; ``sizes`` is ``(N,)``, the bytes of each.

    Args:
        offset: ``(N,)`` int64 position of the bytes of each image.
    """

    offset: NDArray[np.int64]


def set_of_packed(files: Sequence[PackedFile], labelling: Labelling, *, source: str) -> ImageSet:
    """Make an image set of files in which images are ranges of bytes, see ``set_of_shards``."""
    return set_of_shards(files, _PackedReader(files).fetch, labelling, source=source)


def set_of_shards(
    shards: Sequence[Shard], fetch: Callable[[int], bytes], labelling: Labelling, *, source: str
) -> ImageSet:
    """Make an image set of files that hold many images each.

    Args:
        shards: The files, in the order of their rows.
        fetch: Row to bytes, as for ``EncodedReader``.
        labelling: Labels and classes.
        source: Name for messages.
    """
    prefixes = [f"{name}/" for name in short_names([shard.path for shard in shards])]
    names = [shard.names for shard in shards]
    full_names = ChainedNames([(f"{shard.path}/", shard.names) for shard in shards])
    listing = hashlib.sha256()
    for prefix, shard in zip(prefixes, shards, strict=True):
        listing.update(f"{prefix}\0{len(shard.names)}\n".encode())
        for array in (*shard.names.to_arrays(), shard.sizes):
            listing.update(array.tobytes())
    labelling.update(listing)
    stamps = np.array([shard.stamp for shard in shards])
    return ImageSet(
        source=printable(source),
        names=ChainedNames(list(zip(prefixes, names, strict=True))),
        labels=labelling.labels,
        classes=labelling.classes,
        reader=EncodedReader(fetch, full_names.__getitem__),
        listing=listing.hexdigest(),
        has_class_names=labelling.has_class_names,
        stamps=np.repeat(stamps, [len(shard.names) for shard in shards], axis=0),
    )


def check_unchanged(path: str, stamp: tuple[int, int], descriptor: int | None = None) -> None:
    """Check that a file is still the one that was listed.

    Args:
        path: The file.
        stamp: Its size and modification time as of the listing.
        descriptor: Descriptor of the file, if it is open.

    Raises:
        OSError: It is missing.
        OodHeatmapError: It has changed.
    """
    status = os.stat(path if descriptor is None else descriptor)
    if (status.st_size, status.st_mtime_ns) != stamp:
        raise OodHeatmapError(
            f"{printable(path)} has changed since it was listed. Run the command again."
        )


class _PackedReader:
    """Reads images in any order, from several threads, with few files open at a time.

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
        num_bytes, offset = int(file.sizes[local_row]), int(file.offset[local_row])
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
        self.descriptor = os.open(
            path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
        )
        check_unchanged(path, stamp, self.descriptor)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
