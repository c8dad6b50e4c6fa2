"""Pasted patches: where they are, what is in them, and that a draw depends on nothing else."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.spatial import ConvexHull

from ood_heatmap.patches import (
    EDGES,
    MIXED,
    SHAPES,
    SIDES,
    SQUARES,
    Patch,
    PatchKinds,
    draw_patch,
    paste_all,
)

SIZES = st.integers(8, 40)
KINDS = st.builds(
    lambda side, shape, edges: PatchKinds((side,), (shape,), (edges,)),
    st.sampled_from(MIXED.sides),
    st.sampled_from(SHAPES),
    st.sampled_from(EDGES),
)


def images(count, size, seed=0):
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (count, 3, size, size)).astype(np.uint8)


def pasted_by_hand(id_image, ood_image, patch):
    """Return the same pixel by pixel."""
    result = id_image.copy()
    for (down, right), opacity in np.ndenumerate(patch.opacity):
        place = (slice(None), patch.destination[0] + down, patch.destination[1] + right)
        taken = ood_image[:, patch.source[0] + down, patch.source[1] + right].astype(float)
        result[place] = np.rint(id_image[place] + float(opacity) * (taken - id_image[place]))
    return result


def in_bounding_box(mask):
    down, right = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return mask[down[0] : down[-1] + 1, right[0] : right[-1] + 1]


@given(size=SIZES, seed=st.integers(0, 9), row=st.integers(0, 10**9), kinds=KINDS)
def test_a_patch_lies_inside_both_images_in_its_bounding_box(size, seed, row, kinds):
    patch = draw_patch(size, seed, row, kinds)
    for corner in (patch.source, patch.destination):
        for start, length in zip(corner, patch.opacity.shape, strict=True):
            assert 0 <= start <= size - length
    assert in_bounding_box(patch.mask(size)).shape == patch.opacity.shape
    assert patch.opacity.dtype == np.float32
    again = draw_patch(size, seed, row, kinds)
    assert (again.source, again.destination) == (patch.source, patch.destination)
    np.testing.assert_array_equal(again.opacity, patch.opacity)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", MIXED.sides)
@pytest.mark.parametrize("size", [32, 112])
def test_every_shape_has_the_area_of_the_square(shape, side, size):
    """Pixels whose distance is equal are all inside: of an ellipse four at most."""
    for row in range(20):
        mask = draw_patch(size, 0, row, PatchKinds((side,), (shape,), ("hard",))).mask(size)
        assert 0 <= mask.sum() - round(side * size) ** 2 <= 3


@given(row=st.integers(0, 1000), side=st.sampled_from(SIDES))
def test_an_ellipse_has_the_moments_of_one(row, side):
    """Its second moments give half axes whose ellipse has the same area and covers it."""
    mask = draw_patch(64, 0, row, PatchKinds((side,), ("ellipse",), ("hard",))).mask(64)
    points = np.argwhere(mask).astype(float)
    offset = points - points.mean(axis=0)
    covariance = offset.T @ offset / len(points)
    half_axes = 2 * np.sqrt(np.linalg.eigvalsh(covariance))
    if not mask[[0, -1]].any() and not mask[:, [0, -1]].any():
        assert np.pi * half_axes.prod() == pytest.approx(len(points), rel=0.05)
    distance = np.einsum("ni,ij,nj->n", offset, np.linalg.inv(covariance), offset)
    assert distance.max() == pytest.approx(4, rel=0.15)
    assert 0.99 <= half_axes[1] / half_axes[0] <= 2.75


def corners_of(mask):
    """Return the corners of the pixels of a mask."""
    return (np.argwhere(mask)[:, None] + [(0, 0), (0, 1), (1, 0), (1, 1)]).reshape(-1, 2)


def test_a_blob_is_irregular_and_mostly_in_one_piece():
    kinds = PatchKinds((0.5,), ("blob",), ("hard",))
    masks = [draw_patch(64, 0, row, kinds).mask(64) for row in range(100)]
    largest = [np.bincount(ndimage.label(mask)[0].ravel())[1:].max() / mask.sum() for mask in masks]
    assert np.mean(largest) > 0.95
    assert min(largest) > 0.5
    # a square or an ellipse fills its convex hull
    filled = [mask.sum() / ConvexHull(corners_of(mask)).volume for mask in masks]
    assert np.mean(filled) < 0.85
    squares = PatchKinds((0.5,), ("square",), ("hard",))
    assert ConvexHull(corners_of(draw_patch(64, 0, 0, squares).mask(64))).volume == 32**2


@given(size=SIZES, row=st.integers(0, 1000), kinds=KINDS)
def test_blended_edges_ramp_with_the_distance_from_outside(size, row, kinds):
    kinds = PatchKinds(kinds.sides, kinds.shapes, ("blended",))
    patch = draw_patch(size, 0, row, kinds)
    mask = np.pad(in_bounding_box(patch.mask(size)), 1)
    depth = ndimage.distance_transform_cdt(mask, "chessboard")[1:-1, 1:-1]
    ramp = round(max(1, round(kinds.sides[0] * size)) / 4)
    steps = np.minimum(depth, ramp + 1)
    np.testing.assert_allclose(patch.opacity, steps / steps.max(), rtol=1e-6)


def test_translucent_patches_have_one_opacity_between_a_third_and_all():
    kinds = PatchKinds(edges=("translucent",))
    values = [np.unique(draw_patch(32, 0, row, kinds).presence(32)) for row in range(500)]
    assert {len(found) for found in values} == {2}
    opacities = np.array(values)[:, 1]
    assert opacities.min() >= 0.3
    assert opacities.max() <= 1
    np.testing.assert_allclose(np.quantile(opacities, [0, 0.5, 1]), [0.3, 0.65, 1], atol=0.05)


def test_squares_are_those_of_earlier_versions():
    """Drawn by literally the rule of the version that had no other shapes."""
    for row in range(50):
        generator = np.random.default_rng([3, row])
        shares = generator.random(4)
        edges = ("hard", "blended")[int(generator.integers(2))]
        side = round((1 / 4, 3 / 8, 1 / 2, 5 / 8)[int(generator.integers(4))] * 32)
        corners = [int(share * (32 - side + 1)) for share in shares]
        patch = draw_patch(32, 3, row, SQUARES)
        assert [*patch.source, *patch.destination] == corners
        ramp = round(side / 4) if edges == "blended" else 0
        inwards = np.minimum(np.arange(side), np.arange(side)[::-1])
        share = np.minimum(1, (inwards + 1) / (ramp + 1)).astype(np.float32)
        wanted = np.minimum(share[:, None], share[None, :])
        np.testing.assert_array_equal(patch.opacity, wanted)


def test_every_side_shape_edge_and_place_is_drawn():
    patches = [draw_patch(8, 0, row, SQUARES) for row in range(2000)]
    assert {patch.opacity.shape for patch in patches} == {(side, side) for side in (2, 3, 4, 5)}
    for attribute in ("destination", "source"):
        corners = {getattr(patch, attribute) for patch in patches if len(patch.opacity) == 5}
        assert corners == {(top, left) for top in range(4) for left in range(4)}
    mixed = [draw_patch(32, 0, row) for row in range(600)]
    is_square = np.mean([(patch.opacity > 0).all() for patch in mixed])
    is_opaque = np.mean([set(np.unique(patch.opacity)) <= {0, 1} for patch in mixed])
    np.testing.assert_allclose([is_square, is_opaque], 1 / 3, atol=0.06)


@given(row=st.integers(0, 1000), shape=st.sampled_from(SHAPES))
def test_places_and_shapes_do_not_depend_on_the_edges_asked_for(row, shape):
    hard, *others = (draw_patch(32, 0, row, PatchKinds((0.5,), (shape,), (e,))) for e in EDGES)
    for other in others:
        assert (other.source, other.destination) == (hard.source, hard.destination)
        np.testing.assert_array_equal(other.mask(32), hard.mask(32))


@settings(deadline=None)
@given(size=st.integers(4, 16), row=st.integers(0, 1000), kinds=KINDS)
def test_a_pasted_image_equals_one_made_pixel_by_pixel(size, row, kinds):
    id_image, ood_image = images(2, size)
    patch = draw_patch(size, 0, row, kinds)
    found = patch.paste(id_image, ood_image)
    np.testing.assert_array_equal(found, pasted_by_hand(id_image, ood_image, patch))


@given(row=st.integers(0, 1000), kinds=KINDS)
def test_outside_the_mask_nothing_changes_and_inside_presence_is_what_is_seen(row, kinds):
    id_image, ood_image = np.zeros((2, 3, 16, 16), np.uint8)
    ood_image[:] = 255
    patch = draw_patch(16, 0, row, kinds)
    result, (mask,) = paste_all(id_image[None], ood_image[None], [patch])
    np.testing.assert_array_equal((result[0] > 0).all(axis=0), mask)
    np.testing.assert_allclose(result[0][0] / 255, patch.presence(16), atol=0.5 / 255)


def test_images_of_another_shape_or_type_are_refused():
    patch = Patch((0, 0), (0, 0), np.ones((2, 2), np.float32))
    with pytest.raises(ValueError, match="the same shape"):
        patch.paste(images(1, 8)[0], images(1, 9)[0])
    with pytest.raises(ValueError, match="must be uint8"):
        patch.paste(images(1, 8)[0], images(1, 8)[0].astype(np.int16))
