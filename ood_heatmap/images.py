"""Image sets, and the transform that all stages apply to every image.

The result is always uint8 RGB ``(3, H, W)`` at the classifier's input size, quantized once, so that
the difference of two images is exact. EXIF orientation is applied first, in every stage and for
every format; torchvision's ``ImageFolder`` ignores it.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, TypeAlias, TypeVar, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageColor, UnidentifiedImageError
from torch.nn.functional import interpolate

from ood_heatmap.errors import OodHeatmapError, UsageError

# 64 MB as Pillow stores them
_MAX_RESIZED_PIXELS = 2**24
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# an image of any mode, or uint8 RGB (3, H, W)
Decoded: TypeAlias = Image.Image | NDArray[np.uint8]
_Item = TypeVar("_Item")
_Done = TypeVar("_Done")


class UnreadableImageError(OodHeatmapError):
    """An image is missing, truncated, not an image, or of a mode that cannot be converted."""

    reason: str = ""


def unreadable(name: str, cause: Exception) -> UnreadableImageError:
    """Return the error for an image that cannot be read or converted, with the reason."""
    if isinstance(cause, UnidentifiedImageError):
        # Pillow's own message contains a memory address
        reason = "not an image"
    else:
        reason = (isinstance(cause, OSError) and cause.strerror) or str(cause) or repr(cause)
    error = UnreadableImageError(
        f"{name} is not a readable image ({reason}). Repair or remove it; commands skip it with "
        "--skip-unreadable."
    )
    error.reason = reason
    return error


CropMode: TypeAlias = Literal["center", "squash", "border"]
Interpolation: TypeAlias = Literal["bilinear", "bicubic"]


@dataclass(frozen=True)
class Transform:
    """Antialiased resize and center crop, equivalent to torchvision's and timm's.

    The geometry is equal; of a photograph's values, one to three in a thousand differ by one level,
    since PyTorch and Pillow round their kernels differently. All fields are plain values:
    ``dataclasses.asdict`` gives its JSON, ``Transform(**content)`` parses it.

    Args:
        size: Side of the square output in pixels.
        resize: Side of the resized image before the crop in pixels; ``size`` when 0.
        interpolation: ``bilinear`` or ``bicubic``.
        crop_mode: As timm names them. ``center`` resizes the shorter side and keeps the aspect
            ratio, ``border`` the longer side, ``squash`` both sides, whatever the ratio.
        fill: Color of the padding where the resized image is smaller than ``size``, ``#rrggbb``.
    """

    size: int
    resize: int = 0
    interpolation: Interpolation = "bilinear"
    crop_mode: CropMode = "center"
    fill: str = "#000000"

    @staticmethod
    def from_torchvision(preset: Any) -> "Transform":
        """Make the transform of torchvision weights, without its normalization.

        Args:
            preset: Return value of ``weights.transforms()``.

        Raises:
            UsageError: The preset is not one of an image classifier.
        """
        kind = type(preset).__name__
        if kind != "ImageClassification":
            raise UsageError(
                f"these weights are not of an image classifier (their transform is {kind}). "
                "Name a model of torchvision.models for classification."
            )
        (size,), (resize,) = preset.crop_size, preset.resize_size
        return Transform(size, resize, interpolation_of(preset.interpolation.value))

    @staticmethod
    def from_timm(config: Mapping[str, Any]) -> "Transform":
        """Make timm's evaluation transform, without its normalization.

        Args:
            config: Return value of ``timm.data.resolve_data_config``.

        Raises:
            UsageError: The input is not square, or the crop mode or interpolation is unsupported.
        """
        _, height, width = config["input_size"]
        if height != width:
            raise UsageError(
                f"the model takes images of {height} x {width} px, but inputs must be square. "
                "Choose a model with a square input."
            )
        crop_mode = config["crop_mode"]
        if crop_mode not in get_args(CropMode):
            raise UsageError(
                f"the crop mode {crop_mode!r} is not supported: "
                f"use a model with one of {', '.join(get_args(CropMode))}."
            )
        red, green, blue = (round(255 * value) for value in config["mean"])
        return Transform(
            height,
            math.floor(height / config["crop_pct"]),
            interpolation_of(config["interpolation"]),
            crop_mode,
            f"#{red:02x}{green:02x}{blue:02x}" if crop_mode == "border" else "#000000",
        )

    def __call__(self, image: Decoded) -> NDArray[np.uint8]:
        """Transform an image to uint8 ``(3, size, size)``."""
        image = to_rgb(image)
        height, width = self._resized_shape(image.height, image.width)
        (top, bottom), (left, right) = self._crop(height), self._crop(width)
        box = (left, top, right, bottom)
        pixels = _resize_and_crop(image, (width, height), box, self.interpolation)
        if pixels.shape[1:] == (self.size, self.size):
            return np.ascontiguousarray(pixels)
        canvas = np.empty((3, self.size, self.size), np.uint8)
        canvas[:] = np.array(ImageColor.getrgb(self.fill), np.uint8)[:, None, None]
        top, left = ((self.size - length) // 2 for length in pixels.shape[1:])
        canvas[:, top : top + pixels.shape[1], left : left + pixels.shape[2]] = pixels
        return canvas

    def _resized_shape(self, height: int, width: int) -> tuple[int, int]:
        """Return height and width before the crop, rounded as in torchvision and timm."""
        side = self.resize or self.size
        if self.crop_mode == "squash":
            return side, side
        if self.crop_mode == "border":
            ratio = max(height / side, width / side)
            return max(1, round(height / ratio)), max(1, round(width / ratio))
        shorter = min(height, width)
        return int(side * height / shorter), int(side * width / shorter)

    def seen_box(self, width: int, height: int) -> tuple[float, float, float, float]:
        """Return the part of an upright image that the output shows.

        Args:
            width: Width of the image in pixels.
            height: Height of the image in pixels.

        Returns:
            Left, top, right and bottom in pixels of the image, beyond it where there is padding.
        """
        resized_height, resized_width = self._resized_shape(height, width)
        left, right = self._seen(resized_width, width / resized_width)
        top, bottom = self._seen(resized_height, height / resized_height)
        return left, top, right, bottom

    def _seen(self, length: int, scale: float) -> tuple[float, float]:
        """Return start and stop of the output along one side, in pixels of the original image."""
        start, stop = self._crop(length)
        start -= (self.size - (stop - start)) // 2
        return start * scale, (start + self.size) * scale

    def _crop(self, length: int) -> tuple[int, int]:
        """Return start and stop of the center crop along one side of the resized image."""
        # rounds half to even, as torchvision's center_crop
        start = round(max(0, length - self.size) / 2)
        return start, min(length, start + self.size)

    def keeps(self, height: int, width: int) -> bool:
        """Return whether images of this size are returned unchanged."""
        return (height, width) == (self.size, self.size) and self.resize in (0, self.size)


def interpolation_of(name: str) -> Interpolation:
    """Validate the interpolation of a preset.

    Raises:
        UsageError: It is neither bilinear nor bicubic.
    """
    if name not in get_args(Interpolation):
        raise UsageError(
            f"the interpolation {name!r} is not supported: "
            f"use a model with one of {', '.join(get_args(Interpolation))}."
        )
    return cast(Interpolation, name)


def to_rgb(image: Decoded) -> Image.Image:
    """Convert to an upright 8-bit RGB image.

    - EXIF orientation is applied.
    - 16-bit grey values are scaled from 0..65535, not clipped.
    - Alpha is dropped, as in torchvision: color under transparent pixels becomes visible.
    - Of an animation or a multi-page file, only the first frame is used.

    Raises:
        ValueError: The range of the values is unknown: floating point, integers below 0 or above
            65535, or 16-bit grey values so small that the image would be black.
    """
    if isinstance(image, np.ndarray):
        return Image.fromarray(image.transpose(1, 2, 0))
    orientation = exif_orientation(image)
    if orientation in _UPRIGHT:
        image = image.transpose(_UPRIGHT[orientation])
    if image.mode == "RGB":
        return image
    if image.mode == "F":
        raise ValueError("floating-point images have no known range; save them with 8 or 16 bits")
    if image.mode.startswith("I"):
        values = np.asarray(image)
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > 65535:
            raise ValueError(
                f"integer grey values from {low} to {high} have no known range; "
                "save them with 8 or 16 bits"
            )
        if 0 < high < 256:
            raise ValueError(
                f"16-bit grey values with a maximum of {high} of 65535 would all be black; "
                "save them with 8 bits, or scale them"
            )
        image = Image.fromarray((values >> 8).astype(np.uint8))
    if image.mode == "P":
        # palette transparency may be bytes, which only RGBA converts without a warning
        image = image.convert("RGBA")
    return image.convert("RGB")


def exif_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 (upright) if it is missing or damaged.

    Pillow rotates TIFF files on loading, and reports them as upright afterwards.
    """
    image.load()
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        # a damaged header can make the parser raise anything
        return 1
    return orientation if orientation in _UPRIGHT else 1


