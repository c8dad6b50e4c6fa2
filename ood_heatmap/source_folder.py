"""Image sets of files: a folder, with or without class folders, or a list of paths."""

import hashlib
import logging
import os
import stat
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ood_heatmap.encoded import EncodedReader
from ood_heatmap.errors import OodHeatmapError, printable
from ood_heatmap.images import ClassOrder, ImageSet, sort_classes
from ood_heatmap.listing import Labelling, Names, stamp_of

log = logging.getLogger(__name__)

_UNLABELLED = Labelling(np.empty(0, np.int32), (), True)


@cache
def image_suffixes() -> frozenset[str]:
    """Return the lower-case suffixes of image files; includes AVIF if Pillow supports it."""
    suffixes = ".png .jpg .jpeg .jpe .jfif .jfi .bmp .webp .tif .tiff .ppm .pgm .gif"
    avif = {".avif"} & set(Image.registered_extensions())
    return frozenset(suffixes.split()) | avif


def suffix_of(name: str) -> str:
    """Return the lower-case suffix of a file, with its dot; empty without one."""
    suffix = os.path.splitext(name)[1].lower()
    return "" if suffix == "." else suffix


def find_images(folder: Path, *, skip: Path | None = None) -> list[Path]:
    """Return all image files below a folder, sorted; log a warning about other files.

    Symbolic links to folders are followed, except to a folder that contains them. Hidden files and
    folders are skipped silently.

    Args:
        folder: The folder.
        skip: A folder to skip if it lies below, such as an output folder.

    Raises:
        OodHeatmapError: There are no images, or a folder cannot be listed.
    """
    skipped = frozenset() if skip is None or not skip.exists() else {_identity(str(skip))}
    return [Path(path) for path in _iter_images(str(folder), skipped)]


def _iter_images(folder: str, skip: Set[tuple[int, int]] = frozenset()) -> Iterator[str]:
    """Yield the paths of all image files below a folder, sorted by their parts.

    Raises:
        OodHeatmapError: There are no images, or a folder cannot be listed.
    """
    walk = _Walk(skip)
    above = frozenset(_identity(str(parent)) for parent in Path(folder).resolve().parents)
    is_empty = True
    try:
        for path in walk.images_below(folder, above):
            is_empty = False
            yield path
    except OSError as error:
        name = printable(str(error.filename or folder))
        raise OodHeatmapError(f"{name} cannot be listed ({error.strerror}).") from error
    left_out = ", ".join(f"{kind} {count}" for kind, count in sorted(walk.left_out.items()))
    if is_empty:
        suffixes = ", ".join(sorted(image_suffixes()))
        found = f"; found: {printable(left_out)}" if left_out else ""
        raise OodHeatmapError(
            f"{printable(folder)} contains no images (looked for {suffixes}{found}). "
            "Use a folder with images."
        )
    if left_out:
        log.warning("%s: files skipped: %s", printable(folder), printable(left_out))


@dataclass(frozen=True)
class _Walk:
    """Walks a folder recursively; counts the files it skips.

    Plain names instead of ``Path`` objects: a folder may hold millions of files.

    Args:
        skip: Identities of folders to skip.
        left_out: Number of skipped files, by suffix or description.
    """

    skip: Set[tuple[int, int]]
    left_out: Counter[str] = field(default_factory=Counter)

    def images_below(self, folder: str, above: frozenset[tuple[int, int]]) -> Iterator[str]:
        """Yield the paths of the images, sorted by their parts."""
        above |= {_identity(folder)}
        folders, images = self._scan(folder)
        for name in sorted([*folders, *images]):
            path = os.path.join(folder, name)
            if name not in folders:
                yield path
                continue
            identity = _identity(path)
            if identity in above:
                self.left_out["link to a folder above"] += 1
            elif identity not in self.skip:
                yield from self.images_below(path, above)

    def _scan(self, folder: str) -> tuple[set[str], list[str]]:
        """Return the names of the folders and of the images in a folder."""
        folders, images = set(), []
        for entry in iter_visible(folder):
            kind = entry_kind(entry)
            if kind == "folder":
                folders.add(entry.name)
            elif kind == "other":
                self.left_out["broken link or special file"] += 1
            elif suffix_of(entry.name) in image_suffixes():
                images.append(entry.name)
            else:
                self.left_out[suffix_of(entry.name) or "no suffix"] += 1
        return folders, images


def _identity(path: str) -> tuple[int, int]:
    """Return the device and inode of a folder, which identify it under any path."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def iter_visible(folder: str) -> Iterator["os.DirEntry[str]"]:
    """Yield the entries of a folder that are not hidden."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.startswith("."):
                yield entry


