"""Pixel metrics against sklearn, and against counting by hand, threshold by threshold."""

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from ood_heatmap import localization as module
from ood_heatmap.localization import (
    METRICS,
    LocalizationMetrics,
    localization_metrics,
    location_weights,
    resampled_metrics,
)


def values_of(metrics: LocalizationMetrics) -> list[float]:
    return [getattr(metrics, name) for name in METRICS]


def shuffled_by_hand(strength, masks):
    """Return the share of pairs of pixels in order, counted pair by pair.

    A positive is a pixel of a patch; a negative is a pixel outside the patch of its image, where
    other images have theirs. At a place, all negatives together count as much as all positives.
    """
    positives, negatives = [], []
    for place in np.ndindex(masks.shape[1:]):
        here = [image for image in range(len(masks)) if masks[image][place]]
        elsewhere = [image for image in range(len(masks)) if not masks[image][place]]
        if here and elsewhere:
            share = Fraction(len(here), len(elsewhere))
            positives += [(strength[image][place], Fraction(1)) for image in here]
            negatives += [(strength[image][place], share) for image in elsewhere]
    total = sum(share for _, share in positives) * sum(share for _, share in negatives)
    ordered = Fraction(0)
    for patch, share in positives:
        for background, other_share in negatives:
            half_points = 2 * int(patch > background) + int(patch == background)
            ordered += share * other_share * half_points / 2
    return float(ordered / total) if total else 0.5


def by_hand(strength, masks, limit=0.3):
    """Return the metrics by counting: pairs of pixels, and every threshold in turn."""
    inside, outside = strength[masks], strength[~masks]
    higher = (inside[:, None] > outside).sum() + 0.5 * (inside[:, None] == outside).sum()
    points = [(0.0, 0.0)]
    for threshold in np.unique(strength)[::-1]:
        found = strength >= threshold
        overlap = np.mean([found[i][masks[i]].mean() for i in range(len(masks))])
        points.append((found[~masks].mean(), overlap))
    area = 0.0
    for (left, low), (right, high) in pairwise(points):
        if right > left and left < limit:
            end = min(right, limit)
            at_end = low + (high - low) * (end - left) / (right - left)
            area += (end - left) * (low + at_end) / 2
    hits = []
    for image, mask in zip(strength, masks, strict=True):
        places = [mask[place] for place in np.ndindex(image.shape) if image[place] == image.max()]
        hits.append(sum(places) / len(places))
    auroc = higher / len(inside) / len(outside)
    return auroc, shuffled_by_hand(strength, masks), area / limit, np.mean(hits)


def some_images(seed, levels, count=3, size=5):
    generator = np.random.default_rng(seed)
    masks = np.zeros((count, size, size), dtype=bool)
    for mask in masks:
        side = generator.integers(1, size)
        top, left = generator.integers(0, size - side + 1, 2)
        mask[top : top + side, left : left + side] = True
    strength = generator.integers(0, levels, masks.shape) + 0.7 * levels * masks
    return (strength / levels).astype(np.float32), masks


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6), levels=st.sampled_from([1, 2, 3, 10, 1000]))
def test_all_figures_equal_those_counted_by_hand(seed, levels):
    strength, masks = some_images(seed, levels)
    found = values_of(localization_metrics(strength, masks))
    np.testing.assert_allclose(found, by_hand(strength, masks), atol=1e-9)


def test_both_aurocs_are_those_of_sklearn():
    strength, masks = some_images(0, 100, count=30, size=20)
    found = localization_metrics(strength, masks)
    assert found.pixel_auroc == pytest.approx(roc_auc_score(masks.ravel(), strength.ravel()))
    weights = location_weights(masks).ravel()
    wanted = roc_auc_score(masks.ravel(), strength.ravel(), sample_weight=weights)
    assert found.shuffled_auroc == pytest.approx(wanted)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(2, 12))
def test_what_knows_only_the_place_is_at_chance_by_construction(seed, count):
    _, masks = some_images(seed, 2, count, size=6)
    prior = np.random.default_rng(seed).random((6, 6))
    found = localization_metrics(np.broadcast_to(prior, masks.shape), masks)
    assert found.shuffled_auroc == pytest.approx(0.5, abs=1e-12)


def test_a_centre_prior_is_above_chance_only_where_places_are_not_equal():
    _, masks = some_images(1, 2, count=200, size=16)
    offset = np.arange(16) - 7.5
    prior = np.broadcast_to(-np.hypot(offset[:, None], offset), masks.shape)
    found = localization_metrics(prior, masks)
    assert found.pixel_auroc > 0.65
    assert found.shuffled_auroc == pytest.approx(0.5, abs=1e-12)
    assert localization_metrics(masks.astype(float), masks).shuffled_auroc == 1