def _resize_and_crop(
    image: Image.Image,
    size: tuple[int, int],
    box: tuple[int, int, int, int],
    interpolation: Interpolation,
) -> NDArray[np.uint8]:
    """Resize an RGB image to (width, height), then crop the box (left, top, right, bottom).

    Returns:
        uint8 ``(3, bottom - top, right - left)``.
    """
    resample = Image.Resampling[interpolation.upper()]
    left, top, right, bottom = box
    if size[0] * size[1] > _MAX_RESIZED_PIXELS:
        return _to_array(_resize_strip(image, size, box, resample))
    if image.height - size[1] > max(0, 2 * (image.width - size[0])):
        # Pillow 13 resizes columns first in this case, older versions and PyTorch resize rows first
        return _to_array(image.resize(size, resample).crop(box))
    if size == image.size:
        return _to_array(image.crop(box))
    # integer arithmetic like Pillow's, in a third of the time
    batch = torch.from_numpy(_to_array(image))[None]
    resized = interpolate(batch, size[::-1], mode=interpolation, antialias=True)[0]
    pixels: NDArray[np.uint8] = resized[:, top:bottom, left:right].numpy()
    return pixels


def _to_array(image: Image.Image) -> NDArray[np.uint8]:
    """Convert an RGB image to uint8 ``(3, H, W)``, channels-last in memory."""
    pixels: NDArray[np.uint8] = np.array(image).transpose(2, 0, 1)
    return pixels


