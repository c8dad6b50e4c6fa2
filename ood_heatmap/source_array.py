"""Image sets in ``.npy`` and ``.npz`` files, and in arrays."""

import hashlib
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ood_heatmap.errors import OodHeatmapError, printable
from ood_heatmap.images import ImageSet
from ood_heatmap.listing import MAX_LABEL, stamp_of


def open_array_file(path: Path) -> ImageSet:
    """Open an ``.npy`` or ``.npz`` file.

    In an ``.npz`` file the images are the array ``images``, or else the only array beside
    ``labels``; no other array is guessed.

    Raises:
        OodHeatmapError: The file cannot be read, or it is ambiguous which array has the images.
    """
    labels, stamp = None, stamp_of(path)
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
    return replace(found, stamps=np.broadcast_to(np.array(stamp), (len(found), 2)))


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
        in_range = (labels >= -1) & (labels <= MAX_LABEL)
        if in_range.all() and (labels == np.trunc(labels)).all():
            return labels.astype(np.int32), ()
    raise OodHeatmapError(
        f"the labels of {source} are not class numbers "
        f"({labels.dtype}: {np.array2string(labels, threshold=6)}). "
        "Use integers from 0, -1 where unknown, or class names."
    )
