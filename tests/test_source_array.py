"""Arrays as image sets; every fault ends in one line."""

import numpy as np
import pytest
from PIL import Image

from ood_heatmap import source_array
from ood_heatmap.decoding import decode
from ood_heatmap.errors import OodHeatmapError
from ood_heatmap.images import Transform
from ood_heatmap.source_array import from_array
from ood_heatmap.sources import open_images


@pytest.mark.parametrize("layout", ["NHWC", "NCHW", "NHW", "NHW1"])
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_arrays_of_every_layout_are_read(tmp_path, layout, suffix):
    values = np.random.default_rng(0).integers(0, 256, (5, 3, 8, 8)).astype(np.uint8)
    if "1" in layout or layout == "NHW":
        values[:] = values[:, :1]
    stored = {
        "NHWC": values.transpose(0, 2, 3, 1),
        "NCHW": values,
        "NHW": values[:, 0],
        "NHW1": values[:, 0, :, :, None],
    }[layout]
    path = tmp_path / f"a{suffix}"
    if suffix == ".npy":
        np.save(path, stored)
    else:
        np.savez(path, images=stored, labels=np.arange(5) % 2)
    images = open_images(str(path))
    for transform in (Transform(8), Transform(8, resize=9)):
        found = decode(images, np.arange(5), transform).pixels
        wanted = [transform(Image.fromarray(item)) for item in values.transpose(0, 2, 3, 1)]
        np.testing.assert_array_equal(found, wanted)
    assert images.labels.tolist() == ([-1] * 5 if suffix == ".npy" else [0, 1, 0, 1, 0])


@pytest.mark.parametrize(
    "array", [np.zeros((2, 8, 8, 3), np.float32), np.zeros((0, 8, 8, 3), np.uint8)]
)
def test_arrays_that_are_no_images_are_refused(array):
    with pytest.raises(OodHeatmapError, match=r"must be uint8|not images of"):
        from_array(array)


def test_labels_of_another_length_are_refused():
    with pytest.raises(OodHeatmapError, match=r"4 images but labels of shape \(3,\)"):
        from_array(np.zeros((4, 8, 8, 3), np.uint8), np.zeros(3))


def test_an_array_file_with_python_objects_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{"a": 1}]), allow_pickle=True)
    with pytest.raises(OodHeatmapError, match="cannot be read as NumPy arrays"):
        open_images(str(tmp_path / "a.npy"))


def images_and(**arrays):
    return {"images": np.zeros((3, 8, 8, 3), np.uint8), **arrays}


@pytest.mark.parametrize(
    ("arrays", "found"),
    [
        (images_and(), [-1, -1, -1]),
        (images_and(labels=np.array([1, 0, 1])), [1, 0, 1]),
        (images_and(x_test=np.ones((5, 8, 8), np.uint8)), [-1, -1, -1]),
        ({"anything": np.zeros((3, 8, 8), np.uint8)}, [-1, -1, -1]),
        ({"x": np.zeros((3, 8, 8), np.uint8), "labels": np.array([0, 0, 1])}, [0, 0, 1]),
    ],
)
def test_arrays_of_an_npz_file(tmp_path, arrays, found):
    np.savez(tmp_path / "a.npz", **arrays)
    images = open_images(str(tmp_path / "a.npz"))
    assert images.labels.tolist() == found


def test_arrays_of_an_npz_file_are_not_guessed(tmp_path):
    ones = np.ones((3, 8, 8), np.uint8)
    np.savez(tmp_path / "keras.npz", x_test=ones, x_train=ones, y_train=ones[:, 0, 0])
    with pytest.raises(OodHeatmapError, match=r"the arrays x_test, x_train, y_train.*np\.savez"):
        open_images(str(tmp_path / "keras.npz"))
    np.savez(tmp_path / "labels.npz", labels=ones[:, 0, 0])
    with pytest.raises(OodHeatmapError, match="the arrays labels: it is ambiguous"):
        open_images(str(tmp_path / "labels.npz"))


@pytest.mark.parametrize("cut", [10, 100, 300])
@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_a_truncated_array_file_is_named(tmp_path, suffix, cut):
    path = tmp_path / f"a.{suffix}"
    pixels = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3)).astype(np.uint8)
    np.save(path, pixels) if suffix == "npy" else np.savez_compressed(path, images=pixels)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(OodHeatmapError, match=rf"a\.{suffix} cannot be read as NumPy arrays"):
        open_images(str(path))


@pytest.mark.parametrize(
    "labels", [[[2], [0], [-1]], [2.0, 0.0, -1.0], np.array([2, 0, -1], np.int8)]
)
def test_labels_as_class_numbers(labels):
    images = from_array(np.zeros((3, 8, 8, 3), np.uint8), np.array(labels))
    assert images.labels.tolist() == [2, 0, -1]
    assert images.labels.dtype == np.int32
    assert images.classes == ("0", "1", "2")
    assert not images.has_class_names


@pytest.mark.parametrize("dtype", [str, bytes])
def test_labels_as_class_names(dtype):
    labels = np.array(["dog", "cat", "dog"]).astype(dtype)
    images = from_array(np.zeros((3, 8, 8, 3), np.uint8), labels)
    assert images.labels.tolist() == [1, 0, 1]
    assert images.classes == ("cat", "dog")
    assert images.has_class_names
    others = from_array(np.zeros((3, 8, 8, 3), np.uint8), np.array(["emu", "cat", "emu"]))
    assert others.listing != images.listing


@pytest.mark.parametrize(
    "labels",
    [
        [0.0, np.nan, 1.0],
        [0.5, 0.0, 1.0],
        [0.0, np.inf, 1.0],
        [0, -2, 1],
        [0, 2**40, 1],
        [0, 2**31, 1],
        np.array([True, False, True]),
        np.array([1j, 0, 0]),
        np.array([None, 0, 1]),
    ],
)
def test_labels_that_are_not_class_numbers_are_refused(labels):
    with pytest.raises(OodHeatmapError, match=r"labels of array are not class numbers \("):
        from_array(np.zeros((3, 8, 8, 3), np.uint8), np.array(labels))


def test_one_hot_labels_are_refused():
    with pytest.raises(OodHeatmapError, match=r"3 images but labels of shape \(3, 3\)"):
        from_array(np.zeros((3, 8, 8, 3), np.uint8), np.eye(3))


def test_a_file_that_is_replaced_while_it_is_read_has_the_former_stamp(tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    np.savez(path, images=np.zeros((2, 4, 4, 3), np.uint8))
    before = path.stat().st_size, path.stat().st_mtime_ns

    def replace_file(*_: object) -> str:
        np.savez(tmp_path / "b.npz", images=np.zeros((9, 4, 4, 3), np.uint8))
        (tmp_path / "b.npz").replace(path)
        return "images"

    monkeypatch.setattr(source_array, "_images_key", replace_file)
    images = open_images(str(path))
    assert images.stamps is not None
    assert images.stamps.tolist() == [list(before)] * len(images)
