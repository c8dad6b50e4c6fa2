"""Heatmaps: the target, the loss, and the scores read off a heatmap."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# targets are stored as int16 multiples of this
SCALE = 1 / 255


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


def target_heatmap(stored: Tensor, *, signed: bool) -> Tensor:
    """Return the target of the decoder.

    Args:
        stored: ``(B, C, H, W)`` int16 differences in steps of 1/255; 0 for ID images.
        signed: Return the difference itself instead of its absolute value.

    Returns:
        ``(B, C, H, W)`` float32 in [-1, 1], or in [0, 1] if not signed.
    """
    target = stored.to(torch.float32) * SCALE
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
        stored: ``(B, C, H, W)`` int16 differences; 0 outside the region.
        power: 0 weights all images equally, 1 all regions, regardless of their size.

    Returns:
        ``(B,)`` float32: (pixels of the image / pixels of the region) ** power; 1 for ID images,
        which have no region.
    """
    share = (stored != 0).any(dim=1).float().mean(dim=(1, 2))
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
