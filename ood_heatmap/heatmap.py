"""Heatmaps: the target, the loss, and the scores read off a heatmap."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

# targets are stored as integer multiples of this
SCALE = 1 / 255
# largest side of heatmaps that are not asked for, in pixels
_MAX_SIZE = 64
# images averaged at once
_CHUNK = 32


def default_size(image_size: int) -> int:
    """Return the side of heatmaps: the image's, halved (rounded up) until it is at most 64.

    A feature map of 7x7 holds no more, and targets of 224 px would take 300 kB a row.
    """
    size = image_size
    while size > _MAX_SIZE:
        size = -(-size // 2)
    return size


def difference(nearest: NDArray[np.uint8], images: NDArray[np.uint8]) -> NDArray[np.int16]:
    """Return the differences ``nearest - images`` between nearest ID images and OOD images.

    Args:
        nearest: ``(B, C, H, W)`` uint8, the nearest ID image of each row.
        images: Same shape, the OOD images.

    Returns:
        ``(B, C, H, W)`` int16 in [-255, 255]; ``nearest - difference`` is ``images``, exactly.

    Raises:
        ValueError: The shapes or dtypes differ. Broadcasting would pair one ID image with every
            row.

    Source: Hornauer and Belagiannis, Heatmap-based Out-of-Distribution Detection, WACV 2023.
    """
    if nearest.shape != images.shape or not nearest.dtype == images.dtype == np.uint8:
        raise ValueError(
            f"both must be uint8 of the same shape, got {nearest.dtype} {nearest.shape} and "
            f"{images.dtype} {images.shape}"
        )
    return np.subtract(nearest, images, dtype=np.int16)


def stored_target(
    nearest: NDArray[np.uint8], images: NDArray[np.uint8], size: int
) -> NDArray[np.int16] | NDArray[np.uint8]:
    """Return what is stored as the targets of ``size`` pixels, for ``target_heatmap``.

    The difference at the images' size, its averaged parts at a smaller one.
    """
    if size == images.shape[-1]:
        return difference(nearest, images)
    return averaged_parts(nearest, images, size)


def averaged_parts(
    nearest: NDArray[np.uint8], images: NDArray[np.uint8], size: int
) -> NDArray[np.uint8]:
    """Return the area averages of the positive and negative part of ``nearest - images``.

    Their difference is the average of the difference, their sum that of its absolute value. Pixel i
    of an average is over pixels ``floor(i H / size)`` to ``ceil((i + 1) H / size) - 1``.

    Args:
        nearest: ``(B, C, H, W)`` uint8, H equal to W.
        images: Same shape.
        size: Side of the averages in pixels, at most H.

    Returns:
        ``(B, 2, C, size, size)`` uint8: average of max(d, 0) and of max(-d, 0), rounded, halves to
        even.

    Raises:
        ValueError: As ``difference``.
    """
    parts = np.empty((len(images), 2, images.shape[1], size, size), np.uint8)
    for start in range(0, len(images), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        values = torch.from_numpy(difference(nearest[chunk], images[chunk])).float()
        for part, sign in enumerate((1, -1)):
            # exact in any order: sums of integers below 2^24
            average = adaptive_avg_pool2d((sign * values).clamp_(min=0), size)
            parts[chunk, part] = average.round_()
    return parts


def target_heatmap(stored: Tensor, *, signed: bool) -> Tensor:
    """Return the target of the decoder.

    Args:
        stored: In steps of 1/255, 0 for ID images: ``(B, C, H, W)`` int16 differences, or ``(B, 2,
            C, H, W)`` uint8 averages, see ``averaged_parts``.
        signed: Return the difference itself instead of its absolute value.

    Returns:
        ``(B, C, H, W)`` float32 in [-1, 1], or in [0, 1] if not signed.
    """
    target = stored.to(torch.float32) * SCALE
    if stored.ndim == 5:
        positive, negative = target.unbind(1)
        return positive - negative if signed else positive + negative
    return target if signed else target.abs()


def weighted_squared_error(heatmap: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return the mean over the batch of ``sum(w (heatmap - target)^2)``, ``w = 1 + 5 |target|``.

    Args:
        heatmap: ``(B, C, H, W)`` from the decoder, in any floating-point dtype.
        target: Same shape, float32.
        weight: ``(B,)`` weight of each image; 1 if None.

    Raises:
        ValueError: The shapes differ.
    """
    if heatmap.shape != target.shape:
        raise ValueError(f"heatmap {tuple(heatmap.shape)} and target {tuple(target.shape)} differ")
    # bfloat16 heatmaps: the difference is float32, by type promotion
    each = ((1 + 5 * target.abs()) * (heatmap - target).square()).sum(dim=(1, 2, 3))
    return each.mean() if weight is None else (weight * each).mean()


def region_weight(stored: Tensor, power: float) -> Tensor:
    """Return the weight of each image in the loss, larger for a smaller OOD region.

    Without it, a small patch would contribute little compared with an image that is OOD everywhere.

    Args:
        stored: As for ``target_heatmap``; 0 outside the region.
        power: 0 weights all images equally, 1 all regions, regardless of their size.

    Returns:
        ``(B,)`` float32: (pixels of the image / pixels of the region) ** power; 1 for ID images,
        which have no region.
    """
    share = (stored != 0).flatten(1, -3).any(dim=1).float().mean(dim=(1, 2))
    return torch.where(share > 0, share, 1.0).pow(-power)


def score(heatmap: Tensor) -> Tensor:
    """Return the OOD score of images: the mean pixel score, larger is more OOD.

    Args:
        heatmap: ``(B, C, H, W)``.

    Returns:
        ``(B,)`` float32 in [0, 1].
    """
    return pixel_score(heatmap).mean(dim=(1, 2))


def pixel_score(heatmap: Tensor) -> Tensor:
    """Return the OOD score of pixels: the maximum over channels of ``|heatmap|``.

    Args:
        heatmap: ``(B, C, H, W)``.

    Returns:
        ``(B, H, W)`` float32 in [0, 1].
    """
    return heatmap.float().abs().amax(dim=1)
