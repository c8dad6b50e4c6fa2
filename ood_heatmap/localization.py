"""How well heatmaps tell where an image is OOD: pixel AUROC, AUPRO and pointing accuracy.

Every image has one region, the patch that was pasted into it. Strength: larger is more OOD.
"""

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import auc, roc_auc_score, roc_curve

Strength: TypeAlias = NDArray[np.floating[Any]]
Masks: TypeAlias = NDArray[np.bool_]
Float64: TypeAlias = NDArray[np.float64]
METRICS = ("pixel_auroc", "aupro", "pointing")
AUPRO_LIMIT = 0.3
NUM_LEVELS = 1024  # of strength that resampled figures tell apart


@dataclass(frozen=True)
class LocalizationMetrics:
    """The figures of some images; shares in [0, 1].

    Args:
        pixel_auroc: Area under the ROC curve of all pixels of all images; 0.5 by chance.
        aupro: Area under the per-region overlap, see ``aupro``; 0.15 by chance.
        pointing: Share of images whose strongest pixel lies in the patch; by chance the patch's
            share of the image.
    """

    pixel_auroc: float
    aupro: float
    pointing: float


def localization_metrics(strength: Strength, masks: Masks) -> LocalizationMetrics:
    """Return all figures.

    Args:
        strength: ``(B, H, W)`` finite, larger is more OOD.
        masks: ``(B, H, W)`` bool, where the patch is.

    Raises:
        ValueError: The shapes differ, an image has no patch or nothing else, or a strength is not
            finite.
    """
    if strength.shape != masks.shape or strength.ndim != 3:
        raise ValueError(f"strength {strength.shape} and masks {masks.shape} must be one (B, H, W)")
    shares = masks.mean(axis=(1, 2))
    if not len(masks) or shares.min() == 0 or shares.max() == 1:
        raise ValueError("every image must have a patch that leaves some of it free")
    return LocalizationMetrics(
        pixel_auroc=float(roc_auc_score(masks.ravel(), strength.ravel())),
        aupro=aupro(strength, masks),
        pointing=pointing(strength, masks),
    )


def aupro(strength: Strength, masks: Masks, limit: float = AUPRO_LIMIT) -> float:
    """Return the area under the per-region overlap up to a false positive rate, normalised to 1.

    At each threshold: the share of a region that is found, mean over regions, against the share of
    all pixels outside regions that are taken for one. A large region counts as much as a small one.

    Args:
        strength: ``(B, H, W)``.
        masks: ``(B, H, W)`` bool, one region in each image.
        limit: False positive rate up to which is integrated.

    Source: Bergmann et al., Uninformed Students, CVPR 2020.
    """
    # a true positive rate in which each region has the weight 1, spread over its pixels
    weights = np.where(masks, 1 / masks.sum(axis=(1, 2), keepdims=True), 1.0)
    fpr, overlap, _ = roc_curve(
        masks.ravel(), strength.ravel(), sample_weight=weights.ravel(), drop_intermediate=False
    )
    inside = fpr <= limit
    at_limit = np.interp(limit, fpr, overlap)
    return float(auc(np.r_[fpr[inside], limit], np.r_[overlap[inside], at_limit]) / limit)


def pointing(strength: Strength, masks: Masks) -> float:
    """Return the share of images whose strongest pixel lies in the patch.

    Where several pixels are strongest, the share of them that does: a constant heatmap gets what
    chance gets.

    Source: Zhang et al., Top-down Neural Attention by Excitation Backprop, ECCV 2016.
    """
    strongest = strength == strength.max(axis=(1, 2), keepdims=True)
    return float(np.mean((strongest & masks).sum(axis=(1, 2)) / strongest.sum(axis=(1, 2))))


def resampled_metrics(strength: Strength, masks: Masks, weights: Float64) -> Float64:
    """Return the figures of resampled images, ``(R, 3)`` in the order of ``METRICS``.

    The same as ``localization_metrics`` of the images that were drawn, but for strengths that are
    told apart to ``NUM_LEVELS`` levels where there are more.

    Args:
        strength: ``(B, H, W)``.
        masks: ``(B, H, W)`` bool, one region in each image.
        weights: ``(R, B)``, how often each image was drawn.
    """
    count = len(strength)
    level = levels_of(strength)
    size = int(level.max()) + 1
    place = (np.arange(count)[:, None, None] * size + level).ravel()  # image by image

    def histogram(shares: Float64) -> Float64:
        """Return the sum over an image's pixels of each level, strongest first, ``(R, levels)``."""
        each = np.bincount(place, shares.ravel(), count * size).reshape(count, size)
        drawn: Float64 = weights @ each[:, ::-1]
        return drawn

    inside, outside = histogram(masks.astype(np.float64)), histogram((~masks).astype(np.float64))
    overlap = histogram(masks / masks.sum(axis=(1, 2), keepdims=True))
    limits = (1.0, AUPRO_LIMIT)
    areas = [
        area_under(outside, found, limit)
        for found, limit in zip((inside, overlap), limits, strict=True)
    ]
    hits = np.array([pointing(strength[i : i + 1], masks[i : i + 1]) for i in range(count)])
    return np.stack([*areas, weights @ hits / weights.sum(axis=1)], axis=1)


def levels_of(strength: Strength) -> NDArray[np.int64]:
    """Return a whole number from 0 for each strength, in the same order."""
    values = np.unique(strength)
    if len(values) > NUM_LEVELS:  # as many pixels in each as ties allow
        values = np.unique(np.quantile(strength, np.arange(NUM_LEVELS) / NUM_LEVELS))
    return np.searchsorted(values, strength, side="right") - 1


def area_under(false: Float64, found: Float64, limit: float) -> Float64:
    """Return the area under curves up to a false positive rate, normalised to 1, ``(R,)``.

    Args:
        false: ``(R, levels)``, what is outside of each level, strongest first.
        found: ``(R, levels)``, what is inside.
        limit: False positive rate up to which is integrated.
    """
    x, y = (
        np.pad(np.cumsum(item, axis=1) / item.sum(axis=1, keepdims=True), ((0, 0), (1, 0)))
        for item in (false, found)
    )
    ends = np.minimum(x, limit)
    width, run = np.diff(ends, axis=1), np.diff(x, axis=1)
    share = np.divide(width, run, out=np.ones_like(run), where=run > 0)
    heights = y[:, :-1] + np.diff(y, axis=1) * share / 2
    area: Float64 = (width * heights).sum(axis=1) / limit
    return area
