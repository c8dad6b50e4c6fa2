"""HDF5 shards: write each atomically, read many as one array.

Datasets are contiguous so that readers can memory-map them: random batches run at memory speed,
where h5py indexing of chunked data is about 300 times slower. HDF5 writes the header and we write
the rows: on a full disk HDF5 can leave a file that opens cleanly and holds zeros.
"""

import ctypes
import errno
import math
import mmap
import os
import re
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from ood_heatmap.cache.files import read_error, replacing, reserve, system_error
from ood_heatmap.errors import DamagedCacheError, OodHeatmapError

FORMAT = 1
_Array = NDArray[Any]
# dtypes of datasets as text, and the maximum that NumPy can address
_DTYPE, _MAX_BYTES = re.compile("[<>|][biuf][1248]"), 2**59
# what h5py raises for a damaged file: a header with a valid checksum can still contain anything
_UNREADABLE = (OSError, KeyError, TypeError, AttributeError, RuntimeError, ValueError)


@dataclass(frozen=True)
class Column:
    """A dataset that every shard of a stage contains.

    Args:
        dtype: NumPy dtype name.
        shape: Shape of one row.
        about: Description, stored as the dataset's attribute ``about``.
        attributes: Further attributes of the dataset, such as its unit or scale.
    """

    dtype: str
    shape: tuple[int, ...]
    about: str
    attributes: Mapping[str, float] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Bytes of one row."""
        return np.dtype(self.dtype).itemsize * math.prod(self.shape)

    def matches(self, array: "_Array | Rows") -> bool:
        """Return whether an array of rows has this dtype and row shape."""
        return array.dtype == np.dtype(self.dtype) and array.shape[1:] == self.shape


def bytes_per_row(columns: Mapping[str, Column]) -> int:
    """Return the bytes of one row over all columns."""
    return sum(column.num_bytes for column in columns.values())


def write_shard(
    path: Path,
    arrays: Mapping[str, _Array],
    *,
    attributes: Mapping[str, str | int] | None = None,
    columns: Mapping[str, Column] | None = None,
    record: Callable[[Path], None] | None = None,
) -> None:
    """Write one shard atomically and deterministically.

    Args:
        path: The file to write or replace.
        arrays: Maps dataset name to array; equal numbers of rows, any memory order.
        attributes: Attributes of the file.
        columns: Expected dtype and shape of each dataset, and its attributes; unchecked if None.
        record: As for ``cache.files.replacing``.

    Raises:
        ValueError: The arrays differ in their number of rows, or do not match the columns.
        OodHeatmapError: The disk is full or read-only.
    """
    rows = {name: len(array) for name, array in arrays.items()}
    if len(set(rows.values())) != 1:
        raise ValueError(f"arrays of {path.name} must have equally many rows, got {rows}")
    columns = columns or {}
    wrong = [name for name, column in columns.items() if not column.matches(arrays[name])]
    if wrong or (columns and columns.keys() != arrays.keys()):
        raise ValueError(
            f"arrays of {path.name} do not match its columns ({wrong or list(arrays)})"
        )
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
                # HDF5 allocates no bytes for an empty dataset
                if offset is not None:
                    raw.seek(offset)
                    raw.write(np.ascontiguousarray(array).data.cast("B"))


def _reserve_dataset(
    file: h5py.File, name: str, array: _Array, column: Column | None
) -> int | None:
    """Allocate a contiguous dataset without writing it; return its byte offset in the file."""
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


@dataclass(frozen=True)
class Header:
    """Attributes of a shard, and where its datasets are.

    Args:
        attributes: Attributes of the file that are text or integers.
        datasets: Byte offset, shape and dtype of each dataset; the offset is None without rows, or
            if the dataset is not contiguous.
    """

    attributes: Mapping[str, str | int]
    datasets: Mapping[str, tuple[int | None, tuple[int, ...], np.dtype[Any]]]

    def to_json(self) -> dict[str, Any]:
        """Return the header as JSON."""
        datasets = {
            name: [offset, list(shape), dtype.str]
            for name, (offset, shape, dtype) in self.datasets.items()
        }
        return {"attributes": dict(self.attributes), "datasets": datasets}

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> "Header":
        """Parse the JSON of a header.

        Raises:
            ValueError, KeyError, TypeError, AttributeError: It is not that of a header.
        """
        datasets = {name: _parse_extent(*item) for name, item in content["datasets"].items()}
        return Header(dict(content["attributes"].items()), datasets)


def _parse_extent(
    offset: int | None, shape: Sequence[int], dtype: str
) -> tuple[int | None, tuple[int, ...], np.dtype[Any]]:
    """Parse offset, shape and dtype of a dataset: a copied run can contain anything.

    Raises:
        ValueError, TypeError: They are not those of a dataset.
    """
    sizes = [*shape] if offset is None else [offset, *shape]
    if not all(isinstance(size, int) and size >= 0 for size in sizes) or len(shape) > 8:
        raise ValueError(f"offset {offset}, shape {shape}")
    if math.prod(size or 1 for size in shape) > _MAX_BYTES or not _DTYPE.fullmatch(dtype):
        raise ValueError(f"shape {shape}, dtype {dtype}")
    return offset, tuple(shape), np.dtype(dtype)


def map_shard(path: Path, header: Header | None = None) -> dict[str, _Array]:
    """Return the datasets of one shard as read-only views of one memory map.

    Args:
        path: The shard.
        header: Its header if it is known; read through HDF5 if None.

    Raises:
        OodHeatmapError: The file cannot be opened.
        DamagedCacheError: It is missing, truncated, not HDF5, of another format or not contiguous.
    """
    datasets = (header or read_header(path)).datasets
    mapped = _map_file(path)
    return {name: _view(path, mapped, name, *extent) for name, extent in datasets.items()}


def read_header(path: Path) -> Header:
    """Read the header of a shard.

    Raises:
        OodHeatmapError: The file cannot be opened.
        DamagedCacheError: It is missing, truncated, not HDF5 or of another format.
    """
    try:
        with h5py.File(path, "r") as file:
            if file.attrs.get("format") != FORMAT:
                raise DamagedCacheError(
                    f"{path} has format {file.attrs.get('format')}, this version reads {FORMAT}. "
                    "Rebuild it with this version, or read it with the version that wrote it."
                )
            # by name: items() gives None where the system refuses to read, and hides why
            datasets = {name: file[name] for name in file}
            return Header(
                _plain_attributes(file),
                {
                    name: (item.id.get_offset(), item.shape, item.dtype)
                    for name, item in datasets.items()
                },
            )
    except _UNREADABLE as error:
        _raise_if_refused(path, error)
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DamagedCacheError(
            f"{path} cannot be read as a shard ({reason}). Delete it and run the stage again."
        ) from error


def _plain_attributes(file: h5py.File) -> dict[str, str | int]:
    """Return the attributes of a file that are text or integers."""
    values = {
        name: value.item() if isinstance(value, np.generic) else value
        for name, value in file.attrs.items()
    }
    return {name: value for name, value in values.items() if isinstance(value, str | int)}


def _raise_if_refused(path: Path, error: Exception) -> None:
    """Raise a read error if the system refused to read the file: it need not be damaged.

    Raises:
        OodHeatmapError: The system refused to open or read the file.
    """
    refused = system_error(error)
    if refused is not None and refused.errno not in (None, errno.ENOENT):
        raise read_error(path, refused) from error


@cache
def _libc() -> ctypes.CDLL:
    """Return the C library with the types of what is called in it."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return libc


