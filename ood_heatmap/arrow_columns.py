"""The columns of images and labels in Arrow and Parquet tables, as `datasets` describes them."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np

from ood_heatmap.errors import OodHeatmapError, UsageError, printable
from ood_heatmap.listing import Labels, Names

_EXTRA = "pip install 'ood-heatmap[arrow]'"


@contextmanager
def naming_damage(path: str, kind: str) -> Iterator[None]:
    """Turn any exception of pyarrow on a damaged file into a one-line error that names the file.

    Raises:
        OodHeatmapError: The file cannot be read.
    """
    try:
        yield
    except (MemoryError, OodHeatmapError):
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [repr(error)])[0]
        raise OodHeatmapError(
            f"{printable(path)} cannot be read as {kind} ({reason}). Download or write it again."
        ) from error


class Columns(NamedTuple):
    """The columns of a table.

    Args:
        image: Name of the column of images: bytes, or a struct of bytes and path.
        has_path: Whether it is a struct with paths.
        label: Name of the column of labels; None if there is none.
        class_names: Names of the classes by label; empty if unknown.
    """

    image: str
    has_path: bool
    label: str | None
    class_names: tuple[str, ...]


def import_arrow(module: str, source: str) -> Any:
    """Import a module of pyarrow, which is an optional dependency.

    Raises:
        UsageError: It is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise UsageError(
            f"{printable(source)} cannot be read without pyarrow: {_EXTRA}."
        ) from error


def choose_columns(schema: Any, source: str) -> Columns:
    """Choose the columns of images and labels.

    Features that ``datasets`` has stored in the schema take precedence; without them, images are a
    column of bytes, or of structs with ``bytes``.

    Args:
        schema: ``pyarrow.Schema``.
        source: Name for messages.

    Raises:
        OodHeatmapError: There is no column of images, or there are several.
    """
    types = import_arrow("pyarrow.types", source)
    features = _read_features(schema)
    described = [name for name, kind in features.items() if kind.get("_type") == "Image"]
    names = [field.name for field in schema if _holds_bytes(field.type, types)]
    names = [name for name in names if name in described] or names
    names = [name for name in names if name == "image"] or names
    if len(names) != 1:
        columns = ", ".join(map(printable, names or schema.names))
        found = f"the columns of images {columns}" if names else f"no column of images ({columns})"
        raise OodHeatmapError(
            f"{printable(source)} has {found}: keep one, with image files as bytes."
        )
    has_path = types.is_struct(schema.field(names[0]).type)
    has_path = has_path and schema.field(names[0]).type.get_field_index("path") >= 0
    label = _choose_label(schema, features, types)
    class_names = features.get(label or "", {}).get("names")
    if not isinstance(class_names, list) or not all(isinstance(name, str) for name in class_names):
        class_names = []
    return Columns(names[0], has_path, label, tuple(class_names))


def _read_features(schema: Any) -> Mapping[str, Mapping[str, Any]]:
    """Return the features of ``datasets`` by column; empty without any."""
    try:
        content = json.loads((schema.metadata or {})[b"huggingface"])
        features = content["info"]["features"]
        return {name: kind for name, kind in features.items() if isinstance(kind, dict)}
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return {}


def _holds_bytes(kind: Any, types: Any) -> bool:
    """Return whether a column of this type can contain image files."""
    if types.is_struct(kind):
        position = kind.get_field_index("bytes")
        return position >= 0 and _holds_bytes(kind.field(position).type, types)
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _choose_label(schema: Any, features: Mapping[str, Any], types: Any) -> str | None:
    """Return the column ``label``, or the only one that ``datasets`` calls a class label."""
    described = [name for name, kind in features.items() if kind.get("_type") == "ClassLabel"]
    names = ["label", *described] if len(described) == 1 else ["label"]
    for name in names:
        if schema.get_field_index(name) >= 0:
            kind = schema.field(name).type
            if types.is_integer(kind) or types.is_string(kind) or types.is_large_string(kind):
                return name
    return None


def common_names(class_names: Sequence[tuple[str, ...]], source: str) -> tuple[str, ...]:
    """Return the class names of several files.

    Raises:
        OodHeatmapError: They are not the same in all.
    """
    if len(set(class_names)) > 1:
        raise OodHeatmapError(
            f"the files of {printable(source)} have different class names. Name only files of one "
            "data set."
        )
    return class_names[0]


def add_rows(names: Names, labels: Labels, batch: Any, columns: Columns) -> None:
    """Add the names and labels of images: their paths, or their rows if they have none.

    Args:
        names: Names to append to.
        labels: Labels to append to.
        batch: ``pyarrow.RecordBatch``; all fields of null structs must be null.
        columns: The columns of the batch.
    """
    first, paths = len(names), [None] * batch.num_rows
    if columns.has_path:
        images = batch.column(columns.image)
        paths = images.flatten()[images.type.get_field_index("path")].to_pylist()
    for row, path in enumerate(paths):
        names.append(str(first + row) if path is None else str(path))
    if columns.label is None:
        labels.extend(np.full(batch.num_rows, -1, np.int32), ())
        return
    encoded = batch.column(columns.label).dictionary_encode()
    codes = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    labels.extend(codes.astype(np.int32), [str(value) for value in encoded.dictionary.to_pylist()])
