"""Image sets by name, and the one transform that every image of every stage goes through.

Whatever comes in ends as uint8 ``(C, H, W)`` RGB at the classifier's input size, quantised once,
so that the difference
of two images is exact.
"""

import hashlib
import io
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar, cast, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor

from ood_heatmap.errors import OodHeatmapError, UsageError

EXTENSIONS = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif"}
# what Pillow raises for bytes that are no image or only a part of one
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, TypeError, IndexError, KeyError)
UNREADABLE += (Image.DecompressionBombError, Image.DecompressionBombWarning)  # type: ignore[assignment]
# 64 MB as Pillow stores them
_MAX_RESIZED_PIXELS = 2**24
UInt8: TypeAlias = NDArray[np.uint8]
Decoded: TypeAlias = Image.Image | UInt8  # an image of any mode, or uint8 RGB (3, H, W)
Item = TypeVar("Item")
Done = TypeVar("Done")


class UnreadableImageError(OodHeatmapError):
    """An image file is missing, cut short or no image."""


CropMode: TypeAlias = Literal["center", "squash", "border"]
Interpolation: TypeAlias = Literal["bilinear", "bicubic"]


@dataclass(frozen=True)
class Transform:
    """Resize with antialiasing, then crop the centre: equal to torchvision's and timm's own.

    Equal byte for byte on the same Pillow, the rounding of odd margins and of the longer side
    included. Made of plain values: ``dataclasses.asdict`` gives its JSON, ``Transform(**content)``
    takes it.

    Args:
        size: Pixels of the square that comes out.
        resize: Pixels of the resized side before the crop; ``size`` when 0.
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
        """Return the transform of torchvision weights, without its normalization.

        Args:
            preset: What ``weights.transforms()`` returns.

        Raises:
            UsageError: It is not the preset of an image classifier.
        """
        kind = type(preset).__name__
        if kind != "ImageClassification":
            raise UsageError(
                f"these weights are not of an image classifier (their transform is {kind}). "
                "Name a model of torchvision.models for classification."
            )
        (size,), (resize,) = preset.crop_size, preset.resize_size
        return Transform(size, resize, _interpolation(preset.interpolation.value))

    @staticmethod
    def from_timm(config: Mapping[str, Any]) -> "Transform":
        """Return timm's evaluation transform, without its normalization.

        Args:
            config: What ``timm.data.resolve_data_config`` returns.

        Raises:
            UsageError: The input is not square, or the crop mode or interpolation is not known.
        """
        _, height, width = config["input_size"]
        if height != width:
            raise UsageError(
                f"the model takes images of {height} x {width} px; only square inputs are "
                "supported. Choose a model with a square input."
            )
        crop_mode = config["crop_mode"]
        if crop_mode not in get_args(CropMode):
            raise UsageError(
                f"the crop mode {crop_mode!r} is not known: use a model with one of "
                f"{', '.join(get_args(CropMode))}."
            )
        red, green, blue = (round(255 * value) for value in config["mean"])
        return Transform(
            height,
            math.floor(height / config["crop_pct"]),
            _interpolation(config["interpolation"]),
            crop_mode,
            f"#{red:02x}{green:02x}{blue:02x}" if crop_mode == "border" else "#000000",
        )

    def __call__(self, image: Decoded) -> UInt8:
        """Return uint8 ``(3, size, size)``."""
        image = to_rgb(image)
        height, width = self._resized_shape(image.height, image.width)
        (top, bottom), (left, right) = self._crop(height), self._crop(width)
        resample = Image.Resampling[self.interpolation.upper()]
        cropped = _resize_and_crop(image, (width, height), (left, top, right, bottom), resample)
        pixels = np.asarray(cropped).transpose(2, 0, 1)
        if pixels.shape[1:] == (self.size, self.size):
            return np.ascontiguousarray(pixels)
        canvas = np.empty((3, self.size, self.size), np.uint8)
        canvas[:] = np.array(ImageColor.getrgb(self.fill), np.uint8)[:, None, None]
        top, left = ((self.size - length) // 2 for length in pixels.shape[1:])
        canvas[:, top : top + pixels.shape[1], left : left + pixels.shape[2]] = pixels
        return canvas

    def _resized_shape(self, height: int, width: int) -> tuple[int, int]:
        """Return height and width before the crop, as torchvision and timm round them."""
        side = self.resize or self.size
        if self.crop_mode == "squash":
            return side, side
        if self.crop_mode == "border":
            ratio = max(height / side, width / side)
            return max(1, round(height / ratio)), max(1, round(width / ratio))
        shorter = min(height, width)
        return int(side * height / shorter), int(side * width / shorter)

    def _crop(self, length: int) -> tuple[int, int]:
        """Return where the crop starts and ends along one side of the resized image."""
        # half to even, as torchvision's center_crop
        start = round(max(0, length - self.size) / 2)
        return start, min(length, start + self.size)

    def keeps(self, height: int, width: int) -> bool:
        """Tell whether images of this size pass unchanged."""
        return (height, width) == (self.size, self.size) and self.resize in (0, self.size)


def _interpolation(name: str) -> Interpolation:
    """Return the interpolation of a preset.

    Raises:
        UsageError: It is neither bilinear nor bicubic.
    """
    if name not in get_args(Interpolation):
        raise UsageError(
            f"the interpolation {name!r} is not supported: use a model with one of "
            f"{', '.join(get_args(Interpolation))}."
        )
    return cast(Interpolation, name)


def to_rgb(image: Decoded) -> Image.Image:
    """Return an 8-bit RGB image; 16-bit grey values are scaled, not clipped.

    Transparency is dropped.
    """
    if isinstance(image, np.ndarray):
        return Image.fromarray(image.transpose(1, 2, 0))
    if image.mode == "RGB":
        return image
    if image.mode == "F":
        raise ValueError("floating-point images have no known range; save them with 8 or 16 bits")
    if image.mode.startswith("I"):
        image = Image.fromarray(
            (np.asarray(image, dtype=np.uint32) >> 8).clip(0, 255).astype(np.uint8)
        )
    if image.mode == "P":  # its transparency may be bytes, which only RGBA takes without a warning
        image = image.convert("RGBA")
    return image.convert("RGB")


def _resize_and_crop(
    image: Image.Image,
    size: tuple[int, int],
    box: tuple[int, int, int, int],
    resample: Image.Resampling,
) -> Image.Image:
    """Resize an image to (width, height) and crop the box (left, top, right, bottom) of that.

    The whole image is resized where it can be: then the result is Pillow's, byte for byte. Of a
    long strip, which would fill the memory, only the crop is.
    """
    if size[0] * size[1] <= _MAX_RESIZED_PIXELS:
        return image.resize(size, resample).crop(box)
    scale = np.tile(np.divide(image.size, size), 2)
    source = scale * box
    # Pillow takes the box in single precision: cut the image near it, beyond the kernel's reach
    reach = 2 * np.ceil(np.maximum(scale, 1)) + 1
    left, top = np.maximum(np.floor(source - reach)[:2], 0)
    right, bottom = np.minimum(np.ceil(source + reach)[2:], image.size)
    strip = image.crop((int(left), int(top), int(right), int(bottom)))
    cropped_size = (box[2] - box[0], box[3] - box[1])
    offset = source - (left, top, left, top)
    return strip.resize(cropped_size, resample, tuple(offset.tolist()))


@dataclass(frozen=True)
class ImageSet:
    """A set of images in a fixed order; a row is a position in it.

    Args:
        source: What the user named.
        names: One for each row: the path inside a folder, or the row's number.
        labels: ``(N,)`` int32; -1 where unknown.
        classes: Class names by label; empty when there are no labels.
        read: Row to decoded image and sha256 of its bytes. Called from several threads.
        digest: Row to that sha256 alone.
        listing: sha256 of what is known without reading the images.
        array: All images as uint8 ``(N, 3, H, W)`` when they are in memory already.
    """

    source: str
    names: Sequence[str]
    labels: NDArray[np.int32]
    classes: tuple[str, ...]
    read: Callable[[int], tuple[Decoded, bytes]]
    digest: Callable[[int], bytes]
    listing: str
    array: NDArray[np.uint8] | None = None

    def __len__(self) -> int:
        return len(self.names)

    def describe(self) -> dict[str, Any]:
        """Return what goes into a stage's inputs.

        Where a set lies does not matter, what is in it does.
        """
        return {"num_images": len(self), "listing": self.listing}


def open_images(source: str, *, data_root: Path = Path("data"), download: bool = False) -> ImageSet:
    """Return the set that a user names: a folder, an ``.npy`` or ``.npz`` file, or ``name/split``.

    Args:
        source: Path of a folder of images, or of class folders; of uint8 arrays; or a torchvision
            set.
        data_root: Where torchvision sets lie.
        download: Let torchvision fetch a set that is not there.

    Raises:
        OodHeatmapError: Nothing of that name, or nothing in it.
    """
    path = Path(source)
    if path.is_dir():
        return open_folder(path)
    if path.suffix in (".npy", ".npz"):
        return open_array_file(path)
    return open_torchvision(source, data_root, download)


def is_image(path: Path) -> bool:
    """Tell an image by its name; hidden files are none."""
    return path.suffix.lower() in EXTENSIONS and not path.name.startswith(".")


def open_folder(root: Path) -> ImageSet:
    """Return the images of a folder: one subfolder for each class, or flat."""
    flat = sorted(path for path in root.iterdir() if path.is_file() and is_image(path))
    folders = sorted(path for path in root.iterdir() if path.is_dir() and path.name[0] != ".")
    by_class = {
        folder.name: sorted(path for path in folder.rglob("*") if path.is_file() and is_image(path))
        for folder in folders
    }
    classes = tuple(name for name, paths in by_class.items() if paths)
    if flat and classes:
        raise OodHeatmapError(
            f"{root} holds images ({flat[0].name}) and class folders ({classes[0]}) side by side. "
            "Keep one kind."
        )
    if not flat and not classes:
        raise OodHeatmapError(
            f"{root} holds no images (looked for {', '.join(sorted(EXTENSIONS))}). Name the "
            f"folder that does."
        )
    paths = flat or [path for name in classes for path in by_class[name]]
    counts = [len(by_class[name]) for name in classes]
    labels = np.repeat(np.arange(len(classes)), counts) if classes else np.full(len(flat), -1)
    names = [path.relative_to(root).as_posix() for path in paths]
    listing = hashlib.sha256()
    for name, path in zip(names, paths, strict=True):
        listing.update(f"{name}\0{path.stat().st_size}\n".encode())
    return ImageSet(
        source=str(root),
        names=names,
        labels=labels.astype(np.int32),
        classes=classes,
        read=lambda row: read_file(paths[row]),
        digest=lambda row: hashlib.sha256(paths[row].read_bytes()).digest(),
        listing=listing.hexdigest(),
    )


def read_file(path: Path) -> tuple[Image.Image, bytes]:
    """Return a decoded image file and the sha256 of its bytes.

    Raises:
        UnreadableImageError: It is missing, cut short or no image.
    """
    try:
        content = path.read_bytes()
        image = Image.open(io.BytesIO(content))  # reads the header alone
        if image.width * image.height > (Image.MAX_IMAGE_PIXELS or float("inf")):
            raise ValueError(f"{image.width} x {image.height} pixels, made to fill the memory")
        image.load()
    except UNREADABLE as error:
        raise UnreadableImageError(
            f"{path} is not a readable image ({error}). Mend or remove it, or add "
            f"--skip-unreadable."
        ) from error
    return image, hashlib.sha256(content).digest()


def open_array_file(path: Path) -> ImageSet:
    """Return the images of an ``.npy`` file, or of ``images`` (and ``labels``) in an ``.npz``
    file."""
    try:
        content = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(content, np.ndarray):
            images, labels = content, None
        else:
            key = "images" if "images" in content.files else content.files[0]
            images = content[key]
            labels = content["labels"] if "labels" in content.files else None
    except (OSError, ValueError, KeyError, IndexError, EOFError) as error:
        raise OodHeatmapError(f"{path} cannot be read as NumPy arrays ({error}).") from error
    return from_array(images, labels, source=str(path))


def from_array(
    images: NDArray[Any], labels: NDArray[Any] | None = None, *, source: str = "array"
) -> ImageSet:
    """Return an array of images as a set.

    Args:
        images: uint8 ``(N, H, W, 3)``, ``(N, 3, H, W)`` or grey ``(N, H, W)``.
        labels: ``(N,)`` integers.
        source: For messages.

    Raises:
        OodHeatmapError: Another dtype or shape, no rows, or labels of another length.
    """
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise OodHeatmapError(
            f"{source} holds {images.dtype} {images.shape}; images must be uint8 (N, H, W, 3), "
            f"(N, 3, H, W) "
            "or (N, H, W), with values 0 to 255."
        )
    if images.ndim == 3:
        images = np.broadcast_to(images[:, None], (len(images), 3, *images.shape[1:]))
    elif images.shape[3] in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    if images.shape[1] == 1:
        images = np.broadcast_to(images, (len(images), 3, *images.shape[2:]))
    if images.shape[1] != 3 or len(images) == 0:
        raise OodHeatmapError(
            f"{source} has shape {images.shape}: no images of 1 or 3 channels in it."
        )
    if labels is not None and len(labels) != len(images):
        raise OodHeatmapError(f"{source} has {len(images)} images but {len(labels)} labels.")
    known = labels if labels is not None else np.full(len(images), -1)
    classes = tuple(map(str, range(int(known.max()) + 1)))
    listing = hashlib.sha256(repr(images.shape).encode() + np.asarray(known, "<i4").tobytes())

    def digest(row: int) -> bytes:
        return hashlib.sha256(images[row].tobytes()).digest()

    def read(row: int) -> tuple[Decoded, bytes]:
        return np.array(images[row]), digest(row)

    names = [str(row) for row in range(len(images))]
    labels = known.astype(np.int32)
    return ImageSet(source, names, labels, classes, read, digest, listing.hexdigest(), images)


def torchvision_sets() -> dict[str, Callable[[str, dict[str, Any]], Any]]:
    """Return set name to a function of (split, common arguments) that opens it."""
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


def open_torchvision(source: str, data_root: Path, download: bool) -> ImageSet:
    """Return a torchvision set named ``name/split``; the split is ``test`` when not given."""
    name, _, split = source.partition("/")
    sets = torchvision_sets()
    if name not in sets:
        raise UsageError(
            f"there is no folder, file or set {source!r}. Sets: {', '.join(sets)}, each with "
            f"/train or /test."
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
            f"{source} is not whole under {data_root} ({str(error).splitlines()[0]}). "
            "Add --download, or name its place with --data-root."
        ) from error
    labels = known_labels(dataset)
    classes = tuple(map(str, getattr(dataset, "classes", range(int(labels.max()) + 1))))

    def read(row: int) -> tuple[Image.Image, bytes]:
        image = dataset[row][0]
        return image, hashlib.sha256(
            f"{image.mode}{image.size}".encode() + image.tobytes()
        ).digest()

    listing = hashlib.sha256(f"{source}\0{len(dataset)}".encode() + labels.tobytes()).hexdigest()
    names = [f"{source}/{row}" for row in range(len(dataset))]
    return ImageSet(source, names, labels, classes, read, lambda row: read(row)[1], listing)


def known_labels(dataset: Any) -> NDArray[np.int32]:
    """Return a torchvision set's labels without decoding its images.

    -1 where it keeps none at hand.
    """
    for name in ("targets", "labels", "_labels"):
        if hasattr(dataset, name):
            return np.asarray(getattr(dataset, name), dtype=np.int32)
    return np.full(len(dataset), -1, dtype=np.int32)


@dataclass(frozen=True)
class Batch:
    """Decoded images, on their way to the classifier.

    Args:
        rows: ``(B,)`` rows of the set, ascending; unreadable ones are left out.
        pixels: ``(B, 3, H, W)`` uint8.
        digests: sha256 of each image's bytes, joined.
        modes: How many images of each mode other than RGB were converted.
        skipped: Names of unreadable images.
        seconds: Time it took a thread to decode them.
        cpu_seconds: How much of it the thread was on a core.
    """

    rows: NDArray[np.int64]
    pixels: UInt8
    digests: bytes
    modes: Counter[str] = field(default_factory=Counter)
    skipped: tuple[str, ...] = ()
    seconds: float = 0.0
    cpu_seconds: float = 0.0


def timed_decode(
    images: ImageSet, rows: NDArray[np.int64], transform: Transform, skip_unreadable: bool
) -> Batch:
    """Return ``decode``'s batch and how long it took."""
    started, on_core = time.perf_counter(), time.thread_time()
    batch = decode(images, rows, transform, skip_unreadable)
    return replace(
        batch,
        seconds=time.perf_counter() - started,
        cpu_seconds=time.thread_time() - on_core,
    )


