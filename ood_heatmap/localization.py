"""Localization metrics of heatmaps: pixel AUROC, AUPRO and pointing accuracy.

Every image has one OOD region, the pasted patch. Pixel scores: larger is more OOD.
"""

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import auc, roc_auc_score, roc_curve

_Scores: TypeAlias = NDArray[np.floating[Any]]
_Masks: TypeAlias = NDArray[np.bool_]
_Float64: TypeAlias = NDArray[np.float64]
METRICS = ("pixel_auroc", "aupro", "pointing")
_AUPRO_LIMIT = 0.3
# levels that resampled metrics quantize pixel scores to
_NUM_LEVELS = 1024


@dataclass(frozen=True)
class LocalizationMetrics:
    """Localization metrics of a set of images, in [0, 1].

    Args:
        pixel_auroc: Area under the ROC curve over all pixels of all images; 0.5 by chance.
        aupro: Area under the per-region overlap curve, see ``aupro``; 0.15 by chance.
        pointing: Share of images whose highest pixel score lies in the patch; by chance, the
            patch's share of the image area.
    """

    pixel_auroc: float
    aupro: float
    pointing: float


def localization_metrics(pixel_scores: _Scores, masks: _Masks) -> LocalizationMetrics:
    """Compute all localization metrics.

    Args:
        pixel_scores: ``(B, H, W)`` finite, larger is more OOD.
        masks: ``(B, H, W)`` bool, True inside the patch.

    Raises:
        ValueError: The shapes differ, a patch is empty or covers the whole image, or a pixel score
            is not finite.
    """
    if pixel_scores.shape != masks.shape or pixel_scores.ndim != 3:
        raise ValueError(
            f"pixel_scores {pixel_scores.shape} and masks {masks.shape} must be one (B, H, W)"
        )
    shares = masks.mean(axis=(1, 2))
    if not len(masks) or shares.min() == 0 or shares.max() == 1:
        raise ValueError("every image must have a patch that does not cover all of it")
    return LocalizationMetrics(
        pixel_auroc=float(roc_auc_score(masks.ravel(), pixel_scores.ravel())),
        aupro=aupro(pixel_scores, masks),
        pointing=pointing(pixel_scores, masks),
    )


def aupro(pixel_scores: _Scores, masks: _Masks, limit: float = _AUPRO_LIMIT) -> float:
    """Compute the normalised area under the per-region overlap curve up to a false positive rate.

    The curve plots, over all thresholds, the mean share of a region that is above the threshold
    against the false positive rate of the pixels outside regions. Large and small regions have the
    same weight.

    Args:
        pixel_scores: ``(B, H, W)``.
        masks: ``(B, H, W)`` bool, one region per image.
        limit: Upper limit of integration, a false positive rate.

    Source: Bergmann et al., Uninformed Students, CVPR 2020.
    """
    # a weighted true positive rate: each region has weight 1, spread evenly over its pixels
    weights = np.where(masks, 1 / masks.sum(axis=(1, 2), keepdims=True), 1.0)
    fpr, overlap, _ = roc_curve(
        masks.ravel(), pixel_scores.ravel(), sample_weight=weights.ravel(), drop_intermediate=False
    )
    inside = fpr <= limit
    at_limit = np.interp(limit, fpr, overlap)
    return float(auc(np.r_[fpr[inside], limit], np.r_[overlap[inside], at_limit]) / limit)


def pointing(pixel_scores: _Scores, masks: _Masks) -> float:
    """Compute the share of images whose highest pixel score lies in the patch.

    Ties count by the share of tied pixels in the patch, so a constant heatmap scores as chance.

    Source: Zhang et al., Top-down Neural Attention by Excitation Backprop, ECCV 2016.
    """
    highest = pixel_scores == pixel_scores.max(axis=(1, 2), keepdims=True)
    return float(np.mean((highest & masks).sum(axis=(1, 2)) / highest.sum(axis=(1, 2))))


def resampled_metrics(pixel_scores: _Scores, masks: _Masks, weights: _Float64) -> _Float64:
    """Compute the metrics of bootstrap resamples, ``(R, 3)`` in the order of ``METRICS``.

    Equal to ``localization_metrics`` of the drawn images, except that pixel scores are quantized to
    ``_NUM_LEVELS`` levels if they have more distinct values.

    Args:
        pixel_scores: ``(B, H, W)``.
        masks: ``(B, H, W)`` bool, one region per image.
        weights: ``(R, B)``, how often each image was drawn.
    """
    num_images = len(pixel_scores)
    level = _quantize(pixel_scores)
    num_levels = int(level.max()) + 1
    # flat index into a table with one row of levels per image
    cell = (np.arange(num_images)[:, None, None] * num_levels + level).ravel()

    def histogram(pixel_weights: _Float64) -> _Float64:
        """Return the weight of the pixels at each level, highest first, ``(R, levels)``."""
        per_image = np.bincount(cell, pixel_weights.ravel(), num_images * num_levels)
        resampled: _Float64 = weights @ per_image.reshape(num_images, num_levels)[:, ::-1]
        return resampled

    inside, outside = histogram(masks.astype(np.float64)), histogram((~masks).astype(np.float64))
    overlap = histogram(masks / masks.sum(axis=(1, 2), keepdims=True))
    areas = [
        _area_under_curve(outside, inside, 1.0),
        _area_under_curve(outside, overlap, _AUPRO_LIMIT),
    ]
    hits = np.array(
        [pointing(pixel_scores[i : i + 1], masks[i : i + 1]) for i in range(num_images)]
    )
    return np.stack([*areas, weights @ hits / weights.sum(axis=1)], axis=1)


def _quantize(pixel_scores: _Scores) -> NDArray[np.int64]:
    """Map pixel scores to integer levels from 0, preserving their order."""
    values = np.unique(pixel_scores)
    # quantiles: as many pixels in each level as ties allow
    if len(values) > _NUM_LEVELS:
        values = np.unique(np.quantile(pixel_scores, np.arange(_NUM_LEVELS) / _NUM_LEVELS))
    return np.searchsorted(values, pixel_scores, side="right") - 1


def _area_under_curve(negative: _Float64, positive: _Float64, limit: float) -> _Float64:
    """Compute the area under ROC curves up to a false positive rate, normalised to 1, ``(R,)``.

    Args:
        negative: ``(R, levels)`` weight of the negative pixels at each level, highest level first.
        positive: ``(R, levels)`` weight of the positive pixels.
        limit: Upper limit of integration, a false positive rate.
    """
    x, y = (
        np.pad(np.cumsum(values, axis=1) / values.sum(axis=1, keepdims=True), ((0, 0), (1, 0)))
        for values in (negative, positive)
    )
    ends = np.minimum(x, limit)
    width, run = np.diff(ends, axis=1), np.diff(x, axis=1)
    # the share of a segment that lies below the limit
    share = np.divide(width, run, out=np.ones_like(run), where=run > 0)
    heights = y[:, :-1] + np.diff(y, axis=1) * share / 2
    area: _Float64 = (width * heights).sum(axis=1) / limit
    return area
