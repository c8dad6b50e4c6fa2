"""Reads rows of shards, from any number of threads.

Rows in the page cache are copied from the memory map, the fastest way. Other large rows are read
with ``preadv``: a failing disk is then an error instead of a fatal page fault, and page tables do
not grow with the data set. If the page cache is large enough to keep them, they are read through
it, and all are requested before the first is awaited, so that the disk has many reads in flight.
Otherwise they bypass it (``O_DIRECT``), which takes half of the CPU time and evicts nothing.
"""

import errno
import mmap
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ood_heatmap.cache.files import read_error
from ood_heatmap.cache.shards import Rows
from ood_heatmap.errors import DamagedCacheError

try:
    import resource
except ImportError:
    # Windows
    resource = None  # type: ignore[assignment]

_Array = NDArray[Any]
_Int64 = NDArray[np.int64]

# bytes of a row over all columns; smaller rows are faulted in with their neighbors, by read-ahead
_LARGE_ROW = 64 << 10
# shards that a reader keeps open, and that one read keeps open until it is finished, at most
_MAX_OPEN, _MAX_PENDING = 2048, 64
# reads what is in the page cache and fails on anything else; 0 where the system lacks it
_NOWAIT = getattr(os, "RWF_NOWAIT", 0)
# alignment of direct reads, in the file and in memory, and the maximum size of one
_BLOCK, _BUFFER = 4096, 1 << 20
_local = threading.local()


class RowReader:
    """Reads the same ascending rows of several columns; safe to share between threads.

    Args:
        columns: Columns of the same shards, or of one array in memory.
        direct: Read large rows with ``O_DIRECT``, if the page cache is too small to keep them.
    """

    def __init__(self, columns: Mapping[str, Rows], *, direct: bool = False) -> None:
        self.columns, self.direct = columns, direct
        self.names = tuple(columns)
        first = columns[self.names[0]]
        self.starts, self.on_disk = first.starts, bool(first.paths)
        self.row_bytes = sum(_row_bytes(column) for column in columns.values())
        num_kept, self.max_pending = _shards_open(direct=direct)
        self._open = lru_cache(num_kept)(partial(_open_shard, list(columns.values()), direct))

    def read(self, rows: _Int64, outs: Mapping[str, _Array]) -> None:
        """Read rows into buffers.

        Args:
            rows: ``(B,)`` ascending integers.
            outs: Output array of each column, ``(B, ...)``, contiguous.

        Raises:
            IndexError: A row is out of range.
            DamagedCacheError: A shard was truncated; names it.
            OodHeatmapError: The system cannot read a shard; names it.
        """
        if not len(rows):
            return
        if not 0 <= rows[0] <= rows[-1] < self.starts[-1]:
            raise IndexError(f"rows {rows[0]}..{rows[-1]} of an array of {self.starts[-1]}")
        pending: list[list[_PendingRead]] = []
        for number, first, last in _iter_shards(rows, self.starts):
            shard_rows = rows[first:last] - self.starts[number]
            shard_outs = [outs[name][first:last] for name in self.names]
            shard = self._open(number) if self.on_disk else None
            if shard is None or self._should_copy(shard, int(shard_rows[0])):
                for column, out in zip(self.columns.values(), shard_outs, strict=True):
                    # with the default mode="raise" NumPy would buffer a second copy
                    column.arrays[number].take(shard_rows, axis=0, out=out, mode="clip")
            else:
                pending.append(shard.request(shard_rows, shard_outs))
            if len(pending) == self.max_pending:
                _finish(pending)
        _finish(pending)

    def _should_copy(self, shard: "_Shard", row: int) -> bool:
        """Return whether to copy rows from the memory map, judged by the first of them."""
        shard.check_size()
        return self.row_bytes < _LARGE_ROW or shard.is_cached(row)