def decode(
    images: ImageSet, rows: NDArray[np.int64], transform: Transform, skip_unreadable: bool
) -> Batch:
    """Read and transform some images of a set."""
    if images.array is not None and transform.keeps(*images.array.shape[2:]):
        pixels = np.ascontiguousarray(images.array[rows])
        return Batch(rows, pixels, b"".join(hashlib.sha256(item).digest() for item in pixels))
    pixels = np.empty((len(rows), 3, transform.size, transform.size), np.uint8)
    kept: list[int] = []
    digests: list[bytes] = []
    skipped: list[str] = []
    modes = Counter[str]()
    for row in rows:
        try:
            image, digest = images.read(int(row))
            pixels[len(kept)] = as_pixels(image, transform, images.names[row])
        except UnreadableImageError:
            if not skip_unreadable:
                raise
            skipped.append(images.names[row])
            continue
        if mode_of(image) != "RGB":
            modes[mode_of(image)] += 1
        kept.append(row)
        digests.append(digest)
    return Batch(
        np.array(kept, np.int64), pixels[: len(kept)], b"".join(digests), modes, tuple(skipped)
    )


def mode_of(image: Decoded) -> str:
    """Return the mode that an image came in, as Pillow names it."""
    return "RGB" if isinstance(image, np.ndarray) else image.mode


