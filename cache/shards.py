"""HDF5 shards: write one atomically, read many as one array.

Datasets are contiguous so that readers can memory-map them: random batches run at memory speed,
where h5py indexing of chunked data is some 300 times slower. HDF5 writes the header and we write
the rows: on a full disk HDF5 can leave a file that opens cleanly and holds zeros.
"""

import ctypes
import errno
import math
import mmap
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from ood_heatmap.cache.files import read_error, replacing, reserve, system_error
from ood_heatmap.errors import DamagedCacheError

FORMAT = 1
Array = NDArray[Any]
# what h5py raises for a damaged file: a header with a fitting checksum can still hold anything
_UNREADABLE = (OSError, KeyError, TypeError, AttributeError, RuntimeError, ValueError)


@dataclass(frozen=True)
class Column:
    """A dataset that every shard of a stage has.

    Args:
        dtype: NumPy's name of it.
        shape: Of one row.
        about: What it is, in words; the dataset's attribute ``about``.
        attributes: Further attributes of the dataset: its unit or scale.
    """

    dtype: str
    shape: tuple[int, ...]
    about: str
    attributes: Mapping[str, float] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Bytes of one row."""
        return np.dtype(self.dtype).itemsize * math.prod(self.shape)

    def fits(self, array: "Array | Rows") -> bool:
        """Tell whether an array of rows is of this dtype and shape."""
        return array.dtype == np.dtype(self.dtype) and array.shape[1:] == self.shape


def bytes_per_row(columns: Mapping[str, Column]) -> int:
    """Return the bytes of one row of all columns."""
    return sum(column.num_bytes for column in columns.values())


def write_shard(
    path: Path,
    arrays: Mapping[str, Array],
    *,
    attributes: Mapping[str, str | int] | None = None,
    columns: Mapping[str, Column] | None = None,
    record: Callable[[Path], None] | None = None,
) -> None:
    """Write one shard whole, or leave nothing behind. The same arrays give the same bytes.

    Args:
        path: Where; an existing file is replaced.
        arrays: Dataset name to array, all of equally many rows, in any memory order.
        attributes: Attributes of the file.
        columns: What each dataset must be, and its attributes; not checked when None.
        record: As for ``cache.files.replacing``.

    Raises:
        ValueError: The arrays differ in their number of rows, or are not those of the columns.
        OodHeatmapError: The disk is full or read-only.
    """
    rows = {name: len(array) for name, array in arrays.items()}
    if len(set(rows.values())) != 1:
        raise ValueError(f"arrays of {path.name} must have equally many rows, got {rows}")
    columns = columns or {}
    wrong = [name for name, column in columns.items() if not column.fits(arrays[name])]
    if wrong or (columns and columns.keys() != arrays.keys()):
        raise ValueError(f"arrays of {path.name} are not its columns ({wrong or list(arrays)})")
    with replacing(path, record=record) as scratch:
        with h5py.File(scratch, "w") as file:
            file.attrs["format"] = FORMAT
            for key, value in (attributes or {}).items():
                file.attrs[key] = value
            offsets = {
                name: _reserve_dataset(file, name, array, columns.get(name))
                for name, array in arrays.items()
            }
        with scratch.open("r+b") as raw:
            reserve(raw.fileno(), os.fstat(raw.fileno()).st_size)
            for name, array in arrays.items():
                offset = offsets[name]
                if offset is not None:  # an empty dataset has no place in the file
                    raw.seek(offset)
                    raw.write(np.ascontiguousarray(array).data.cast("B"))


def _reserve_dataset(file: h5py.File, name: str, array: Array, column: Column | None) -> int | None:
    """Make a contiguous dataset without writing it; return its byte offset in the file."""
    settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    settings.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    settings.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    settings.set_obj_track_times(False)
    kind, space = h5py.h5t.py_create(array.dtype, logical=True), h5py.h5s.create_simple(array.shape)
    dataset = h5py.Dataset(h5py.h5d.create(file.id, name.encode(), kind, space, settings))
    if column is not None:
        for key, value in {"about": column.about, **column.attributes}.items():
            dataset.attrs[key] = value
    offset: int | None = dataset.id.get_offset()
    return offset


def map_shard(path: Path) -> dict[str, Array]:
    """Return the datasets of one shard as read-only views of one memory map.

    Raises:
        OodHeatmapError: The file cannot be opened.
        DamagedCacheError: It is missing, cut short, not HDF5, of another format, or not contiguous.
    """
    layout = _layout_of(path)
    whole = _map_file(path)
    return {name: _view(path, whole, name, *place) for name, place in layout.items()}


def _layout_of(path: Path) -> dict[str, tuple[int | None, tuple[int, ...], np.dtype[Any]]]:
    """Return the byte offset, shape and dtype of each dataset of a shard."""
    try:
        with h5py.File(path, "r") as file:
            if file.attrs.get("format") != FORMAT:
                raise DamagedCacheError(
                    f"{path} has format {file.attrs.get('format')}, this version reads {FORMAT}. "
                    "Make it again with this version, or read it with the one that wrote it."
                )
            return {
                name: (item.id.get_offset(), item.shape, item.dtype) for name, item in file.items()
            }
    except _UNREADABLE as error:
        _raise_if_refused(path, error)
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DamagedCacheError(
            f"{path} cannot be read as a shard ({reason}). Delete it and start the stage again."
        ) from error


def _raise_if_refused(path: Path, error: Exception) -> None:
    """Raise what the system refuses to read as such: it is not damaged, never advise to delete it.

    Raises:
        OodHeatmapError: The system refused to open or read the file.
    """
    refused = system_error(error)
    if refused is not None and refused.errno not in (None, errno.ENOENT):
        raise read_error(path, refused) from error


def _map_file(path: Path) -> NDArray[np.uint8]:
    """Return the bytes of a file as a read-only memory map that holds no file descriptor.

    Python's own mmap keeps one open for good, and a process may have only some 1,000 of them.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    with path.open("rb") as file:
        num_bytes = os.fstat(file.fileno()).st_size
        address = libc.mmap(None, num_bytes, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
    if address == ctypes.c_void_p(-1).value:
        raise read_error(path, OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno())))
    buffer = (ctypes.c_uint8 * num_bytes).from_address(address)
    # every view refers to the buffer: the last one to go unmaps the file
    weakref.finalize(buffer, libc.munmap, address, num_bytes).atexit = False
    array: NDArray[np.uint8] = np.frombuffer(memoryview(buffer), np.uint8)
    array.flags.writeable = False
    return array