def _shards_open(*, direct: bool) -> tuple[int, int]:
    """Return how many shards a reader keeps open, and how many a read may open until it ends.

    With two readers in 16 threads that is less than half of the descriptors of the process.
    """
    if resource is None:
        return _MAX_OPEN, _MAX_PENDING
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return _MAX_OPEN, _MAX_PENDING
    num_shards = limit // (16 if direct else 8)
    return max(1, min(_MAX_OPEN, num_shards)), max(1, min(_MAX_PENDING, num_shards // 16))


def _finish(pending: "list[list[_PendingRead]]") -> None:
    """Finish reads and empty their list, so that the shards can be closed."""
    for reads in pending:
        for read in reads:
            read.finish()
    pending.clear()


def _row_bytes(column: Rows) -> int:
    return column.dtype.itemsize * int(np.prod(column.shape[1:]))


def _iter_shards(rows: _Int64, starts: _Int64) -> Iterator[tuple[int, int, int]]:
    """Yield number, first and last position in ``rows`` of each shard that contains any of them."""
    shards = starts.searchsorted(rows, side="right") - 1
    for first, last in _runs(shards, step=0):
        yield int(shards[first]), first, last


def _runs(values: _Int64, step: int) -> Iterator[tuple[int, int]]:
    """Return first and last position of each run in which values grow by ``step``."""
    # methods: a small batch feels the wrappers of np.diff and np.flatnonzero
    (ends,) = (values[1:] != values[:-1] + step).nonzero()
    return pairwise([0, *(ends + 1).tolist(), len(values)])


@dataclass(frozen=True, eq=False)
class _Shard:
    """An open shard, closed with its last reference: no thread reads from a reused descriptor.

    Args:
        path: The file.
        descriptor: Descriptor for reads through the page cache.
        direct: Descriptor for direct reads, or None.
        num_bytes: Minimum size of the file.
        offsets: Byte offset of each column.
        row_bytes: Bytes of one row of each column.
    """

    path: Path
    descriptor: int
    direct: int | None
    num_bytes: int
    offsets: Sequence[int]
    row_bytes: Sequence[int]

    def __del__(self) -> None:
        os.close(self.descriptor)
        if self.direct is not None:
            os.close(self.direct)

    def check_size(self) -> None:
        """Raise if the file is truncated: reading its memory map would kill the process."""
        # cheaper than fstat, and reads give their own offset
        if os.lseek(self.descriptor, 0, os.SEEK_END) < self.num_bytes:
            raise self.truncated()

    def truncated(self) -> DamagedCacheError:
        """Return the error for a file that ends too early."""
        return DamagedCacheError(
            f"{self.path} was truncated while it was read. Delete it and run the stage again."
        )

    def is_cached(self, row: int) -> bool:
        """Return whether the first byte of a row of the largest column is in the page cache.

        True where the system has no ``preadv``: then all rows are copied from the memory map.
        """
        if not hasattr(os, "preadv"):
            return True
        largest = self.row_bytes.index(max(self.row_bytes))
        offset = self.offsets[largest] + row * self.row_bytes[largest]
        try:
            return os.preadv(self.descriptor, [bytearray(1)], offset, _NOWAIT) == 1
        except OSError:
            # not in the page cache, or the file system does not support the flag
            return False

    def request(self, rows: _Int64, outs: Sequence[_Array]) -> "list[_PendingRead]":
        """Request read-ahead of rows, contiguous rows together; return the reads."""
        reads = []
        for first, last in _runs(rows, step=1):
            for offset, row_bytes, out in zip(self.offsets, self.row_bytes, outs, strict=True):
                buffer = out[first:last].reshape(-1).view(np.uint8)
                start = offset + int(rows[first]) * row_bytes
                direct = self.direct is not None and len(buffer) >= _LARGE_ROW
                if not direct:
                    _advise(self.descriptor, start, len(buffer), "WILLNEED")
                reads.append(_PendingRead(self, start, buffer, direct))
        return reads


@dataclass(frozen=True)
class _PendingRead:
    """A requested read of contiguous bytes of a shard."""

    shard: _Shard
    offset: int
    buffer: NDArray[np.uint8]
    direct: bool

    def finish(self) -> None:
        """Read all bytes; a single call may return fewer than requested."""
        read, done = self._read_direct if self.direct else self._read, 0
        while done < len(self.buffer):
            try:
                count = read(self.buffer[done:], self.offset + done)
            except OSError as error:
                raise read_error(self.shard.path, error) from error
            if not count:
                raise self.shard.truncated()
            done += count

    def _read(self, buffer: NDArray[np.uint8], offset: int) -> int:
        return os.preadv(self.shard.descriptor, [buffer.data], offset)

    def _read_direct(self, buffer: NDArray[np.uint8], offset: int) -> int:
        """Read whole blocks with ``O_DIRECT``, and copy the requested bytes."""
        assert self.shard.direct is not None
        skip = offset % _BLOCK
        num_blocks = -(-(skip + len(buffer)) // _BLOCK)
        blocks = _aligned_buffer()[: num_blocks * _BLOCK]
        try:
            count = os.preadv(self.shard.direct, [blocks.data], offset - skip)
        except OSError as error:
            # the file system has larger blocks
            if error.errno == errno.EINVAL:
                return self._read(buffer, offset)
            raise
        wanted = blocks[skip:count][: len(buffer)]
        buffer[: len(wanted)] = wanted
        return len(wanted)


def _aligned_buffer() -> NDArray[np.uint8]:
    """Return this thread's page-aligned buffer."""
    if not hasattr(_local, "buffer"):
        _local.buffer = np.frombuffer(mmap.mmap(-1, _BUFFER), np.uint8)
    buffer: NDArray[np.uint8] = _local.buffer
    return buffer


def _open_shard(columns: Sequence[Rows], direct: bool, number: int) -> _Shard:
    """Open a shard for random reads."""
    path = columns[0].paths[number]
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise read_error(path, error) from error
    # disables read-ahead beyond each row, which no row of this batch may need
    _advise(descriptor, 0, 0, "RANDOM")
    offsets = [column.offset(number) for column in columns]
    ends = [
        offset + column.arrays[number].nbytes
        for column, offset in zip(columns, offsets, strict=True)
    ]
    return _Shard(
        path,
        descriptor,
        _open_direct(path) if direct else None,
        max(ends),
        offsets,
        [_row_bytes(column) for column in columns],
    )


def _open_direct(path: Path) -> int | None:
    """Open a file for direct reads; None if its file system does not support them."""
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECT)
    # macOS has no such flag
    except (OSError, AttributeError):
        return None


def _advise(descriptor: int, offset: int, num_bytes: int, advice: str) -> None:
    """Call ``posix_fadvise`` if the system has it; macOS does not."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, offset, num_bytes, getattr(os, f"POSIX_FADV_{advice}"))