def _resize_strip(
    image: Image.Image,
    size: tuple[int, int],
    box: tuple[int, int, int, int],
    resample: Image.Resampling,
) -> Image.Image:
    """Resize only the crop of a very elongated image, which would not fit in memory as a whole."""
    scale = np.tile(np.divide(image.size, size), 2)
    source = scale * box
    # Pillow takes the box in single precision: crop near it first, beyond the kernel's support
    reach = 2 * np.ceil(np.maximum(scale, 1)) + 1
    left, top = np.maximum(np.floor(source - reach)[:2], 0)
    right, bottom = np.minimum(np.ceil(source + reach)[2:], image.size)
    strip = image.crop((int(left), int(top), int(right), int(bottom)))
    cropped_size = (box[2] - box[0], box[3] - box[1])
    offset = source - (left, top, left, top)
    return strip.resize(cropped_size, resample, tuple(offset.tolist()))


class ImageReader(Protocol):
    """Reads the images of a set by row; must be thread-safe, and work in a forked process."""

    def read(self, row: int) -> tuple[Decoded, bytes]:
        """Return the decoded image and the sha256 of its bytes.

        Raises:
            UnreadableImageError: The image cannot be read; names the image.
        """

    def digest(self, row: int) -> bytes:
        """Return only the sha256."""


