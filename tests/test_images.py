"""Image sets and the one transform; every kind of bad image ends in one line that names it."""

import hashlib
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ood_heatmap import sources as module
from ood_heatmap.errors import OodHeatmapError, UsageError
from ood_heatmap.images import Transform, UnreadableImageError, iter_batches, to_rgb
from ood_heatmap.sources import from_array, open_images, read_file


def picture(width: int = 8, height: int = 8, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3))
    return Image.fromarray(values.astype(np.uint8))


def all_of(images, transform, **options):
    rows = np.arange(len(images))
    pieces = [rows[start : start + 3] for start in range(0, len(rows), 3)]
    return list(iter_batches(images, pieces, transform, workers=2, **options))


def test_every_mode_becomes_rgb():
    grey = Image.fromarray(np.full((4, 4), 100, np.uint8))
    deep = Image.fromarray(np.full((4, 4), 100 * 257, np.uint16))
    for image in (grey, deep, grey.convert("RGBA"), grey.convert("LA"), grey.convert("P")):
        np.testing.assert_array_equal(np.asarray(to_rgb(image)), np.full((4, 4, 3), 100))
    black = Image.new("CMYK", (4, 4), (0, 0, 0, 255))
    assert np.asarray(to_rgb(black)).max() == 0
    with pytest.raises(ValueError, match="no known range"):
        to_rgb(Image.fromarray(np.ones((4, 4), np.float32)))


def test_a_folder_of_class_folders_has_labels_in_alphabetical_order(tmp_path):
    for name in ("dog/b.png", "cat/x.png", "cat/deep/a.PNG", "dog/notes.txt", ".hidden/c.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        if name.lower().endswith("png"):
            picture().save(tmp_path / name, "png")
        else:
            (tmp_path / name).write_text("")
    images = open_images(str(tmp_path))
    assert images.names == ["cat/deep/a.PNG", "cat/x.png", "dog/b.png"]
    assert images.labels.tolist() == [0, 0, 1]
    assert images.classes == ("cat", "dog")


def test_a_flat_folder_has_no_labels(tmp_path):
    picture().save(tmp_path / "b.png")
    picture().save(tmp_path / "a.jpg")
    images = open_images(str(tmp_path))
    assert images.names == ["a.jpg", "b.png"]
    assert images.labels.tolist() == [-1, -1]


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(OodHeatmapError, match=r"holds no images \(looked for"):
        open_images(str(tmp_path))


def test_images_beside_class_folders_are_refused(tmp_path):
    (tmp_path / "cat").mkdir()
    picture().save(tmp_path / "cat" / "a.png")
    picture().save(tmp_path / "b.png")
    with pytest.raises(OodHeatmapError, match=r"b\.png.*cat.*side by side"):
        open_images(str(tmp_path))


def test_an_unknown_source_lists_the_sets():
    with pytest.raises(UsageError, match=r"'nowhere'.*cifar10.*svhn"):
        open_images("nowhere")


def test_a_set_that_is_not_there_says_how_to_get_it(tmp_path):
    with pytest.raises(OodHeatmapError, match=r"cifar10/train is not complete under .*--download"):
        open_images("cifar10/train", data_root=tmp_path)
    with pytest.raises(UsageError, match="no split 'night'"):
        open_images("cifar10/night", data_root=tmp_path)


def test_a_torchvision_set_is_read(tmp_path):
    """CIFAR-10's own files, made small: torchvision then checks nothing but that they are there."""
    from torchvision.datasets import MNIST

    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    values = np.random.default_rng(0).integers(0, 256, (3, 28, 28)).astype(np.uint8)
    header = {3: b"\0\0\x08\x03" + b"".join(n.to_bytes(4, "big") for n in values.shape)}
    for part in ("train", "t10k"):
        (folder / f"{part}-images-idx3-ubyte").write_bytes(header[3] + values.tobytes())
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(
            b"\0\0\x08\x01" + (3).to_bytes(4, "big") + bytes([7, 0, 2])
        )
    assert MNIST(str(tmp_path), train=False)
    images = open_images("mnist/test", data_root=tmp_path)
    assert images.labels.tolist() == [7, 0, 2]
    (batch,) = all_of(images, Transform(28))
    np.testing.assert_array_equal(batch.pixels, np.repeat(values[:, None], 3, axis=1))
    assert batch.modes == {"L": 3}


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
        found = np.concatenate([batch.pixels for batch in all_of(images, transform)])
        wanted = [transform(Image.fromarray(item)) for item in values.transpose(0, 2, 3, 1)]
        np.testing.assert_array_equal(found, wanted)
    assert images.labels.tolist() == ([-1] * 5 if suffix == ".npy" else [0, 1, 0, 1, 0])


@pytest.mark.parametrize(
    "array", [np.zeros((2, 8, 8, 3), np.float32), np.zeros((0, 8, 8, 3), np.uint8)]
)
def test_arrays_that_are_no_images_are_refused(array):
    with pytest.raises(OodHeatmapError, match=r"must be uint8|no images"):
        from_array(array)


def test_labels_of_another_length_are_refused():
    with pytest.raises(OodHeatmapError, match=r"4 images but labels of shape \(3,\)"):
        from_array(np.zeros((4, 8, 8, 3), np.uint8), np.zeros(3))


def test_an_array_file_with_python_objects_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{"a": 1}]), allow_pickle=True)
    with pytest.raises(OodHeatmapError, match="cannot be read as NumPy arrays"):
        open_images(str(tmp_path / "a.npy"))


