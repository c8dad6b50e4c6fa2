"""Image sets in Arrow files, as ``Dataset.save_to_disk`` of Hugging Face writes them.

The bytes of an image are contiguous in the file. Offsets are read from the tables once, and then
the bytes by offset, so that no file stays mapped or open.
"""

import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ood_heatmap.arrow_columns import (
    add_rows,
    choose_columns,
    common_names,
    import_arrow,
    naming_damage,
)
from ood_heatmap.errors import OodHeatmapError, UsageError, printable
from ood_heatmap.images import ClassOrder, ImageSet
from ood_heatmap.listing import Labels, Names, stamp_of
from ood_heatmap.packed import PackedFile, set_of_packed
from ood_heatmap.source_folder import set_of_files

_STATE, _SPLITS = "state.json", "dataset_dict.json"
_FILE_MAGIC = b"ARROW1"


def find_saved_files(folder: str) -> list[str]:
    """Return the Arrow files of a data set saved in a folder, in order; empty if there is none.

    Raises:
        UsageError: The folder contains several splits.
        OodHeatmapError: The description of the data set is damaged.
    """
    splits = _read_json(folder, _SPLITS).get("splits")
    if isinstance(splits, list):
        text = ", ".join(map(str, splits))
        raise UsageError(
            f"{folder} has the splits {printable(text)}: name one of these folders in it."
        )
    state = _read_json(folder, _STATE)
    if "_data_files" not in state:
        return []
    try:
        names = [item["filename"] for item in state["_data_files"]]
        # nothing outside the folder
        return [os.path.join(folder, os.path.basename(name)) for name in names]
    except (KeyError, TypeError) as error:
        raise OodHeatmapError(
            f"{printable(folder)} is not a data set of `datasets` that this version can read "
            f"({_STATE} lists no files). Save it again with save_to_disk."
        ) from error


def _read_json(folder: str, name: str) -> dict[str, Any]:
    """Read a JSON file of a data set; empty if it is missing or not a JSON object."""
    try:
        with open(os.path.join(folder, name), "rb") as file:
            content = json.load(file)
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def open_arrow(paths: Sequence[str], *, source: str, class_order: ClassOrder = "name") -> ImageSet:
    """Open Arrow files as one image set.

    Args:
        paths: The files, in the order of their rows; IPC streams or files, not compressed.
        source: Name for messages.
        class_order: Order in which class names are numbered if the files do not define it.

    Raises:
        OodHeatmapError: A file is damaged or compressed, or it is unclear what its images are.
        UsageError: pyarrow is not installed.
    """
    labels = Labels(printable(source))
    files, class_names = zip(*(_list_file(path, labels) for path in paths), strict=True)
    labelling = labels.resolve(common_names(class_names, source), class_order)
    if not any(len(file.names) for file in files):
        raise OodHeatmapError(f"{printable(source)} contains no images: it has no rows.")
    if not any(file.sizes.any() for file in files):
        # only paths are stored
        names = Names(file.names.raw(row) for file in files for row in range(len(file.names)))
        folder = os.path.dirname(paths[0])
        return set_of_files(folder, names, source=source, labelling=labelling)
    return set_of_packed(files, labelling, source=source)


def _list_file(path: str, labels: Labels) -> tuple[PackedFile, tuple[str, ...]]:
    """List the images of a file and add their labels; also return the class names.

    Raises:
        OodHeatmapError: The file is damaged or compressed.
    """
    pyarrow = import_arrow("pyarrow", path)
    stamp, names = stamp_of(path), Names()
    offsets, sizes = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    with naming_damage(path, "an Arrow file"), pyarrow.memory_map(path) as file:
        content = file.read_buffer()
        schema, batches = _open_tables(content, pyarrow)
        columns = choose_columns(schema, path)
        for batch in batches:
            images = batch.column(columns.image)
            # for bytes this reads only the offsets
            images.validate(full=True)
            offset, num_bytes = _locate(images, content, path, pyarrow)
            offsets.append(offset)
            sizes.append(num_bytes)
            add_rows(names, labels, batch, columns)
    listed = PackedFile(path, stamp, names, np.concatenate(sizes), np.concatenate(offsets))
    return listed, columns.class_names


def _open_tables(content: Any, pyarrow: Any) -> tuple[Any, Iterator[Any]]:
    """Return the schema and the record batches of a file or stream."""
    if content.slice(0, len(_FILE_MAGIC)).to_pybytes() == _FILE_MAGIC:
        table = pyarrow.ipc.open_file(content)
        batches = (table.get_batch(number) for number in range(table.num_record_batches))
        return table.schema, batches
    stream = pyarrow.ipc.open_stream(content)
    return stream.schema, iter(stream)


def _locate(
    images: Any, content: Any, path: str, pyarrow: Any
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return offset and number of bytes of each image in the file; 0 bytes if it is null.

    Args:
        images: ``(N,)`` array of bytes, or of structs of bytes and path.
        content: Buffer of the whole file.
        path: The file.
        pyarrow: The module.

    Raises:
        OodHeatmapError: The file is compressed.
    """
    if pyarrow.types.is_struct(images.type):
        # the fields of a null struct are null as well
        images = images.flatten()[images.type.get_field_index("bytes")]
    is_large = pyarrow.types.is_large_binary(images.type)
    _, ends, values = images.buffers()
    if not len(images) or not values:
        return np.zeros(len(images), np.int64), np.zeros(len(images), np.int64)
    ends = np.frombuffer(ends, np.int64 if is_large else np.int32)
    # an array read from a file begins with its first image
    ends = ends[: len(images) + 1].astype(np.int64)
    start = values.address - content.address
    if not 0 <= start <= len(content) - values.size:
        raise OodHeatmapError(
            f"{printable(path)} is compressed: its images cannot be read one by one. Save it with "
            "Dataset.save_to_disk, which does not compress."
        )
    num_bytes = np.diff(ends)
    is_valid = images.is_valid().to_numpy(zero_copy_only=False)
    return start + ends[:-1], np.where(is_valid, num_bytes, 0)
