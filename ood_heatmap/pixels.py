"""What the detector accepts as images: validated, and converted to batches for the classifier."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ood_heatmap.errors import UsageError
from ood_heatmap.images import apply_transform, to_rgb

if TYPE_CHECKING:
    # only for annotations: a network is not needed to read images
    from ood_heatmap.classifier import ClassifierConfig

ImageLike: TypeAlias = Image.Image | str | os.PathLike[str] | NDArray[Any] | Tensor
Images: TypeAlias = ImageLike | Iterable[ImageLike]
_EXPECTED = (
    "images must be PIL images, paths, or uint8 arrays or tensors with values 0 to 255: "
    "(H, W), (H, W, 3) or (3, H, W), a list of these, or (B, H, W, 3) or (B, 3, H, W)"
)
# a batch that was not normalized, or with pixels up to 255, gives far larger pixels; Gaussian noise
# as an OOD image does not
_MAX_PIXEL = 10.0


@dataclass(frozen=True)
class Batch:
    """Images for the classifier, and what they were made from.

    Args:
        pixels: ``(B, 3, H, W)`` at the classifier's input size: uint8, or normalized float32.
        sources: The images as given, or their pixels where those would not outlive the call.
        is_transformed: Sources that are pixels are at the input size.
    """

    pixels: Tensor
    sources: Sequence[ImageLike]
    is_transformed: bool


def iter_pixels(
    images: Images,
    config: "ClassifierConfig",
    *,
    batch_size: int,
    normalized: bool,
    keep_sources: bool = True,
) -> Iterator[Batch]:
    """Yield the images in batches of at most ``batch_size``, at least one.

    Batches at the input size stay on their device; other images are transformed on the host, as in
    all stages.

    Args:
        images: See ``HeatmapDetector.__call__``.
        config: Transform, mean and std of the classifier.
        batch_size: Maximum number of images in a batch.
        normalized: The images are floats, normalized with the classifier's mean and std.
        keep_sources: Keep what the batches were made from; if False, ``sources`` are empty.

    Raises:
        UsageError: The type, dtype, shape or range is not supported, or there is no image.
        UnreadableImageError: A file cannot be read, or an image cannot be converted to RGB.
    """
    if not isinstance(batch_size, int | np.integer) or batch_size < 1:
        raise UsageError(f"batch_size must be at least 1, got {batch_size!r}.")
    if isinstance(images, np.ndarray) and images.dtype.kind in "OU":
        # paths or PIL images, such as a column of a data frame
        images = images.ravel().tolist()
    whole = _whole_batch(images, config, normalized=normalized)
    if whole is not None:
        for start in range(0, len(whole), batch_size):
            pixels = whole[start : start + batch_size]
            yield Batch(pixels, _to_host(pixels, config) if keep_sources else (), True)
        return
    # images of an iterator would not outlive the call otherwise
    is_transformed = normalized or isinstance(images, Iterator)
    rows, start = iter(_split(images)), 0
    while chunk := list(islice(rows, batch_size)):
        pixels = _to_batch(chunk, config, start, normalized=normalized)
        sources: Sequence[ImageLike] = ()
        if keep_sources:
            sources = chunk
            if is_transformed:
                # paths outlive it
                pairs = zip(chunk, _to_host(pixels, config), strict=True)
                sources = [item if source_name(item) else array for item, array in pairs]
        yield Batch(pixels, sources, is_transformed)
        start += len(chunk)
    if not start:
        raise UsageError(f"there is no image; {_EXPECTED}.")


def _to_batch(
    images: Sequence[ImageLike], config: "ClassifierConfig", start: int, *, normalized: bool
) -> Tensor:
    """Return the pixels of images of which the first is number ``start``."""
    if normalized:
        return torch.stack([_to_normalized(image, config) for image in images])
    arrays = [
        apply_transform(config.transform, _to_picture(image, config), _name(image, row))
        for row, image in enumerate(images, start)
    ]
    return torch.from_numpy(np.stack(arrays))


def source_name(image: ImageLike) -> str | None:
    """Return the path of an image; None if it is not in a file."""
    return os.fsdecode(image) if isinstance(image, str | os.PathLike) else None


def to_picture(image: ImageLike) -> Image.Image:
    """Return an image as an upright RGB PIL image of its own size.

    Raises:
        UsageError: The type, dtype or shape is not supported.
        UnreadableImageError: A file cannot be read.
    """
    return to_rgb(_to_picture(image))


def _whole_batch(images: Images, config: "ClassifierConfig", *, normalized: bool) -> Tensor | None:
    """Return ``(B, 3, H, W)`` at the input size, on its device; None for other images."""
    if not isinstance(images, Tensor | np.ndarray) or images.ndim != 4 or not len(images):
        return None
    if normalized:
        return _check_normalized(_to_tensor(images), config)
    _check_dtype(images, config)
    batch = _to_tensor(images)
    if batch.shape[3] in (1, 3):
        batch = batch.permute(0, 3, 1, 2)
    if batch.shape[1] not in (1, 3) or not config.transform.keeps(*batch.shape[2:]):
        return None
    return batch.expand(-1, 3, -1, -1)


def _split(images: Images) -> Iterable[ImageLike]:
    """Return the images as an iterable, not yet validated."""
    if isinstance(images, Tensor):
        # one copy from a GPU, not one per image
        images = images.cpu()
    if isinstance(images, Tensor | np.ndarray):
        return images if images.ndim == 4 else [images]
    if isinstance(images, Image.Image | str | os.PathLike):
        return [images]
    if isinstance(images, Iterable) and not isinstance(images, Mapping | bytes | bytearray):
        return images
    raise UsageError(f"{_EXPECTED}; got {type(images).__name__}.")


def _name(image: ImageLike, row: int) -> str:
    """Return the name of an image for messages."""
    return source_name(image) or f"image {row}"


def _to_tensor(array: NDArray[Any] | Tensor) -> Tensor:
    """Return an array as a tensor, without a copy where PyTorch allows it."""
    if isinstance(array, Tensor):
        return array.detach()
    is_usable = array.flags.writeable and all(stride >= 0 for stride in array.strides)
    return torch.from_numpy(array if is_usable else array.copy())


def _to_host(pixels: Tensor, config: "ClassifierConfig") -> list[NDArray[np.uint8]]:
    """Return the images of a batch as uint8 arrays ``(3, H, W)`` that share no memory with it."""
    if pixels.is_floating_point():
        pixels = (255 * _to_unit_range(pixels, config)).round().clamp(0, 255).to(torch.uint8)
    return list(np.array(pixels.detach().cpu().numpy()))


def _to_unit_range(batch: Tensor, config: "ClassifierConfig") -> Tensor:
    """Undo the normalization: pixels in [0, 1]."""
    mean, std = (
        torch.tensor(values, device=batch.device)[:, None, None]
        for values in (config.mean, config.std)
    )
    return batch * std + mean


def _check_dtype(image: NDArray[Any] | Tensor, config: "ClassifierConfig | None") -> None:
    """Raise UsageError if an array or tensor is not uint8."""
    if image.dtype in (np.uint8, torch.uint8):
        return
    is_float = "float" in str(image.dtype)
    hint = "convert to uint8 with values 0 to 255 first"
    if is_float and config is not None:
        hint = (
            f"if it is normalized with mean {config.mean} and std {config.std}, pass "
            "normalized=True; floats in [0, 1] are converted by (255 * images).round() and uint8"
        )
    raise UsageError(f"{_EXPECTED}; got {image.dtype}: {hint}.")


def _check_normalized(batch: Tensor, config: "ClassifierConfig") -> Tensor:
    """Return normalized images ``(..., 3, H, W)`` as float32, on their device.

    Raises:
        UsageError: The dtype, shape or range is not that of normalized images.
    """
    size = config.transform.size
    if not batch.is_floating_point():
        raise UsageError(
            f"normalized=True is for float images, got {batch.dtype}: leave it out, uint8 images "
            "are normalized by the detector."
        )
    if batch.shape[-3:] != (3, size, size):
        raise UsageError(
            f"with normalized=True images must be (3, {size}, {size}) or a batch of these, the "
            f"classifier's input size; got shape {tuple(batch.shape)}."
        )
    batch = batch.float()
    pixels = _to_unit_range(batch, config)
    low, high = float(pixels.min()), float(pixels.max())
    # also refuses NaN
    if not -_MAX_PIXEL <= low <= high <= _MAX_PIXEL:
        raise UsageError(
            f"these images are not normalized with mean {config.mean} and std {config.std}: their "
            f"pixels would be {low:.3g} to {high:.3g}, instead of 0 to 1."
        )
    return batch


def _to_normalized(image: ImageLike, config: "ClassifierConfig") -> Tensor:
    """Return one normalized image ``(3, H, W)`` as float32."""
    if not isinstance(image, Tensor | np.ndarray):
        raise UsageError(
            "with normalized=True images must be float arrays or tensors, got "
            f"{type(image).__name__}: leave it out, other images are normalized by the detector."
        )
    if image.ndim != 3:
        raise UsageError(
            "with normalized=True a list must have images (3, H, W), got one of shape "
            f"{tuple(image.shape)}: call the detector with each batch."
        )
    return _check_normalized(_to_tensor(image), config)


def _to_picture(image: ImageLike, config: "ClassifierConfig | None" = None) -> Image.Image:
    """Convert one image to a PIL image of any mode; ``config`` is for messages."""
    if isinstance(image, str | os.PathLike):
        # imported lazily: only needed for paths
        from ood_heatmap.source_folder import read_file

        path = Path(os.fsdecode(image))
        if path.is_dir():
            listed = f"sorted(Path({str(path)!r}).rglob('*.jpg'))"
            raise UsageError(f"{path} is a folder: pass its images, such as {listed}.")
        return read_file(path)[0]
    if isinstance(image, Image.Image):
        if 0 in image.size:
            raise UsageError(f"an image has no pixels: its size is {image.width} x {image.height}.")
        return image
    if not isinstance(image, Tensor | np.ndarray):
        raise UsageError(f"{_EXPECTED}; got {type(image).__name__} for one of them.")
    _check_dtype(image, config)
    array = image.detach().cpu().numpy() if isinstance(image, Tensor) else np.asarray(image)
    if array.ndim == 3 and array.shape[2] not in (1, 3) and array.shape[0] in (1, 3):
        array = array.transpose(1, 2, 0)
    if array.ndim == 4:
        raise UsageError(
            f"one of the images is a batch of shape {tuple(image.shape)}: call the detector with "
            "each batch, and join the results by Result.concatenate."
        )
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3)):
        raise UsageError(f"{_EXPECTED}; got shape {tuple(image.shape)} for one of them.")
    if array.size == 0:
        raise UsageError(f"an image has no pixels: its shape is {tuple(image.shape)}.")
    grey = array.ndim == 3 and array.shape[2] == 1
    return Image.fromarray(np.ascontiguousarray(array[:, :, 0] if grey else array))
