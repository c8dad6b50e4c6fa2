"""Open image sets: a folder, an array file, or a torchvision data set."""

import hashlib
import io
import logging
import os
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ood_heatmap.errors import OodHeatmapError, UsageError, printable
from ood_heatmap.images import (
    ClassOrder,
    Decoded,
    ImageSet,
    sort_classes,
    unreadable,
)

log = logging.getLogger(__name__)

# Pillow stores a pointer per line: a small file of one very tall column would exhaust the memory
_MAX_SIDE = 2**20
_MAX_LABEL = 2**20


def open_images(
    source: str,
    *,
    data_root: Path = Path("data"),
    download: bool = False,
    class_order: ClassOrder = "name",
) -> ImageSet:
    """Open an image set: a folder, an ``.npy`` or ``.npz`` file, or ``name/split``.

    Args:
        source: Path of a folder of images or class folders, path of a file of uint8 arrays, or name
            of a torchvision data set.
        data_root: Root of torchvision data sets.
        download: Let torchvision download a missing data set.
        class_order: Order of class folders that defines the labels, see ``sort_classes``.

    Raises:
        OodHeatmapError: The source does not exist or contains no images.
    """
    path = Path(source)
    if path.is_dir():
        return _open_folder(path, class_order=class_order)
    if path.suffix in (".npy", ".npz"):
        return _open_array_file(path)
    return _open_torchvision(source, data_root, download)


@cache
def _image_suffixes() -> frozenset[str]:
    """Return the lower-case suffixes of image files; includes AVIF if Pillow supports it."""
    suffixes = ".png .jpg .jpeg .jpe .jfif .jfi .bmp .webp .tif .tiff .ppm .pgm .gif"
    avif = {".avif"} & set(Image.registered_extensions())
    return frozenset(suffixes.split()) | avif


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
    shown = printable(str(folder))
    walk = _Walk(frozenset() if skip is None or not skip.exists() else {_identity(skip)})
    above = frozenset(_identity(parent) for parent in folder.resolve().parents)
    try:
        paths = sorted(walk.images_below(folder, above))
    except OSError as error:
        name = printable(str(error.filename or folder))
        raise OodHeatmapError(f"{name} cannot be listed ({error.strerror}).") from error
    left_out = ", ".join(f"{kind} {count}" for kind, count in sorted(walk.left_out.items()))
    if not paths:
        suffixes = ", ".join(sorted(_image_suffixes()))
        found = f"; found: {printable(left_out)}" if left_out else ""
        raise OodHeatmapError(
            f"{shown} contains no images (looked for {suffixes}{found}). Use a folder with images."
        )
    if left_out:
        log.warning("%s: files skipped: %s", shown, printable(left_out))
    return paths


@dataclass(frozen=True)
class _Walk:
    """Walks a folder recursively; counts the files it skips.

    Args:
        skip: Identities of folders to skip.
        left_out: Number of skipped files, by suffix or description.
    """

    skip: Set[tuple[int, int]]
    left_out: Counter[str] = field(default_factory=Counter)

    def images_below(self, folder: Path, above: frozenset[tuple[int, int]]) -> Iterator[Path]:
        above |= {_identity(folder)}
        for entry in _visible(folder):
            path = Path(entry.path)
            kind = _entry_kind(entry)
            if kind == "folder":
                identity = _identity(path)
                if identity in above:
                    self.left_out["link to a folder above"] += 1
                elif identity not in self.skip:
                    yield from self.images_below(path, above)
            elif kind == "other":
                self.left_out["broken link or special file"] += 1
            elif path.suffix.lower() in _image_suffixes():
                yield path
            else:
                self.left_out[path.suffix.lower() or "no suffix"] += 1


def _identity(path: Path) -> tuple[int, int]:
    """Return the device and inode of a folder, which identify it under any path."""
    status = path.stat()
    return status.st_dev, status.st_ino


def _visible(folder: Path) -> list["os.DirEntry[str]"]:
    """Return the entries of a folder that are not hidden."""
    with os.scandir(folder) as entries:
        return [entry for entry in entries if not entry.name.startswith(".")]


def _entry_kind(entry: "os.DirEntry[str]") -> Literal["folder", "file", "other"]:
    """Classify a directory entry, following symbolic links."""
    try:
        return "folder" if entry.is_dir() else "file" if entry.is_file() else "other"
    except OSError:
        # a symbolic link to itself
        return "other"


