"""Target, loss and score against their formulas, written out."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ood_heatmap.heatmap import (
    averaged_parts,
    default_size,
    difference,
    pixel_score,
    region_weight,
    score,
    stored_target,
    target_heatmap,
    weighted_squared_error,
)

PAIRS = hnp.arrays(np.uint8, (2, 2, 3, 4, 4))


@given(pair=PAIRS)
def test_the_ood_image_comes_back_without_loss(pair):
    nearest, image = pair
    stored = difference(nearest, image)
    assert stored.dtype == np.int16
    np.testing.assert_array_equal(nearest - stored, image)
    heatmap = target_heatmap(torch.from_numpy(stored), signed=True).numpy().astype(np.float64)
    np.testing.assert_array_equal(np.rint(nearest - 255 * heatmap), image)
    assert np.abs(heatmap).max() <= 1


@pytest.mark.parametrize(("size", "averaged"), [(8, 4), (12, 4), (9, 5), (31, 4)])
def test_averages_are_those_of_the_pixels_that_each_of_them_covers(size, averaged):
    generator = np.random.default_rng(0)
    nearest, images = generator.integers(0, 256, (2, 40, 3, size, size)).astype(np.uint8)
    found = averaged_parts(nearest, images, averaged)
    assert found.dtype == np.uint8
    change = nearest.astype(np.int64) - images
    for row in range(averaged):
        for column in range(averaged):
            rows, columns = (
                slice(math.floor(i * size / averaged), math.ceil((i + 1) * size / averaged))
                for i in (row, column)
            )
            covered = change[:, :, rows, columns]
            for part, sign in enumerate((1, -1)):
                wanted = np.maximum(sign * covered, 0).mean(axis=(2, 3))
                # NumPy and Python round halves to even
                np.testing.assert_array_equal(found[:, part, :, row, column], np.rint(wanted))


def test_a_stored_target_is_exact_at_the_images_size_and_averaged_below():
    nearest, images = np.random.default_rng(0).integers(0, 256, (2, 5, 3, 8, 8)).astype(np.uint8)
    np.testing.assert_array_equal(stored_target(nearest, images, 8), difference(nearest, images))
    np.testing.assert_array_equal(
        stored_target(nearest, images, 4), averaged_parts(nearest, images, 4)
    )


def test_averages_give_the_signed_and_the_absolute_average():
    # one pixel of four 200 brighter, one 100 darker
    nearest, images = np.full((2, 1, 3, 4, 4), 100, np.uint8)
    images[..., ::2, ::2], images[..., 1::2, 1::2] = 0, 200
    nearest[..., ::2, ::2] = 200
    stored = torch.from_numpy(averaged_parts(nearest, images, 2))
    for signed, wanted in ((True, 100 / 4), (False, 300 / 4)):
        target = target_heatmap(stored, signed=signed)
        assert target.shape == (1, 3, 2, 2)
        torch.testing.assert_close(target, torch.full((1, 3, 2, 2), wanted / 255))


@pytest.mark.parametrize(
    ("image_size", "size"),
    [(16, 16), (32, 32), (64, 64), (65, 33), (128, 64), (224, 56), (299, 38), (384, 48)],
)
def test_default_sizes(image_size, size):
    assert default_size(image_size) == size


def test_a_target_points_from_the_ood_image_to_the_id_image():
    white, black = np.full((1, 3, 2, 2), 255, np.uint8), np.zeros((1, 3, 2, 2), np.uint8)
    stored = torch.from_numpy(difference(white, black))
    assert target_heatmap(stored, signed=True).unique().tolist() == [1.0]
    assert target_heatmap(-stored, signed=True).unique().tolist() == [-1.0]
    assert target_heatmap(-stored, signed=False).unique().tolist() == [1.0]


@pytest.mark.parametrize(
    "wrong", [np.zeros((1, 3, 4, 4), np.uint8), np.zeros((2, 3, 4, 4), np.int16)]
)
def test_pairs_that_would_broadcast_are_refused(wrong):
    with pytest.raises(ValueError, match="both must be uint8 of the same shape"):
        difference(wrong, np.zeros((2, 3, 4, 4), np.uint8))


@given(seed=st.integers(0, 99), batch=st.integers(1, 4))
def test_the_loss_is_the_sum_over_pixels_and_the_mean_over_images(seed, batch):
    generator = np.random.default_rng(seed)
    heatmap, target = generator.uniform(-1, 1, (2, batch, 3, 2, 2))
    total = 0.0
    for i in range(batch):
        for found, wanted in zip(heatmap[i].flat, target[i].flat, strict=True):
            total += (1 + 5 * abs(wanted)) * (found - wanted) ** 2
    loss = weighted_squared_error(torch.tensor(heatmap).float(), torch.tensor(target).float())
    np.testing.assert_allclose(loss.item(), total / batch, rtol=1e-5)


def test_a_small_region_counts_more_and_an_id_image_as_one():
    stored = torch.zeros(4, 3, 8, 8, dtype=torch.int16)
    stored[0, 1, :4, :4] = -7  # a quarter of a quarter: one channel is enough
    stored[1, :, 2:3, 2:6] = 9
    stored[2] = 1
    assert region_weight(stored, 0.5).tolist() == [2, 4, 1, 1]
    assert region_weight(stored, 1.0).tolist() == [4, 16, 1, 1]
    assert region_weight(stored, 0.0).tolist() == [1, 1, 1, 1]
    heatmap, target = torch.rand(4, 3, 8, 8), torch.rand(4, 3, 8, 8)
    weight = torch.tensor([2.0, 4.0, 1.0, 0.0])
    each = [weighted_squared_error(heatmap[i : i + 1], target[i : i + 1]) for i in range(4)]
    found = weighted_squared_error(heatmap, target, weight)
    torch.testing.assert_close(found, (2 * each[0] + 4 * each[1] + each[2]) / 4)


def test_a_loss_of_two_shapes_is_refused():
    with pytest.raises(ValueError, match="differ"):
        weighted_squared_error(torch.zeros(2, 3, 4, 4), torch.zeros(1, 3, 4, 4))


def test_the_score_is_the_mean_over_pixels_of_the_strongest_channel():
    heatmap = torch.zeros(2, 3, 2, 2)
    heatmap[0, :, 0, 0] = torch.tensor([0.1, -0.8, 0.3])
    heatmap[0, 2, 1, 1] = 0.4
    np.testing.assert_allclose(score(heatmap).numpy(), [(0.8 + 0.4) / 4, 0], rtol=1e-6)
    np.testing.assert_allclose(pixel_score(heatmap)[0].numpy(), [[0.8, 0], [0, 0.4]], rtol=1e-6)