@dataclass(frozen=True)
class ImageSet:
    """A set of images in a fixed order; a row is a position in it.

    Args:
        source: The source as named by the user.
        names: Printable name of each row: the path within a folder, or the row number.
        labels: ``(N,)`` int32; -1 where unknown.
        classes: Class names by label, printable; empty without labels.
        reader: Reads an image by its row.
        listing: sha256 of everything known without reading the images.
        array: All images as uint8 ``(N, 3, H, W)`` if they are in memory, otherwise None.
        has_class_names: False if ``classes`` are only label numbers, as in array files.
        stamps: ``(N, 2)`` int64 size in bytes and modification time in nanoseconds of the file of
            each image, as of its listing; None if they say nothing about the content.
        mask: Returns the mask of an image by its row, ``(h, h)`` uint8, where images have masks;
            called where the image is decoded.
    """

    source: str
    names: Sequence[str]
    labels: NDArray[np.int32]
    classes: tuple[str, ...]
    reader: ImageReader
    listing: str
    array: NDArray[np.uint8] | None = None
    has_class_names: bool = True
    stamps: NDArray[np.int64] | None = None
    mask: Callable[[int], NDArray[np.uint8]] | None = None

    def __len__(self) -> int:
        return len(self.names)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes; empty where they are only numbered."""
        return self.classes if self.has_class_names else ()

    def read(self, row: int) -> tuple[Decoded, bytes]:
        """Return the decoded image of a row and the sha256 of its bytes."""
        return self.reader.read(row)

    def digest(self, row: int) -> bytes:
        """Return the sha256 of the image of a row."""
        return self.reader.digest(row)

    def describe(self) -> dict[str, Any]:
        """Return the inputs of a stage: the content of the set, not its location."""
        return {"num_images": len(self), "listing": self.listing}


def relabel(images: ImageSet, classes: Sequence[str]) -> ImageSet:
    """Return the set with its labels mapped to another order of classes, matched by name.

    Args:
        images: A labelled set. If its classes have no names, labels are kept.
        classes: Class names of the classifier, by label; some may have no images in the set.

    Returns:
        The same rows; images of a class that is not in ``classes`` get the label -1.
    """
    if not images.has_class_names:
        labels = np.where(images.labels < len(classes), images.labels, -1)
    else:
        position = {name: number for number, name in enumerate(classes)}
        new_label = np.array([position.get(name, -1) for name in images.classes] + [-1])
        labels = new_label[images.labels]
    return replace(images, labels=labels.astype(np.int32), classes=tuple(classes))


ClassOrder: TypeAlias = Literal["name", "natural", "case-insensitive"]


def sort_classes(names: Iterable[str], order: ClassOrder) -> list[str]:
    """Sort class names into the order of their labels.

    Args:
        names: Distinct class names.
        order: ``name`` by code point, as torchvision's ``ImageFolder`` (1, 10, 2; B, a);
            ``natural`` with numbers as numbers and without case, as timm (1, 2, 10; a, B);
            ``case-insensitive`` (1, 10, 2; a, B).
    """
    keys: dict[ClassOrder, Callable[[str], Any]] = {
        "name": str,
        "natural": _natural_key,
        "case-insensitive": str.lower,
    }
    return sorted(sorted(names), key=keys[order])


def _natural_key(name: str) -> list[str | int]:
    """Return the sort key of timm's ``natural_key``."""
    return [int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", name.lower())]


def class_orders(classes: Sequence[str]) -> dict[ClassOrder, tuple[str, ...]]:
    """Return the other orders of the same class names, where they differ."""
    orders = {order: tuple(sort_classes(classes, order)) for order in get_args(ClassOrder)}
    return {order: names for order, names in orders.items() if names != tuple(classes)}


def apply_transform(transform: Transform, image: Decoded, name: str) -> NDArray[np.uint8]:
    """Transform an image, and name it in the error on failure.

    Raises:
        UnreadableImageError: The image cannot be transformed.
    """
    try:
        return transform(image)
    except (MemoryError, RuntimeError):
        # out of memory (PyTorch raises RuntimeError) is not a fault of the image
        raise
    except Exception as error:
        raise unreadable(name, error) from error