def _view(
    path: Path,
    whole: NDArray[np.uint8],
    name: str,
    offset: int | None,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
) -> Array:
    """Return one contiguous dataset of a mapped file, its extent checked against the file's."""
    if 0 in shape:
        return np.empty(shape, dtype)
    num_bytes = math.prod(shape) * dtype.itemsize
    if offset is None or dtype.hasobject or offset + num_bytes > len(whole):
        raise DamagedCacheError(
            f"{path}: dataset {name} is not whole and contiguous. "
            "Delete the file and start the stage again."
        )
    return whole[offset : offset + num_bytes].view(dtype).reshape(shape)


def read_attributes(path: Path) -> dict[str, Any]:
    """Return the attributes of a shard's file; empty when it is not a shard.

    Raises:
        OodHeatmapError: The system refused to read it.
    """
    try:
        with h5py.File(path, "r") as file:
            return dict(file.attrs)
    except _UNREADABLE as error:
        _raise_if_refused(path, error)
        return {}


@dataclass(frozen=True)
class Rows:
    """One dataset over many shards, read as if it were one array.

    Args:
        parts: The shards' arrays in order; equal but for the number of rows.
    """

    parts: Sequence[Array]
    starts: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "starts", np.cumsum([0, *map(len, self.parts)], dtype=np.int64))

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole, rows first."""
        return (len(self), *self.parts[0].shape[1:])

    @property
    def dtype(self) -> np.dtype[Any]:
        """The datasets' dtype."""
        return self.parts[0].dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole."""
        return sum(part.nbytes for part in self.parts)

    def take(self, rows: Array, out: Array | None = None) -> Array:
        """Return the given rows, in the given order.

        Args:
            rows: ``(B,)`` integers in [0, len).
            out: Where to put them; made when not given.

        Raises:
            IndexError: A row is out of range.
        """
        if out is None:
            out = np.empty((len(rows), *self.shape[1:]), self.dtype)
        if (rows[1:] >= rows[:-1]).all():
            take_ascending([self], rows, [out])
            return out
        low, high = rows.min(), rows.max()
        if not 0 <= low <= high < len(self):
            raise IndexError(f"rows {low}..{high} of an array of {len(self)}")
        if len(self.parts) == 1:
            # mode: the default, "raise", makes a second copy of the whole batch
            return self.parts[0].take(rows, axis=0, out=out, mode="clip")
        shard_of = np.searchsorted(self.starts, rows, side="right") - 1
        for number in np.unique(shard_of):
            here = np.flatnonzero(shard_of == number)
            out[here] = self.parts[number].take(rows[here] - self.starts[number], axis=0)
        return out

    def read(self) -> Array:
        """Return all of it in memory."""
        return np.concatenate(self.parts)

    def __iter__(self) -> Iterator[Array]:
        return iter(self.parts)


def take_ascending(columns: Sequence[Rows], rows: Array, outs: Sequence[Array]) -> None:
    """Read the same rows of several columns.

    Those of a shard lie together in the result, so nothing is copied twice.

    Args:
        columns: Of the same shards.
        rows: ``(B,)`` integers that ascend.
        outs: Where to put them, for each column.

    Raises:
        IndexError: A row is out of range.
    """
    if not len(rows):
        return
    starts = columns[0].starts
    if not 0 <= rows[0] <= rows[-1] < starts[-1]:
        raise IndexError(f"rows {rows[0]}..{rows[-1]} of an array of {starts[-1]}")
    bounds = np.searchsorted(rows, starts).tolist()
    for number, (first, last) in enumerate(pairwise(bounds)):
        if first < last:
            here = rows[first:last] - starts[number]
            for column, out in zip(columns, outs, strict=True):
                column.parts[number].take(here, axis=0, out=out[first:last], mode="clip")


def open_rows(
    paths: Sequence[Path], columns: Mapping[str, Column] | None = None
) -> dict[str, Rows]:
    """Return each dataset of the given shards as one array over all of them.

    Args:
        paths: Of the shards, in order; one at least.
        columns: What each dataset must be; not checked when None.

    Raises:
        DamagedCacheError: A shard is damaged, the shards do not hold the same datasets, or not
            those of the columns.
    """
    shards = [map_shard(path) for path in paths]
    for path, shard in zip(paths, shards, strict=True):
        kinds = {name: (array.shape[1:], array.dtype) for name, array in shard.items()}
        wanted = {name: (array.shape[1:], array.dtype) for name, array in shards[0].items()}
        if kinds != wanted:
            raise DamagedCacheError(f"{path} does not hold the same datasets as {paths[0].name}.")
    rows = {name: Rows([shard[name] for shard in shards]) for name in shards[0]}
    for name, column in (columns or {}).items():
        if name not in rows or not column.fits(rows[name]):
            raise DamagedCacheError(
                f"{paths[0].parent}: dataset {name} of the shards is missing or not {column.dtype} "
                f"{column.shape} a row. Delete the directory and make the stage again."
            )
    return rows
