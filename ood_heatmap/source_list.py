"""Image sets listed in a file: one path per line (``.txt``), or a table of paths and labels."""

import csv
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from ood_heatmap.errors import OodHeatmapError, printable
from ood_heatmap.images import ClassOrder, ImageSet
from ood_heatmap.listing import Labels, Names
from ood_heatmap.source_folder import set_of_files

# separator of each kind of table
TABLES = {".csv": ",", ".tsv": "\t"}
_PATH_COLUMNS = ("path", "file", "filename", "file_name", "image")
_LABEL_COLUMNS = ("label", "class", "target")
# Caffe's and OpenOOD's lists: path, space, class number
_NUMBERED = re.compile(r"(.*\S) +(-?[0-9]+)")


def open_list(path: Path, *, class_order: ClassOrder = "name") -> ImageSet:
    """Open a list of image files.

    A ``.txt`` file has a path on each line, alone, before a tab and a label, or before a space and
    a class number. A ``.csv`` or ``.tsv`` file has a header with ``path`` and, with labels,
    ``label``. Paths are relative to the folder of the list; labels are class numbers if all of them
    are integers, otherwise class names.

    Args:
        path: The list.
        class_order: Order in which class names are numbered.

    Raises:
        OodHeatmapError: The list cannot be read, or none of its files exists.
    """
    shown = printable(str(path))
    names, labels = Names(), Labels(shown)
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
            for name, label in _iter_rows(file, path):
                names.append(name)
                labels.append(label or None)
    except (OSError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise OodHeatmapError(f"{shown} cannot be read as a list of images ({reason}).") from error
    if not names:
        raise OodHeatmapError(f"{shown} lists no images. Write one path per line.")
    labelling = labels.resolve(order=class_order)
    folder = os.path.join(path.parent, "")
    images = set_of_files(folder, names, source=str(path), labelling=labelling)
    if images.stamps is not None and (images.stamps[:, 0] < 0).all():
        raise OodHeatmapError(
            f"none of the {len(names)} files that {shown} lists exists, {names[0]} first. "
            "Paths are relative to the folder of the list: correct them, or move it."
        )
    listing = hashlib.sha256(images.listing.encode())
    labelling.update(listing)
    return replace(images, listing=listing.hexdigest())


def _iter_rows(file: Iterable[str], path: Path) -> Iterator[tuple[str, str | None]]:
    """Yield path and label of each image of a list."""
    if path.suffix in TABLES:
        yield from _iter_table(file, path)
        return
    for line in file:
        if line := line.rstrip("\r\n"):
            name, has_tab, label = line.rpartition("\t")
            numbered = None if has_tab else _NUMBERED.fullmatch(line)
            if numbered:
                yield numbered[1], numbered[2]
            else:
                yield (name, label.strip()) if has_tab else (line, None)


def _iter_table(file: Iterable[str], path: Path) -> Iterator[tuple[str, str | None]]:
    """Yield path and label of each line of a table.

    Raises:
        OodHeatmapError: There is no column of paths, or a line has too few columns.
    """
    table = csv.reader(file, delimiter=TABLES[path.suffix])
    header = [column.strip().lower() for column in next(table, [])]
    columns = [
        next((header.index(name) for name in wanted if name in header), None)
        for wanted in (_PATH_COLUMNS, _LABEL_COLUMNS)
    ]
    path_column, label_column = columns
    if path_column is None:
        raise OodHeatmapError(
            f"{printable(str(path))} has the columns {printable(', '.join(header)) or '(none)'}, "
            "none of which is path. Begin it with a header: path, or path and label."
        )
    for cells in table:
        if cells and len(cells) < len(header):
            raise OodHeatmapError(
                f"line {table.line_num} of {printable(str(path))} has {len(cells)} columns, "
                f"the header has {len(header)}. Correct it."
            )
        if cells:
            label = None if label_column is None else cells[label_column].strip()
            yield cells[path_column], label
