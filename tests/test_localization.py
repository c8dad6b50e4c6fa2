"""Pixel metrics against known values and against counting by hand, threshold by threshold."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ood_heatmap import localization as module
from ood_heatmap.localization import aupro, localization_metrics, pointing, resampled_metrics


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
    return higher / len(inside) / len(outside), area / limit, np.mean(hits)


def some_images(seed, levels, count=3, size=5):
    generator = np.random.default_rng(seed)
    masks = np.zeros((count, size, size), dtype=bool)
    for mask in masks:
        side = generator.integers(1, size)
        top, left = generator.integers(0, size - side + 1, 2)
        mask[top : top + side, left : left + side] = True
    strength = generator.integers(0, levels, masks.shape) + 0.7 * levels * masks
    return (strength / levels).astype(np.float32), masks


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 10**6), levels=st.sampled_from([1, 2, 3, 10, 1000]))
def test_all_figures_equal_those_counted_by_hand(seed, levels):
    strength, masks = some_images(seed, levels)
    found = localization_metrics(strength, masks)
    wanted = by_hand(strength, masks)
    np.testing.assert_allclose((found.pixel_auroc, found.aupro, found.pointing), wanted, atol=1e-9)


@pytest.mark.parametrize(
    ("sign", "wanted"), [(1, (1.0, 1.0, 1.0)), (-1, (0.0, 0.0, 0.0)), (0, (0.5, 0.15, 0.25))]
)
def test_perfect_inverted_and_constant_heatmaps(sign, wanted):
    masks = np.zeros((4, 8, 8), dtype=bool)
    masks[:, 2:6, 3:7] = True
    found = localization_metrics(sign * masks.astype(np.float32), masks)
    np.testing.assert_allclose((found.pixel_auroc, found.aupro, found.pointing), wanted)


def test_a_small_region_counts_as_much_as_a_large_one():
    masks = np.zeros((2, 10, 10), dtype=bool)
    masks[0, 0, 0] = masks[1, :8, :] = True
    strength = np.zeros(masks.shape)
    strength[0, 0, 0] = 1.0  # one region found without a false alarm, the other not at all
    # from half at a false positive rate of 0 up a straight line to 1 at 1
    assert aupro(strength, masks) == pytest.approx(0.5 + 0.5 * 0.15)
    assert aupro(strength, masks, limit=1.0) == pytest.approx(0.75)


def test_only_the_order_of_strengths_matters():
    strength, masks = some_images(0, 50)
    assert localization_metrics(strength, masks) == localization_metrics(strength**3 - 7, masks)


def test_pointing_of_ties_is_the_share_that_hits():
    masks = np.array([[[True, False], [False, False]]])
    assert pointing(np.array([[[1.0, 1.0], [0.0, 0.0]]]), masks) == 0.5


def test_images_without_a_patch_or_without_anything_else_are_refused():
    strength = np.zeros((2, 3, 3))
    masks = np.zeros((2, 3, 3), dtype=bool)
    masks[0, 0, 0] = True
    for wrong in (masks, ~masks, masks[:0]):
        with pytest.raises(ValueError, match="must have a patch"):
            localization_metrics(strength[: len(wrong)], wrong)
    with pytest.raises(ValueError, match="must be one"):
        localization_metrics(strength[:, :2], masks)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6), levels=st.sampled_from([1, 2, 3, 10, 1000]))
def test_resampled_figures_are_those_of_the_images_drawn(seed, levels):
    strength, masks = some_images(seed, levels)
    drawn = np.random.default_rng(seed).integers(0, 3, (4, 3))
    weights = np.stack([np.bincount(rows, minlength=3) for rows in drawn]).astype(np.float64)
    found = resampled_metrics(strength, masks, weights)
    for figures, rows in zip(found, drawn, strict=True):
        wanted = localization_metrics(strength[rows], masks[rows])
        np.testing.assert_allclose(
            figures, (wanted.pixel_auroc, wanted.aupro, wanted.pointing), atol=1e-9
        )


def test_many_levels_of_strength_cost_resampled_figures_little(monkeypatch):
    generator = np.random.default_rng(0)
    masks = np.zeros((20, 32, 32), dtype=bool)
    masks[:, 4:20, 8:24] = True
    strength = (generator.normal(size=masks.shape) + masks).astype(np.float32)
    wanted = localization_metrics(strength, masks)
    exact = (wanted.pixel_auroc, wanted.aupro, wanted.pointing)
    found = resampled_metrics(strength, masks, np.ones((1, 20)))[0]
    np.testing.assert_allclose(found, exact, atol=1e-4)
    assert tuple(found) != exact  # there were more levels
    monkeypatch.setattr(module, "_NUM_LEVELS", strength.size)
    found = resampled_metrics(strength, masks, np.ones((1, 20)))[0]
    np.testing.assert_allclose(found, exact, atol=1e-9)
