"""Localization metrics of heatmaps: pixel AUROC, shuffled AUROC, AUPRO and pointing accuracy.

Every image has one OOD region, the pasted patch. Pixel scores: larger is more OOD.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

_Scores: TypeAlias = NDArray[np.floating[Any]]
_Masks: TypeAlias = NDArray[np.bool_]
_Float64: TypeAlias = NDArray[np.float64]
# weights of pixels (B, H, W) to their sums in G groups of images, (G, levels), lowest level first
_Histogram: TypeAlias = Callable[[_Float64], _Float64]
METRICS = ("pixel_auroc", "shuffled_auroc", "aupro", "pointing")
_AUPRO_LIMIT = 0.3
# levels that resampled metrics quantize pixel scores to
_NUM_LEVELS = 256


@dataclass(frozen=True)
class LocalizationMetrics:
    """Localization metrics of a set of images, in [0, 1].

    Args:
        pixel_auroc: Area under the ROC curve over all pixels of all images; 0.5 by chance.
        shuffled_auroc: The same where patch and background have the same distribution of
            locations, see ``location_weights``; 0.5 for scores that depend on the location only.
        aupro: Normalised area under the per-region overlap curve up to a false positive rate of
            0.3; 0.15 by chance. The curve plots, over all thresholds, the mean share of a region
            that is above the threshold against the false positive rate of the pixels outside
            regions. Large and small regions have the same weight.
        pointing: Share of images whose highest pixel score lies in the patch; by chance, the
            patch's share of the image area. Ties count by the share of tied pixels in the patch.

    Source: Zhang et al., SUN: A Bayesian Framework for Saliency, Journal of Vision 2008 (after
    whose shuffled AUROC negatives are taken where other images have their patch); Bergmann et al.,
    Uninformed Students, CVPR 2020 (AUPRO); Zhang et al., Top-down Neural Attention by Excitation
    Backprop, ECCV 2016 (pointing).
    """

    pixel_auroc: float
    shuffled_auroc: float
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
    if not np.isfinite(pixel_scores).all():
        raise ValueError("pixel scores must be finite")
    values, level = np.unique(pixel_scores, return_inverse=True)

    def histogram(pixel_weights: _Float64) -> _Float64:
        summed = np.bincount(level.ravel(), pixel_weights.ravel(), len(values))
        return summed[None].astype(np.float64, copy=False)

    auroc, shuffled, aupro = _areas(masks, histogram, np.ones((1, 1)))[0].tolist()
    return LocalizationMetrics(auroc, shuffled, aupro, float(_hits(pixel_scores, masks).mean()))


def location_weights(masks: _Masks) -> _Float64:
    """Return weights of pixels that give patch and background the same distribution of locations.

    At a location where ``c`` of ``B`` images have their patch, a pixel of a patch counts 1 and one
    of the background ``c / (B - c)``: the background counts only where other images have their
    patch, and as much as they. Where all images have it, nothing can be compared: 0.

    Args:
        masks: ``(B, H, W)`` bool.

    Returns:
        ``(B, H, W)`` float64.
    """
    with_patch = masks.sum(axis=0)
    without = len(masks) - with_patch
    weights: _Float64 = np.where(masks, without > 0, with_patch / np.maximum(without, 1))
    return weights


def resampled_metrics(pixel_scores: _Scores, masks: _Masks, weights: _Float64) -> _Float64:
    """Compute the metrics of bootstrap resamples, ``(R, 4)`` in the order of ``METRICS``.

    Equal to ``localization_metrics`` of the drawn images, except that pixel scores are quantized to
    ``_NUM_LEVELS`` levels if they have more distinct values, and that the weights of locations are
    those of all images.

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
        summed = np.bincount(cell, pixel_weights.ravel(), num_images * num_levels)
        return summed.reshape(num_images, num_levels).astype(np.float64, copy=False)

    hits = weights @ _hits(pixel_scores, masks) / weights.sum(axis=1)
    return np.column_stack([_areas(masks, histogram, weights), hits])


def _areas(masks: _Masks, histogram: _Histogram, weights: _Float64) -> _Float64:
    """Return pixel AUROC, shuffled AUROC and AUPRO, ``(R, 3)``.

    Args:
        masks: ``(B, H, W)`` bool.
        histogram: Sums the weights of pixels in G groups of images.
        weights: ``(R, G)``, how often each group counts.
    """
    inside, outside = masks.astype(np.float64), histogram((~masks).astype(np.float64))
    located = location_weights(masks)
    # a weighted true positive rate: each region has weight 1, spread evenly over its pixels
    overlap = histogram(inside / masks.sum(axis=(1, 2), keepdims=True))
    areas = [
        _auroc(histogram(inside), outside, weights),
        _auroc(histogram(located * masks), histogram(located * ~masks), weights),
        _area_up_to_limit(weights @ overlap, weights @ outside),
    ]
    return np.stack(areas, axis=1)


def _auroc(positive: _Float64, negative: _Float64, weights: _Float64) -> _Float64:
    """Return the share of pairs of a positive and a lower negative pixel, ``(R,)``; ties are half.

    Pairs are counted once for each pair of groups, and not for each resample.

    Args:
        positive: ``(G, levels)`` weight of the positive pixels at each level, lowest first.
        negative: Same shape, weight of the negative pixels.
        weights: ``(R, G)``, how often each group counts.

    Returns:
        0.5 where there is no pair.
    """
    ordered = positive @ (negative.cumsum(axis=1) - negative / 2).T
    num_ordered = ((weights @ ordered) * weights).sum(axis=1)
    num_pairs = (weights @ positive.sum(axis=1)) * (weights @ negative.sum(axis=1))
    auroc = np.full(len(weights), 0.5)
    np.divide(num_ordered, num_pairs, out=auroc, where=num_pairs > 0)
    return auroc


def _hits(pixel_scores: _Scores, masks: _Masks) -> _Float64:
    """Return of each image which share of its highest pixel scores lies in the patch, ``(B,)``."""
    highest = pixel_scores == pixel_scores.max(axis=(1, 2), keepdims=True)
    hits: _Float64 = (highest & masks).sum(axis=(1, 2)) / highest.sum(axis=(1, 2))
    return hits


def _quantize(pixel_scores: _Scores) -> NDArray[np.int64]:
    """Map pixel scores to integer levels from 0, preserving their order."""
    values = np.unique(pixel_scores)
    # quantiles: as many pixels in each level as ties allow
    if len(values) > _NUM_LEVELS:
        values = np.unique(np.quantile(pixel_scores, np.arange(_NUM_LEVELS) / _NUM_LEVELS))
    return np.searchsorted(values, pixel_scores, side="right") - 1


def _area_up_to_limit(positive: _Float64, negative: _Float64) -> _Float64:
    """Compute the area under ROC curves up to a false positive rate of 0.3, normalised to 1.

    Args:
        positive: ``(R, levels)`` weight of the positive pixels at each level, lowest first.
        negative: Same shape, weight of the negative pixels.

    Returns:
        ``(R,)``.
    """
    x, y = (
        np.pad(
            np.cumsum(values[:, ::-1], axis=1) / values.sum(axis=1, keepdims=True), ((0, 0), (1, 0))
        )
        for values in (negative, positive)
    )
    width, run = np.diff(np.minimum(x, _AUPRO_LIMIT), axis=1), np.diff(x, axis=1)
    # the share of a segment that lies below the limit
    share = np.divide(width, run, out=np.ones_like(run), where=run > 0)
    heights = y[:, :-1] + np.diff(y, axis=1) * share / 2
    area: _Float64 = (width * heights).sum(axis=1) / _AUPRO_LIMIT
    return area
