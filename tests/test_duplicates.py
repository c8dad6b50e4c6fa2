"""Copies are found in whatever file they come, and other images are left alone."""

import hashlib
import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from ood_heatmap.duplicates import (
    _NEAR,
    AuditedSet,
    find_overlaps,
    hash_pixels,
    relative_difference,
)


@pytest.fixture(scope="module")
def photographs():
    """Return tiles of scikit-learn's two sample photographs, ``(60, 3, 64, 64)`` uint8."""
    tiles = [
        photograph[top : top + 64, left : left + 64].transpose(2, 0, 1)
        for photograph in load_sample_images().images
        for top in range(0, 364, 64)
        for left in range(0, 577, 64)
    ]
    return np.stack([tile for tile in tiles if tile.std() > 20][-60:])


def changed(images, change):
    """Return images that went through a change of Pillow pictures."""
    pictures = [change(Image.fromarray(image.transpose(1, 2, 0))) for image in images]
    return np.stack([np.array(picture).transpose(2, 0, 1) for picture in pictures])


def compressed(picture):
    buffer = io.BytesIO()
    picture.save(buffer, "jpeg", quality=80)
    return Image.open(buffer).convert("RGB")


def rescaled(picture):
    return picture.resize((56, 56), Image.Resampling.BICUBIC).resize(
        picture.size, Image.Resampling.BICUBIC
    )


def test_the_hash_is_that_of_the_pixels_alone(photographs):
    found = hash_pixels(photographs)
    assert [one.tobytes() for one in found] == [
        hashlib.sha256(image.tobytes()).digest()[:8] for image in photographs
    ]
    every_second = photographs[:, :, ::2]  # not contiguous
    np.testing.assert_array_equal(hash_pixels(every_second), hash_pixels(every_second.copy()))


def test_the_relative_difference_is_its_formula(photographs):
    first, second = photographs[:5], photographs[5:10]
    wanted = [
        np.sqrt(((a.astype(float) - b) ** 2).mean()) / a.astype(float).std()
        for a, b in zip(first, second, strict=True)
    ]
    np.testing.assert_allclose(relative_difference(first, second), wanted, rtol=1e-5)
    plain = np.full((2, 3, 4, 4), 7, np.uint8)
    other = np.stack([plain[0], plain[1] + 1])
    np.testing.assert_array_equal(relative_difference(plain, other), [0, np.inf])


@pytest.mark.parametrize("change", [compressed, rescaled])
def test_changed_copies_are_near_and_other_images_are_not(photographs, change):
    assert (relative_difference(changed(photographs, change), photographs) < _NEAR).mean() > 0.9
    others = [
        relative_difference(photographs, np.roll(photographs, shift, axis=0))
        for shift in range(1, 60)
    ]
    assert (np.array(others) < _NEAR).mean() < 0.002  # tiles of one wall


def make_set(title, kind, images, *, fitted=False, bank=None):
    """Return a set with the nearest images of a bank by brute force over pixels."""
    nearest, difference = np.arange(len(images)), np.full(len(images), np.inf, np.float32)
    if bank is not None:
        distance = ((images[:, None].astype(float) - bank) ** 2).sum(axis=(2, 3, 4))
        nearest = distance.argmin(axis=1)
        difference = relative_difference(images, bank[nearest])
    names = [f"{title}{number}" for number in range(len(images))]
    return AuditedSet(
        title, kind, fitted, names.__getitem__, hash_pixels(images), nearest, difference
    )


def test_sets_without_a_common_image_give_no_finding(photographs):
    train, test, ood = photographs[:20], photographs[20:30], photographs[30:]
    sets = [
        make_set("train", "ID", train, fitted=True),
        make_set("test", "ID", test, bank=train),
        make_set("ood", "OOD", ood, bank=train),
    ]
    assert find_overlaps(sets) == []


def test_copies_are_counted_and_three_are_named(photographs):
    train, other = photographs[:20], photographs[30:40]
    test = np.concatenate([train[[4, 2, 9, 11]], other])
    (finding,) = find_overlaps(
        [make_set("train", "ID", train, fitted=True), make_set("test", "ID", test, bank=train)]
    )
    assert finding.text.startswith(
        "4 of 14 images of test are also in train (test0 = train4, test1 = train2, test2 = train9 "
        "and 1 more). "
    )
    assert not finding.suspicious


@pytest.mark.parametrize("share", [0.4, 0.6])
@pytest.mark.parametrize("kind", ["ID", "OOD"])
def test_most_images_of_a_set_in_the_training_set_are_suspicious(photographs, share, kind):
    train = photographs[:20]
    count = round(10 * share)
    test = np.concatenate([train[:count], photographs[30 : 40 - count]])
    (finding,) = find_overlaps(
        [make_set("train", "ID", train, fitted=True), make_set("test", kind, test, bank=train)]
    )
    assert finding.suspicious == (share > 0.5)
    assert ("both ID and OOD" in finding.text) == (kind == "OOD")


def test_a_small_set_inside_a_large_one_of_the_other_kind_is_suspicious(photographs):
    ood = photographs[:50]
    found = find_overlaps(
        [
            make_set("train", "ID", photographs[50:]),
            make_set("id", "ID", ood[:5]),
            make_set("ood", "OOD", ood),
        ]
    )
    assert [finding.suspicious for finding in found] == [True]
    assert found[0].text.startswith("5 of 50 images of ood are also in id")


def test_test_sets_that_share_images_are_said_and_not_suspicious(photographs):
    train, ood = photographs[:20], photographs[30:]
    sets = [
        make_set("train", "ID", train, fitted=True),
        make_set("near", "OOD", ood, bank=train),
        make_set("far", "OOD", ood, bank=train),
    ]
    (finding,) = find_overlaps(sets)
    assert not finding.suspicious
    assert "30 of 30 images of far are also in near" in finding.text


def test_compressed_copies_are_almost_equal_and_exact_ones_are_not_counted_twice(photographs):
    train = photographs[:20]
    test = np.concatenate([train[:2], changed(train[5:8], compressed), photographs[30:35]])
    exact, near = find_overlaps(
        [make_set("train", "ID", train, fitted=True), make_set("test", "ID", test, bank=train)]
    )
    assert exact.text.startswith("2 of 10 images of test are also in train (test0 = train0")
    assert near.text.startswith(
        "3 of 10 images of test are almost equal to images of train (test2 = train5, test3 = train6"
    )


@pytest.mark.parametrize("num_alike", [0, 12])
def test_sets_that_are_much_alike_in_themselves_are_left_alone(photographs, num_alike):
    """A fifth of a set is almost equal to training images: reported unless that is normal there."""
    train = photographs[:60]
    within = np.where(np.arange(60) < num_alike, np.float32(0.1), np.float32(1))
    test = np.concatenate([changed(train[:4], compressed), photographs[40:56]])
    base = replace(make_set("train", "ID", train[:40], fitted=True), difference=within)
    found = find_overlaps([base, make_set("test", "ID", test, bank=train[:40])])
    assert len(found) == (num_alike == 0)