def as_pixels(image: Decoded, transform: Transform, name: str) -> UInt8:
    """Return the transformed image; what cannot be transformed is unreadable too."""
    try:
        return transform(image)
    except UNREADABLE as error:
        raise UnreadableImageError(
            f"{name} cannot be brought to {transform.size} px RGB ({error}). "
            "Mend or remove it, or add --skip-unreadable."
        ) from error


def batches(
    images: ImageSet,
    pieces: Iterable[NDArray[np.int64]],
    transform: Transform,
    *,
    workers: int,
    skip_unreadable: bool = False,
) -> Iterator[Batch]:
    """Decode images in threads, ahead of the reader, in order.

    Threads and not processes: decoding and resizing go on without Python's lock, and nothing is
    copied or pickled.

    Args:
        images: The set.
        pieces: Rows of each batch, ascending.
        transform: The one transform.
        workers: Threads; as many batches wait decoded.
        skip_unreadable: Leave unreadable images out instead of raising.

    Raises:
        UnreadableImageError: Names the image.
    """
    return ahead(
        lambda piece: timed_decode(images, piece, transform, skip_unreadable),
        pieces,
        workers=workers,
    )


def ahead(work: Callable[[Item], Done], items: Iterable[Item], *, workers: int) -> Iterator[Done]:
    """Work on items in threads, ahead of the reader, in order; ``workers`` results wait at most."""
    waiting: deque[Future[Done]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
