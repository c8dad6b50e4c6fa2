"""What a heatmap is: its target, the loss that teaches it, and the score that is read off it."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SCALE = 1 / 255  # a stored target is int16 steps of this


def difference(nearest: NDArray[np.uint8], images: NDArray[np.uint8]) -> NDArray[np.int16]:
    """Return the change from OOD images to their nearest ID images, in steps of 1/255.

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
            f"both must be uint8 of one shape, got {nearest.dtype} {nearest.shape} and "
            f"{images.dtype} {images.shape}"
        )
    return np.subtract(nearest, images, dtype=np.int16)


def target_heatmap(stored: Tensor, *, signed: bool) -> Tensor:
    """Return what the decoder should return.

    Args:
        stored: ``(B, C, H, W)`` int16 differences in steps of 1/255; 0 for ID images.
        signed: The difference itself; otherwise its absolute value.

    Returns:
        ``(B, C, H, W)`` float32 in [-1, 1], or [0, 1] when not signed.
    """
    target = stored.to(torch.float32) * SCALE
    return target if signed else target.abs()


def weighted_squared_error(heatmap: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return the mean over the batch of ``sum(w (heatmap - target)^2)``, ``w = 1 + 5 |target|``.

    Args:
        heatmap: ``(B, C, H, W)`` from the decoder.
        target: Same shape.
        weight: ``(B,)``, how much each image counts; 1 when None.

    Raises:
        ValueError: The shapes differ.
    """
    if heatmap.shape != target.shape:
        raise ValueError(f"heatmap {tuple(heatmap.shape)} and target {tuple(target.shape)} differ")
    each = ((1 + 5 * target.abs()) * (heatmap - target).square()).sum(dim=(1, 2, 3))
    return each.mean() if weight is None else (weight * each).mean()


def region_weight(stored: Tensor, power: float) -> Tensor:
    """Return how much each image counts in the loss: the more, the smaller its OOD region.

    A patch has few pixels, and would hardly count beside an image that is OOD all over, whose
    every pixel has an error.

    Args:
        stored: ``(B, C, H, W)`` int16 differences; 0 outside the region.
        power: 0 for the same weight, 1 for the same of each region, whatever its size.

    Returns:
        ``(B,)`` float32: (pixels of the image / pixels of the region) to this power; 1 for ID
        images, which have no region.
    """
    share = (stored != 0).any(dim=1).float().mean(dim=(1, 2))
    return torch.where(share > 0, share, 1.0).pow(-power)


def score(heatmap: Tensor) -> Tensor:
    """Return the mean over pixels of the maximum over channels of ``|heatmap|``.

    Larger is more OOD.

    Args:
        heatmap: ``(B, C, H, W)``.

    Returns:
        ``(B,)`` float32 in [0, 1].
    """
    return strength(heatmap).mean(dim=(1, 2))


def strength(heatmap: Tensor) -> Tensor:
    """Return how OOD each pixel is, ``(B, H, W)`` float32 in [0, 1].

    The maximum over channels of ``|heatmap|``.
    """
    return heatmap.float().abs().amax(dim=1)