def _open_folder(root: Path, *, class_order: ClassOrder = "name") -> ImageSet:
    """Open a folder of images, either flat or with one subfolder per class.

    A class folder without images remains a class, so that the labels of the others do not shift.

    Raises:
        OodHeatmapError: There are no images, or images beside class folders.
    """
    paths = find_images(root)
    flat = [path for path in paths if path.parent == root]
    if len(flat) == len(paths):
        return from_paths(paths, root=root)
    by_class: dict[str, list[Path]] = {name: [] for name in _subfolders(root)}
    for path in paths:
        if path.parent != root:
            by_class[path.relative_to(root).parts[0]].append(path)
    if flat:
        name = next(name for name in by_class if by_class[name])
        raise OodHeatmapError(
            f"{printable(str(root))} contains both images ({printable(flat[0].name)}) "
            f"and class folders ({printable(name)}). Keep one kind."
        )
    names = sort_classes(by_class, class_order)
    empty = [name for name in names if not by_class[name]]
    if empty:
        log.warning(
            "%s: class folders without images, kept as classes: %s",
            printable(str(root)),
            printable(", ".join(empty)),
        )
    return from_paths(
        [path for name in names for path in by_class[name]],
        root=root,
        labels=np.repeat(np.arange(len(names)), [len(by_class[name]) for name in names]),
        classes=names,
    )


def _subfolders(root: Path) -> list[str]:
    """Return the names of possible class folders: not hidden, and not links to a parent."""
    parents = {_identity(parent) for parent in (root.resolve(), *root.resolve().parents)}
    folders = [Path(entry.path) for entry in _visible(root) if _entry_kind(entry) == "folder"]
    return sorted(folder.name for folder in folders if _identity(folder) not in parents)


@dataclass(frozen=True)
class _FileReader:
    """Reads image files."""

    paths: Sequence[Path]

    def read(self, row: int) -> tuple[Image.Image, bytes]:
        return read_file(self.paths[row])

    def digest(self, row: int) -> bytes:
        try:
            return hashlib.sha256(self.paths[row].read_bytes()).digest()
        except OSError as error:
            raise unreadable(printable(str(self.paths[row])), error) from error


def from_paths(
    paths: Sequence[Path],
    *,
    root: Path | None = None,
    labels: NDArray[np.int64] | None = None,
    classes: Sequence[str] = (),
) -> ImageSet:
    """Make an image set from files. Missing files raise only when they are read.

    Args:
        paths: One path per row.
        root: Folder that image names are relative to; names are the full paths if None.
        labels: ``(N,)`` labels; unknown if None.
        classes: Class names by label.
    """
    names = [str(path) if root is None else path.relative_to(root).as_posix() for path in paths]
    listing = hashlib.sha256()
    stamps = np.array([_stamp(path) for path in paths], np.int64).reshape(-1, 2)
    for name, num_bytes in zip(names, stamps[:, 0].tolist(), strict=True):
        listing.update(f"{name}\0{num_bytes}\n".encode(errors="surrogateescape"))
    for label in sorted(set(range(len(classes))) - set(() if labels is None else labels.tolist())):
        # an empty class shifts the labels of others, but has no file in the list
        listing.update(f"{label}\0no images\n".encode())
    return ImageSet(
        source=printable(str(root)) if root is not None else f"{len(paths)} files",
        names=[printable(name) for name in names],
        labels=np.full(len(paths), -1, np.int32) if labels is None else labels.astype(np.int32),
        classes=tuple(printable(name) for name in classes),
        reader=_FileReader(paths),
        listing=listing.hexdigest(),
        stamps=stamps,
    )


def _stamp(path: Path) -> tuple[int, int]:
    """Return size and modification time of a file, -1 if it is missing."""
    try:
        status = path.stat()
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def read_file(path: Path) -> tuple[Image.Image, bytes]:
    """Decode an image file; return the image and the sha256 of the file.

    Raises:
        UnreadableImageError: The file is missing, truncated or not an image.
    """
    try:
        content = path.read_bytes()
        # reads only the header
        image = Image.open(io.BytesIO(content))
        num_pixels = image.width * image.height
        if num_pixels > (Image.MAX_IMAGE_PIXELS or num_pixels) or max(image.size) > _MAX_SIDE:
            raise ValueError(f"{image.width} x {image.height} pixels would exhaust the memory")
        image.load()
    except MemoryError:
        raise
    except Exception as error:
        # on damaged bytes Pillow's readers can raise anything
        raise unreadable(printable(str(path)), error) from error
    return image, hashlib.sha256(content).digest()


