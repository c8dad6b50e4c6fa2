"""Pasted patches: where they are, what is in them, and that a draw depends on nothing else."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ood_heatmap.patches import (
    _BLENDED,
    _HARD,
    EDGES,
    SIDES,
    Patch,
    draw_patch,
    paste,
    paste_all,
)


def images(count, size, seed=0):
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (count, 3, size, size)).astype(np.uint8)


def pasted_by_hand(id_image, ood_image, patch):
    """Return the same pixel by pixel, in whole numbers where edges are hard."""
    result = id_image.copy()
    ramp = round(patch.side / 4)
    for down in range(patch.side):
        for right in range(patch.side):
            inwards = min(down, right, patch.side - 1 - down, patch.side - 1 - right)
            share = 1.0 if patch.edges == _HARD else min(1.0, (inwards + 1) / (ramp + 1))
            place = (slice(None), patch.destination[0] + down, patch.destination[1] + right)
            taken = ood_image[:, patch.source[0] + down, patch.source[1] + right].astype(float)
            result[place] = np.rint(id_image[place] + share * (taken - id_image[place]))
    return result


@given(size=st.integers(4, 40), seed=st.integers(0, 9), row=st.integers(0, 10**9))
def test_a_patch_lies_inside_both_images_and_has_a_side_of_the_list(size, seed, row):
    patch = draw_patch(size, seed, row)
    assert patch.side in {max(1, round(share * size)) for share in SIDES}
    assert patch.edges in EDGES
    for corner in (*patch.source, *patch.destination):
        assert 0 <= corner <= size - patch.side
    assert draw_patch(size, seed, row) == patch


def test_every_side_edge_and_place_is_drawn():
    patches = [draw_patch(8, 0, row) for row in range(2000)]
    assert {patch.side for patch in patches} == {2, 3, 4, 5}
    assert {patch.edges for patch in patches} == set(EDGES)
    for attribute in ("destination", "source"):
        corners = {getattr(patch, attribute) for patch in patches if patch.side == 5}
        assert corners == {(top, left) for top in range(4) for left in range(4)}
    assert [draw_patch(8, 1, row) for row in range(50)] != patches[:50]


def test_the_places_do_not_depend_on_the_edges_asked_for():
    for row in range(20):
        hard, blended = (draw_patch(32, 0, row, (0.5,), (kind,)) for kind in EDGES)
        assert (hard.destination, hard.source, hard.side) == (
            blended.destination,
            blended.source,
            16,
        )


@pytest.mark.parametrize("edges", EDGES)
@pytest.mark.parametrize("side", [1, 2, 5, 8])
def test_a_pasted_image_equals_one_made_pixel_by_pixel(edges, side):
    id_image, ood_image = images(2, 8)
    patch = Patch(side, (0, 8 - side), (8 - side, 0), edges)
    found = paste(id_image, ood_image, patch)
    np.testing.assert_array_equal(found, pasted_by_hand(id_image, ood_image, patch))


@given(row=st.integers(0, 1000), edges=st.sampled_from(EDGES))
def test_outside_the_mask_nothing_changes_and_the_middle_is_the_ood_image(row, edges):
    id_image, ood_image = np.zeros((2, 3, 16, 16), np.uint8)
    ood_image[:] = 255
    patch = draw_patch(16, 0, row, edges=(edges,))
    result, (mask,) = paste_all(id_image[None], ood_image[None], [patch])
    np.testing.assert_array_equal((result[0] > 0).all(axis=0), mask)
    assert mask.sum() == patch.side**2
    assert result[0].max() == 255
    assert (edges == _BLENDED) == bool((result[0][:, mask] < 255).any())


def test_images_of_another_shape_or_type_are_refused():
    with pytest.raises(ValueError, match="the same shape"):
        paste(images(1, 8)[0], images(1, 9)[0], draw_patch(8, 0, 0))
    with pytest.raises(ValueError, match="must be uint8"):
        paste(images(1, 8)[0], images(1, 8)[0].astype(np.int16), draw_patch(8, 0, 0))