def bad_files(folder: Path) -> dict[str, Path]:
    buffer = io.BytesIO()
    picture(64, 64).save(buffer, "jpeg")
    whole = buffer.getvalue()
    contents = {"cut.jpg": whole[: len(whole) // 2], "text.png": b"hello", "empty.png": b""}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return {name: folder / name for name in contents}


@pytest.mark.parametrize("name", ["cut.jpg", "text.png", "empty.png", "missing.png"])
def test_an_unreadable_image_is_named(tmp_path, name):
    path = bad_files(tmp_path).get(name, tmp_path / name)
    with pytest.raises(UnreadableImageError, match=f"{path} is not a readable image.*--skip"):
        read_file(path)


def test_an_image_made_to_fill_the_memory_is_refused(tmp_path, monkeypatch):
    picture(64, 64).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 - 1)
    with pytest.raises(UnreadableImageError, match=r"large\.png"):
        read_file(tmp_path / "large.png")


def test_skipped_images_are_counted_and_the_others_keep_their_rows(tmp_path):
    for number in range(7):
        picture(seed=number).save(tmp_path / f"{number}.png")
    (tmp_path / "2.png").write_bytes(b"no image")
    (tmp_path / "6.png").write_bytes(b"")
    images = open_images(str(tmp_path))
    with pytest.raises(UnreadableImageError, match=r"2\.png"):
        all_of(images, Transform(8))
    found = all_of(images, Transform(8), skip_unreadable=True)
    assert np.concatenate([batch.rows for batch in found]).tolist() == [0, 1, 3, 4, 5]
    assert [image.name for batch in found for image in batch.skipped] == ["2.png", "6.png"]
    wanted = [Transform(8)(picture(seed=number)) for number in (0, 1, 3, 4, 5)]
    np.testing.assert_array_equal(np.concatenate([batch.pixels for batch in found]), wanted)


def test_batches_come_in_order_with_the_hash_of_each_file(tmp_path):
    for number in range(10):
        picture(seed=number).save(tmp_path / f"{number}.png")
    images = open_images(str(tmp_path))
    found = all_of(images, Transform(8))
    assert [len(batch.rows) for batch in found] == [3, 3, 3, 1]
    wanted = b"".join(
        hashlib.sha256((tmp_path / f"{number}.png").read_bytes()).digest() for number in range(10)
    )
    assert b"".join(batch.digests for batch in found) == wanted
    assert b"".join(images.digest(row) for row in range(10)) == wanted


def test_the_listing_changes_with_names_sizes_and_order(tmp_path):
    picture().save(tmp_path / "a.png")
    picture(seed=1).save(tmp_path / "b.png")
    before = open_images(str(tmp_path)).listing
    assert open_images(str(tmp_path)).listing == before
    (tmp_path / "b.png").rename(tmp_path / "c.png")
    renamed = open_images(str(tmp_path)).listing
    (tmp_path / "c.png").write_bytes(b"shorter")
    assert len({before, renamed, open_images(str(tmp_path)).listing}) == 3


def test_a_listing_does_not_depend_on_the_place(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        picture().save(tmp_path / folder / "a.png")
    assert open_images(str(tmp_path / "one")).listing == open_images(str(tmp_path / "two")).listing


def test_all_sets_are_torchvision_classes():
    assert {"cifar10", "cifar100", "svhn", "dtd", "places365"} <= set(module.torchvision_sets())