def _open_array_file(path: Path) -> ImageSet:
    """Open an ``.npy`` or ``.npz`` file.

    In an ``.npz`` file the images are the array ``images``, or else the only array beside
    ``labels``; no other array is guessed.

    Raises:
        OodHeatmapError: The file cannot be read, or it is ambiguous which array has the images.
    """
    labels = None
    try:
        if path.suffix == ".npz":
            with path.open("rb") as file, np.load(file, allow_pickle=False) as content:
                images = content[_images_key(content.files, path)]
                labels = content["labels"] if "labels" in content.files else None
        else:
            images = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise OodHeatmapError(f"{path} cannot be read as NumPy arrays ({error}).") from error
    found = from_array(images, labels, source=str(path))
    return replace(found, stamps=np.broadcast_to(np.array(_stamp(path)), (len(found), 2)))


def _images_key(keys: Sequence[str], path: Path) -> str:
    """Return the key of the array with the images."""
    candidates = [key for key in keys if key != "labels"]
    if "images" in candidates:
        return "images"
    if len(candidates) != 1:
        raise OodHeatmapError(
            f"{path} has the arrays {', '.join(keys) or '(none)'}: it is ambiguous which are the "
            "images. Save them with np.savez(path, images=..., labels=...)."
        )
    return candidates[0]


@dataclass(frozen=True)
class _ArrayReader:
    """Reads images from an array ``(N, 3, H, W)``."""

    images: NDArray[np.uint8]

    def read(self, row: int) -> tuple[NDArray[np.uint8], bytes]:
        return np.array(self.images[row]), self.digest(row)

    def digest(self, row: int) -> bytes:
        return hashlib.sha256(self.images[row].tobytes()).digest()


def from_array(
    images: NDArray[Any], labels: NDArray[Any] | None = None, *, source: str = "array"
) -> ImageSet:
    """Make an image set from an array.

    Args:
        images: uint8 ``(N, H, W, 3)``, ``(N, 3, H, W)`` or grey ``(N, H, W)``.
        labels: ``(N,)`` or ``(N, 1)``: integer labels from 0, -1 where unknown; or class names.
        source: Name for messages.

    Raises:
        OodHeatmapError: Unsupported dtype or shape, no rows, or invalid labels.
    """
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise OodHeatmapError(
            f"{source} has dtype {images.dtype} and shape {images.shape}; images must be uint8 "
            "(N, H, W, 3), (N, 3, H, W) or (N, H, W), with values 0 to 255."
        )
    if images.ndim == 3:
        images = np.broadcast_to(images[:, None], (len(images), 3, *images.shape[1:]))
    elif images.shape[3] in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    if images.shape[1] == 1:
        images = np.broadcast_to(images, (len(images), 3, *images.shape[2:]))
    if images.shape[1] != 3 or 0 in images.shape:
        raise OodHeatmapError(
            f"{source} has shape {images.shape}: these are not images of 1 or 3 channels."
        )
    known, names = _array_labels(labels, len(images), source)
    listing = hashlib.sha256(repr(images.shape).encode() + known.astype("<i4").tobytes())
    for name in names:
        listing.update(f"{name}\n".encode(errors="surrogateescape"))
    return ImageSet(
        source=source,
        names=[str(row) for row in range(len(images))],
        labels=known,
        classes=names or tuple(map(str, range(int(known.max()) + 1))),
        reader=_ArrayReader(images),
        listing=listing.hexdigest(),
        array=images,
        has_class_names=bool(names),
    )


def _array_labels(
    labels: NDArray[Any] | None, count: int, source: str
) -> tuple[NDArray[np.int32], tuple[str, ...]]:
    """Convert labels to ``(N,)`` int32; also return the class names if labels are names."""
    if labels is None:
        return np.full(count, -1, np.int32), ()
    if labels.shape not in ((count,), (count, 1)):
        raise OodHeatmapError(
            f"{source} has {count} images but labels of shape {labels.shape}; "
            f"labels must have shape ({count},)."
        )
    labels = labels.reshape(count)
    if labels.dtype.kind in "US":
        found, numbers = np.unique(labels.astype(str), return_inverse=True)
        return numbers.astype(np.int32), tuple(printable(str(name)) for name in found)
    if labels.dtype.kind in "iuf":
        # also False for NaN
        in_range = (labels >= -1) & (labels <= _MAX_LABEL)
        if in_range.all() and (labels == np.trunc(labels)).all():
            return labels.astype(np.int32), ()
    raise OodHeatmapError(
        f"the labels of {source} are not class numbers "
        f"({labels.dtype}: {np.array2string(labels, threshold=6)}). "
        "Use integers from 0, -1 where unknown, or class names."
    )