def entry_kind(entry: "os.DirEntry[str]") -> Literal["folder", "file", "other"]:
    """Classify a directory entry, following symbolic links."""
    try:
        return "folder" if entry.is_dir() else "file" if entry.is_file() else "other"
    except OSError:
        # a symbolic link to itself
        return "other"


def open_folder(root: Path, *, class_order: ClassOrder = "name") -> ImageSet:
    """Open a folder of images, either flat or with one subfolder per class.

    A class folder without images remains a class, so that the labels of the others do not shift.

    Raises:
        OodHeatmapError: There are no images, or images beside class folders.
    """
    prefix = os.path.join(root, "")
    names, numbers, flat = Names(), array("i"), None
    number_of: dict[str, int] = {}
    for path in _iter_images(str(root)):
        name = path.removeprefix(prefix)
        class_name, is_below, _ = name.partition("/")
        flat = flat if is_below else flat or name
        names.append(name)
        numbers.append(number_of.setdefault(class_name, len(number_of)) if is_below else -1)
    if not number_of:
        return set_of_files(prefix, names, source=str(root))
    if flat:
        raise OodHeatmapError(
            f"{printable(str(root))} contains both images ({printable(flat)}) "
            f"and class folders ({printable(next(iter(number_of)))}). Keep one kind."
        )
    classes = sort_classes({*number_of, *_subfolders(str(root))}, class_order)
    empty = [name for name in classes if name not in number_of]
    if empty:
        log.warning(
            "%s: class folders without images, kept as classes: %s",
            printable(str(root)),
            printable(", ".join(empty)),
        )
    label_of = {name: label for label, name in enumerate(classes)}
    labels = np.array([label_of[name] for name in number_of], np.int32)[np.array(numbers)]
    order = np.argsort(labels, kind="stable")
    return set_of_files(
        prefix,
        names if class_order == "name" else Names(names.raw(row) for row in order.tolist()),
        source=str(root),
        labelling=Labelling(labels[order], tuple(map(printable, classes)), True),
    )


def _subfolders(root: str) -> list[str]:
    """Return the names of possible class folders: not hidden, and not links to a parent."""
    resolved = Path(root).resolve()
    parents = {_identity(str(parent)) for parent in (resolved, *resolved.parents)}
    folders = [entry for entry in iter_visible(root) if entry_kind(entry) == "folder"]
    return sorted(entry.name for entry in folders if _identity(entry.path) not in parents)


def from_paths(paths: Sequence[Path]) -> ImageSet:
    """Make an image set from files. Missing files raise only when they are read."""
    return set_of_files("", Names(map(str, paths)), source=f"{len(paths)} files")


def set_of_files(
    folder: str, names: Names, *, source: str, labelling: Labelling = _UNLABELLED
) -> ImageSet:
    """Make an image set from files. Missing files raise only when they are read.

    Args:
        folder: Folder that the names are relative to.
        names: Path of each file.
        source: Name for messages.
        labelling: Labels and classes; by default there are none.
    """

    def path_of(row: int) -> str:
        return os.path.join(folder, names.raw(row))

    labels, classes, has_class_names = labelling
    if not classes:
        labels = np.full(len(names), -1, np.int32)
    listing, stamps = _list_files(folder, names)
    for label in np.setdiff1d(np.arange(len(classes)), labels).tolist():
        # an empty class shifts the labels of others, but has no file in the list
        listing.update(f"{label}\0no images\n".encode())
    return ImageSet(
        source=printable(source),
        names=names,
        labels=labels,
        classes=classes,
        reader=EncodedReader(lambda row: _read_bytes(path_of(row)), path_of),
        listing=listing.hexdigest(),
        has_class_names=has_class_names,
        stamps=stamps,
    )


def _read_bytes(path: str) -> bytes:
    """Read a regular file; opening a named pipe would block until something writes to it."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("not a regular file")
    with open(path, "rb") as file:
        return file.read()


def _list_files(folder: str, names: Names) -> tuple["hashlib._Hash", NDArray[np.int64]]:
    """Return the hash of the names and sizes of files in order, and ``ImageSet.stamps``."""
    listing, stamps = hashlib.sha256(), array("q")
    for row in range(len(names)):
        name = names.raw(row)
        stamp = stamp_of(os.path.join(folder, name))
        stamps.extend(stamp)
        listing.update(f"{name}\0{stamp[0]}\n".encode(errors="surrogateescape"))
    return listing, np.array(stamps).reshape(-1, 2)


def read_file(path: Path) -> tuple[Image.Image, bytes]:
    """Decode an image file; return the image and the sha256 of the file.

    Raises:
        UnreadableImageError: The file is missing, truncated or not an image.
    """
    return EncodedReader(lambda _: _read_bytes(str(path)), lambda _: str(path)).read(0)
