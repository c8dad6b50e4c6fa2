"""Image sets in Parquet files, the format of data sets on the Hugging Face Hub.

A row group is the smallest unit that can be read; each thread caches the last one it has read.
"""

import logging
import threading
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from ood_heatmap.arrow_columns import (
    Columns,
    add_rows,
    choose_columns,
    common_names,
    import_arrow,
    naming_damage,
)
from ood_heatmap.errors import OodHeatmapError, printable
from ood_heatmap.images import ClassOrder, ImageSet
from ood_heatmap.listing import Labels, Names, stamp_of
from ood_heatmap.packed import Shard, check_unchanged, set_of_shards

log = logging.getLogger(__name__)

# bytes of a row group, which a thread holds in memory; the maximum of a contiguous Arrow array
_LARGE_GROUP, _MAX_GROUP = 256 * 10**6, 2**31


@dataclass(frozen=True)
class _File(Shard):
    """A Parquet file; ``sizes`` is ``(G, 2)``, rows and bytes of the images of each row group.

    Args:
        columns: The columns of images and labels.
    """

    columns: Columns


def open_parquet(
    paths: Sequence[str], *, source: str, class_order: ClassOrder = "name"
) -> ImageSet:
    """Open Parquet files as one image set.

    Args:
        paths: The files, in the order of their rows.
        source: Name for messages.
        class_order: Order in which class names are numbered if the files do not define it.

    Raises:
        OodHeatmapError: A file is damaged, or it is unclear what its images are.
        UsageError: pyarrow is not installed.
    """
    labels = Labels(printable(source))
    files = [_list_file(path, labels) for path in paths]
    if not any(len(file.names) for file in files):
        raise OodHeatmapError(f"{printable(source)} contains no images: it has no rows.")
    _check_groups(files, printable(source))
    class_names = common_names([file.columns.class_names for file in files], source)
    labelling = labels.resolve(class_names, class_order)
    return set_of_shards(files, _GroupReader(files).fetch, labelling, source=source)


def _list_file(path: str, labels: Labels) -> _File:
    """List the images of a file and add their labels; the images themselves are not read.

    Raises:
        OodHeatmapError: The file is damaged, or it is unclear what its images are.
    """
    parquet = import_arrow("pyarrow.parquet", path)
    stamp, names, sizes = stamp_of(path), Names(), []
    with (
        naming_damage(path, "a Parquet file"),
        parquet.ParquetFile(path, pre_buffer=False) as file,
    ):
        columns = choose_columns(file.schema_arrow, path)
        for number in range(file.metadata.num_row_groups):
            group = file.metadata.row_group(number)
            sizes.append((group.num_rows, _num_image_bytes(group, columns)))
            for batch in _read_names_and_labels(file, number, columns):
                add_rows(names, labels, batch, columns)
    return _File(path, stamp, names, np.array(sizes, np.int64).reshape(-1, 2), columns)


def _read_names_and_labels(file: Any, group: int, columns: Columns) -> list[Any]:
    """Return the record batches of a row group, without the bytes of the images."""
    wanted = [f"{columns.image}.path"] if columns.has_path else []
    wanted += [columns.label] if columns.label else []
    # a table without columns still has its number of rows
    return list(file.read_row_group(group, columns=wanted, use_threads=False).to_batches())


def _num_image_bytes(group: Any, columns: Columns) -> int:
    """Return the uncompressed bytes of the images of a row group."""
    chunks = [group.column(number) for number in range(group.num_columns)]
    return sum(
        chunk.total_uncompressed_size
        for chunk in chunks
        if chunk.path_in_schema in (columns.image, f"{columns.image}.bytes")
    )


def _check_groups(files: Sequence[_File], source: str) -> None:
    """Refuse row groups that are too large to be read, and warn about large ones.

    Raises:
        OodHeatmapError: A row group is too large.
    """
    num_bytes = max(int(file.sizes[:, 1].max(initial=0)) for file in files)
    advice = "write it again with row_group_size=100"
    if num_bytes > _MAX_GROUP:
        raise OodHeatmapError(
            f"{source} has a row group of {num_bytes / 1e9:.1f} GB, which is too large to be read: "
            f"{advice}."
        )
    if num_bytes > _LARGE_GROUP:
        log.warning(
            "%s has row groups of %d MB, and each worker holds one in memory: %s",
            *(source, num_bytes // 10**6, advice),
        )


class _GroupReader:
    """Reads row groups; thread-safe.

    Args:
        files: The files.
    """

    def __init__(self, files: Sequence[_File]) -> None:
        self._files = files
        self._ends = list(accumulate(len(file.names) for file in files))
        self._group_ends = [file.sizes[:, 0].cumsum().tolist() for file in files]
        self._last = threading.local()

    def fetch(self, row: int) -> bytes:
        """Return the bytes of an image.

        Raises:
            ValueError: There are no bytes of this image.
            OSError: The file is missing.
            OodHeatmapError: The file is damaged or has changed since it was listed.
        """
        number = bisect_right(self._ends, row)
        row -= self._ends[number] - len(self._files[number].names)
        group = bisect_right(self._group_ends[number], row)
        first = self._group_ends[number][group - 1] if group else 0
        content = self._images((number, group))[row - first].as_py()
        if content is None:
            raise ValueError("stored without its bytes")
        return bytes(content)

    def _images(self, key: tuple[int, int]) -> Any:
        """Return the images of a row group, kept from the last call if it is the same."""
        if getattr(self._last, "key", None) != key:
            # drop the old group first: two may not fit in memory
            self._last.key = self._last.images = None
            self._last.images = _read_group(self._files[key[0]], key[1])
            self._last.key = key
        return self._last.images


def _read_group(file: _File, group: int) -> Any:
    """Return the images of a row group as ``pyarrow.ChunkedArray`` of bytes."""
    parquet = import_arrow("pyarrow.parquet", file.path)
    check_unchanged(file.path, file.stamp)
    name = file.columns.image
    with (
        naming_damage(file.path, "a Parquet file"),
        parquet.ParquetFile(file.path, pre_buffer=False) as opened,
    ):
        if opened.schema_arrow.field(name).type.num_fields:
            name = f"{name}.bytes"
        # Arrow's threads do not survive a fork, and other cores are busy decoding
        table = opened.read_row_group(group, columns=[name], use_threads=False)
    return table.flatten().column(name)