def _torchvision_sets() -> dict[str, Callable[[str, dict[str, Any]], Any]]:
    """Map each data set name to a function of (split, common arguments) that opens it."""
    from torchvision import datasets as tv

    def by_flag(kind: Any) -> Callable[[str, dict[str, Any]], Any]:
        return lambda split, common: kind(train={"train": True, "test": False}[split], **common)

    def by_split(kind: Any) -> Callable[[str, dict[str, Any]], Any]:
        return lambda split, common: kind(split=split, **common)

    def places(split: str, common: dict[str, Any]) -> Any:
        return tv.Places365(
            split={"train": "train-standard"}.get(split, split), small=True, **common
        )

    return {
        "cifar10": by_flag(tv.CIFAR10),
        "cifar100": by_flag(tv.CIFAR100),
        "dtd": by_split(tv.DTD),
        "fashion-mnist": by_flag(tv.FashionMNIST),
        "flowers102": by_split(tv.Flowers102),
        "food101": by_split(tv.Food101),
        "gtsrb": by_split(tv.GTSRB),
        "mnist": by_flag(tv.MNIST),
        "pets": lambda split, common: tv.OxfordIIITPet(
            split={"train": "trainval"}.get(split, split), **common
        ),
        "places365": places,
        "stl10": by_split(tv.STL10),
        "svhn": by_split(tv.SVHN),
    }


@dataclass(frozen=True)
class _TorchvisionReader:
    """Reads images of a torchvision data set; digests are of the decoded pixels."""

    dataset: Any
    source: str

    def read(self, row: int) -> tuple[Decoded, bytes]:
        try:
            image = self.dataset[row][0]
        except (OSError, ValueError, SyntaxError) as error:
            raise unreadable(f"{self.source}/{row}", error) from error
        content = f"{image.mode}{image.size}".encode() + image.tobytes()
        return image, hashlib.sha256(content).digest()

    def digest(self, row: int) -> bytes:
        return self.read(row)[1]


def _open_torchvision(source: str, data_root: Path, download: bool) -> ImageSet:
    """Open a torchvision data set named ``name/split``; the split defaults to ``test``."""
    name, _, split = source.partition("/")
    sets = _torchvision_sets()
    if name not in sets:
        raise UsageError(
            f"there is no folder, file or data set {source!r}. "
            f"Data sets: {', '.join(sets)}, each with /train or /test."
        )
    if name == "places365" and split in ("", "test"):
        split = "val"
    try:
        dataset = sets[name](split or "test", {"root": str(data_root), "download": download})
    except KeyError:
        raise UsageError(
            f"{name} has no split {split!r}: use {name}/train or {name}/test."
        ) from None
    except ValueError as error:
        raise UsageError(f"{source}: {error}") from error
    except (RuntimeError, OSError) as error:
        raise OodHeatmapError(
            f"{source} is not complete under {data_root} ({str(error).splitlines()[0]}). "
            "Add --download, or set its location with --data-root."
        ) from error
    labels = _torchvision_labels(dataset)
    names = getattr(dataset, "classes", None)
    return ImageSet(
        source=source,
        names=[f"{source}/{row}" for row in range(len(dataset))],
        labels=labels,
        classes=tuple(map(str, range(int(labels.max()) + 1) if names is None else names)),
        reader=_TorchvisionReader(dataset, source),
        listing=hashlib.sha256(f"{source}\0{len(dataset)}".encode() + labels.tobytes()).hexdigest(),
        has_class_names=names is not None,
    )


def _torchvision_labels(dataset: Any) -> NDArray[np.int32]:
    """Return a data set's labels without decoding images; -1 if it has no such attribute."""
    for name in ("targets", "labels", "_labels"):
        if hasattr(dataset, name):
            return np.asarray(getattr(dataset, name), dtype=np.int32)
    return np.full(len(dataset), -1, dtype=np.int32)