@pytest.mark.parametrize(
    ("sign", "wanted"),
    [(1, (1.0, 1.0, 1.0, 1.0)), (-1, (0.0, 0.0, 0.0, 0.0)), (0, (0.5, 0.5, 0.15, 0.25))],
)
def test_perfect_inverted_and_constant_heatmaps(sign, wanted):
    masks = np.zeros((4, 8, 8), dtype=bool)
    masks[:2, 2:6, 3:7] = masks[2:, :4, :4] = True
    found = values_of(localization_metrics(sign * masks.astype(np.float32), masks))
    np.testing.assert_allclose(found, wanted)


def test_patches_at_one_place_leave_nothing_to_compare():
    strength, masks = some_images(0, 50)
    masks[:] = masks[0]
    assert localization_metrics(strength, masks).shuffled_auroc == 0.5
    assert localization_metrics(strength, masks).pixel_auroc > 0.5


def test_a_small_region_counts_as_much_as_a_large_one():
    masks = np.zeros((2, 10, 10), dtype=bool)
    masks[0, 0, 0] = masks[1, :8, :] = True
    strength = np.zeros(masks.shape)
    strength[0, 0, 0] = 1.0  # one region found without a false alarm, the other not at all
    # from half at a false positive rate of 0 up a straight line to 1 at 1
    assert localization_metrics(strength, masks).aupro == pytest.approx(0.5 + 0.5 * 0.15)


def test_only_the_order_of_strengths_matters():
    strength, masks = some_images(0, 50)
    assert localization_metrics(strength, masks) == localization_metrics(strength**3 - 7, masks)


def test_pointing_of_ties_is_the_share_that_hits():
    masks = np.array([[[True, False], [False, False]]])
    assert localization_metrics(np.array([[[1.0, 1.0], [0.0, 0.0]]]), masks).pointing == 0.5


def test_images_without_a_patch_or_without_anything_else_are_refused():
    strength = np.zeros((2, 3, 3))
    masks = np.zeros((2, 3, 3), dtype=bool)
    masks[0, 0, 0] = True
    for wrong in (masks, ~masks, masks[:0]):
        with pytest.raises(ValueError, match="must have a patch"):
            localization_metrics(strength[: len(wrong)], wrong)
    with pytest.raises(ValueError, match="must be one"):
        localization_metrics(strength[:, :2], masks)
    with pytest.raises(ValueError, match="must be finite"):
        localization_metrics(strength[:1] * np.nan, masks[:1])


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6), levels=st.sampled_from([1, 2, 3, 10, 1000]))
def test_resampled_figures_are_those_of_the_images_drawn(seed, levels):
    strength, masks = some_images(seed, levels)
    drawn = np.random.default_rng(seed).integers(0, 3, (4, 3))
    weights = np.stack([np.bincount(rows, minlength=3) for rows in drawn]).astype(np.float64)
    located = location_weights(masks)
    found = resampled_metrics(strength, masks, weights)
    for figures, rows in zip(found, drawn, strict=True):
        wanted = np.array(values_of(localization_metrics(strength[rows], masks[rows])))
        # the weights of places stay those of all images
        weight = located[rows].ravel()
        wanted[1] = 0.5
        if (weight[masks[rows].ravel()] > 0).any() and (weight[~masks[rows].ravel()] > 0).any():
            wanted[1] = roc_auc_score(
                masks[rows].ravel(), strength[rows].ravel(), sample_weight=weight
            )
        np.testing.assert_allclose(figures, wanted, atol=1e-9)


def test_many_levels_of_strength_cost_resampled_figures_little(monkeypatch):
    generator = np.random.default_rng(0)
    masks = np.zeros((20, 32, 32), dtype=bool)
    masks[:10, 4:20, 8:24] = masks[10:, 8:24, 8:24] = True
    strength = (generator.normal(size=masks.shape) + masks).astype(np.float32)
    exact = values_of(localization_metrics(strength, masks))
    found = resampled_metrics(strength, masks, np.ones((1, 20)))[0]
    np.testing.assert_allclose(found, exact, atol=2e-4)
    assert found.tolist() != exact  # there were more levels
    monkeypatch.setattr(module, "_NUM_LEVELS", strength.size)
    found = resampled_metrics(strength, masks, np.ones((1, 20)))[0]
    np.testing.assert_allclose(found, exact, atol=1e-9)