def _map_file(path: Path) -> NDArray[np.uint8]:
    """Return the bytes of a file as a read-only memory map without an open file descriptor.

    Python's own mmap keeps a descriptor open for its lifetime, and the usual limit is 1,024.
    """
    if not hasattr(mmap, "PROT_READ"):
        # Windows; it has no such limit
        return np.asarray(np.memmap(path, np.uint8, "r"))
    libc = _libc()
    with path.open("rb") as file:
        num_bytes = os.fstat(file.fileno()).st_size
        address = libc.mmap(None, num_bytes, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
    if address == ctypes.c_void_p(-1).value:
        code = ctypes.get_errno()
        if code == errno.ENOMEM:
            raise OodHeatmapError(
                f"{path} cannot be mapped: the process has as many memory maps as the system "
                "allows. Raise vm.max_map_count (or ulimit -v), or make larger shards (--shard-mb)."
            )
        raise read_error(path, OSError(code, os.strerror(code)))
    buffer = (ctypes.c_uint8 * num_bytes).from_address(address)
    # every view references the buffer, so the file is unmapped with the last view
    weakref.finalize(buffer, libc.munmap, address, num_bytes).atexit = False
    array: NDArray[np.uint8] = np.frombuffer(memoryview(buffer), np.uint8)
    array.flags.writeable = False
    return array


def _view(
    path: Path,
    mapped: NDArray[np.uint8],
    name: str,
    offset: int | None,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
) -> _Array:
    """Return a view of one contiguous dataset of a mapped file, after a bounds check."""
    if 0 in shape:
        return np.empty(shape, dtype)
    num_bytes = math.prod(shape) * dtype.itemsize
    if offset is None or dtype.hasobject or offset + num_bytes > len(mapped):
        raise DamagedCacheError(
            f"{path}: dataset {name} is truncated or not contiguous. "
            "Delete the file and run the stage again."
        )
    return mapped[offset : offset + num_bytes].view(dtype).reshape(shape)


def read_attributes(path: Path) -> Mapping[str, str | int]:
    """Return the attributes of a shard; empty if the file is not a shard.

    Raises:
        OodHeatmapError: The system refused to read the file.
    """
    try:
        return read_header(path).attributes
    except DamagedCacheError:
        return {}


@dataclass(frozen=True)
class Rows:
    """One dataset over many shards, read as one array.

    Args:
        arrays: One array per shard, in order; equal dtype and row shape.
        paths: The file of each array; empty for arrays in memory.
    """

    arrays: Sequence[_Array]
    paths: Sequence[Path] = ()
    starts: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "starts", np.cumsum([0, *map(len, self.arrays)], dtype=np.int64))

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape over all shards, rows first."""
        return (len(self), *self.arrays[0].shape[1:])

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of the dataset."""
        return self.arrays[0].dtype

    @property
    def num_bytes(self) -> int:
        """Bytes over all shards."""
        return sum(array.nbytes for array in self.arrays)

    def offset(self, shard: int) -> int:
        """Return the byte offset of the dataset in the file of a shard."""
        array = self.arrays[shard]
        # a view of the whole mapped file; an empty dataset has no bytes anywhere
        mapped = array.base if isinstance(array.base, np.ndarray) else array
        return int(array.ctypes.data - mapped.ctypes.data)

    def take(self, rows: _Array, out: _Array | None = None) -> _Array:
        """Return the given rows in the given order, as ``numpy.take``.

        Args:
            rows: ``(B,)`` integers in [0, len).
            out: Output array; allocated if None.

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
        if len(self.arrays) == 1:
            # with the default mode="raise" NumPy would buffer a second copy of the batch
            return self.arrays[0].take(rows, axis=0, out=out, mode="clip")
        shard_of = np.searchsorted(self.starts, rows, side="right") - 1
        for shard in np.unique(shard_of):
            selected = np.flatnonzero(shard_of == shard)
            out[selected] = self.arrays[shard].take(rows[selected] - self.starts[shard], axis=0)
        return out

    def read(self) -> _Array:
        """Read all rows into memory."""
        return np.concatenate(self.arrays)

    def __iter__(self) -> Iterator[_Array]:
        return iter(self.arrays)


def take_ascending(columns: Sequence[Rows], rows: _Array, outs: Sequence[_Array]) -> None:
    """Read the same ascending rows of several columns.

    The rows of one shard are contiguous in the output, so no row is copied twice.

    Args:
        columns: Columns of the same shards.
        rows: ``(B,)`` ascending integers.
        outs: Output array of each column.

    Raises:
        IndexError: A row is out of range.
    """
    if not len(rows):
        return
    starts = columns[0].starts
    if not 0 <= rows[0] <= rows[-1] < starts[-1]:
        raise IndexError(f"rows {rows[0]}..{rows[-1]} of an array of {starts[-1]}")
    shard_of = np.searchsorted(starts, rows, side="right") - 1
    # only the shards that are touched: there can be many more than rows
    bounds = [0, *(np.flatnonzero(np.diff(shard_of)) + 1).tolist(), len(rows)]
    for first, last in pairwise(bounds):
        shard = shard_of[first]
        shard_rows = rows[first:last] - starts[shard]
        for column, out in zip(columns, outs, strict=True):
            column.arrays[shard].take(shard_rows, axis=0, out=out[first:last], mode="clip")


def open_rows(
    paths: Sequence[Path],
    columns: Mapping[str, Column] | None = None,
    headers: Mapping[str, Header] | None = None,
) -> dict[str, Rows]:
    """Open shards and return each dataset as one array over all of them.

    Args:
        paths: Paths of the shards, in order; at least one.
        columns: Expected dtype and shape of each dataset; unchecked if None.
        headers: Known headers by filename; others are read through HDF5.

    Raises:
        DamagedCacheError: A shard is damaged, or its datasets differ from those of the first shard
            or do not match the columns.
    """
    shards = [map_shard(path, (headers or {}).get(path.name)) for path in paths]
    expected = {name: (array.shape[1:], array.dtype) for name, array in shards[0].items()}
    for path, shard in zip(paths, shards, strict=True):
        found = {name: (array.shape[1:], array.dtype) for name, array in shard.items()}
        if found != expected:
            raise DamagedCacheError(f"{path} does not have the same datasets as {paths[0].name}.")
    rows = {name: Rows([shard[name] for shard in shards], paths) for name in shards[0]}
    for name, column in (columns or {}).items():
        if name not in rows or not column.matches(rows[name]):
            raise DamagedCacheError(
                f"{paths[0].parent}: dataset {name} of the shards is missing or not {column.dtype} "
                f"{column.shape} per row. Delete the directory and run the stage again."
            )
    return rows
