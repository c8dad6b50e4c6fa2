"""What a user names: folders, array files, torchvision sets; every fault ends in one line."""

import hashlib
import io
import logging
import os
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features
from torchvision.datasets import ImageFolder

from ood_heatmap import sources as module
from ood_heatmap.errors import OodHeatmapError, UsageError
from ood_heatmap.images import Transform, UnreadableImageError, decode, relabel
from ood_heatmap.pipeline.config import IndexConfig
from ood_heatmap.pipeline.index import build_index
from ood_heatmap.sources import (
    _image_suffixes,
    _open_folder,
    find_images,
    from_array,
    from_paths,
    open_images,
    read_file,
)


def picture(width: int = 8, height: int = 8, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3))
    return Image.fromarray(values.astype(np.uint8))


def write_pictures(root: Path, *names: str) -> Path:
    """Write a PNG under each name, whatever its suffix."""
    for seed, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture(seed=seed).save(root / name, "png")
    return root


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
    with pytest.raises(OodHeatmapError, match=r"contains no images \(looked for"):
        open_images(str(tmp_path))


def test_images_beside_class_folders_are_refused(tmp_path):
    (tmp_path / "cat").mkdir()
    picture().save(tmp_path / "cat" / "a.png")
    picture().save(tmp_path / "b.png")
    with pytest.raises(OodHeatmapError, match=r"b\.png.*and class folders .cat.*Keep one kind"):
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
    (batch,) = [decode(images, np.arange(3), Transform(28))]
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
    assert {"cifar10", "cifar100", "svhn", "dtd", "places365"} <= set(module._torchvision_sets())


def test_links_to_folders_are_followed(tmp_path):
    elsewhere = write_pictures(tmp_path / "elsewhere", "x.png", "deep/y.png")
    root = write_pictures(tmp_path / "set", "cat/a.png", "dog/b.png")
    (root / "cat" / "more").symlink_to(elsewhere)
    (root / "emu").symlink_to(elsewhere)
    images = open_images(str(root))
    theirs = ImageFolder(str(root))
    # their files come before their folders
    assert images.names == sorted(os.path.relpath(path, root) for path, _ in theirs.samples)
    assert images.labels.tolist() == theirs.targets
    assert list(images.classes) == theirs.classes


def test_links_in_circles_end(tmp_path, caplog):
    root = write_pictures(tmp_path / "set", "cat/a.png", "dog/b.png")
    (root / "cat" / "again").symlink_to(root / "cat")
    (root / "cat" / "dogs").symlink_to(root / "dog")
    (root / "dog" / "cats").symlink_to(root / "cat")
    (root / "up").symlink_to(tmp_path)
    (root / "self").symlink_to(root / "self")
    images = open_images(str(root))
    assert images.names == ["cat/a.png", "cat/dogs/b.png", "dog/b.png", "dog/cats/a.png"]
    assert images.classes == ("cat", "dog")
    assert "broken link or special file 1, link to a folder above 5" in caplog.text


def test_files_left_out_are_counted_by_suffix_and_hidden_ones_are_not(tmp_path, caplog):
    write_pictures(tmp_path, "a.png", "b.jfif", "c.JPE", "d.jfi", ".hidden.png", ".dir/e.png")
    for name in ("f.heic", "g.HEIC", "notes.txt", "README", "._a.png", ".DS_Store"):
        (tmp_path / name).write_bytes(b"-")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.png")
    images = open_images(str(tmp_path))
    assert images.names == ["a.png", "b.jfif", "c.JPE", "d.jfi"]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.message == (
        f"{tmp_path}: files skipped: .heic 2, .txt 1, broken link or special file 2, no suffix 1"
    )
    assert decode(images, np.arange(4), Transform(8)).rows.tolist() == [0, 1, 2, 3]


def test_avif_is_an_image_where_pillow_reads_it():
    assert (".avif" in _image_suffixes()) == ("avif" in features.get_supported())


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    root = write_pictures(tmp_path / "set", "cat/a.png", "dog/b.png")
    scandir = os.scandir

    def refused(path):
        if Path(path).name == "dog":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(OodHeatmapError, match=r"dog cannot be listed \(Permission denied\)"):
        open_images(str(root))


@pytest.mark.parametrize(
    ("raw", "shown"),
    [(b"caf\xe9", r"caf\udce9"), (b"two\nlines", r"two\nlines"), ("ü".encode(), "ü")],
)
def test_names_of_any_bytes_are_read_and_shown_in_one_line(tmp_path, raw, shown):
    for folder in (b"cat", b"dog" + raw):
        path = os.fsencode(tmp_path) + b"/" + folder
        os.mkdir(path)
        picture().save(os.fsdecode(path + b"/" + raw + b".png"))
    images = open_images(str(tmp_path))
    assert images.names == [f"cat/{shown}.png", f"dog{shown}/{shown}.png"]
    assert images.classes == ("cat", f"dog{shown}")
    listing = hashlib.sha256()
    for folder in (b"cat", b"dog" + raw):
        name = folder + b"/" + raw + b".png"
        size = os.stat(os.fsencode(tmp_path) + b"/" + name).st_size
        listing.update(name + b"\0" + str(size).encode() + b"\n")
    assert images.listing == listing.hexdigest()
    assert len(decode(images, np.arange(2), Transform(8)).rows) == 2
    "\n".join(images.names).encode()


def test_an_unreadable_image_of_an_odd_name_is_one_line(tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/a\nb\xff.png"))
    path.write_bytes(b"")
    with pytest.raises(UnreadableImageError) as caught:
        read_file(path)
    assert str(caught.value).startswith(f"{tmp_path}/a\\nb\\udcff.png is not a readable image")
    str(caught.value).encode()


def test_an_empty_class_folder_stays_a_class(tmp_path, caplog):
    root = write_pictures(tmp_path, "ant/a.png", "cat/b.png", "dog/c.png")
    before = open_images(str(root))
    (root / "cat" / "b.png").unlink()
    images = open_images(str(root))
    assert images.classes == ("ant", "cat", "dog")
    assert images.labels.tolist() == [0, 2]
    assert "class folders without images, kept as classes: cat" in caplog.text
    (root / "cat").rmdir()
    without = open_images(str(root))
    assert without.labels.tolist() == [0, 1]
    assert len({before.listing, images.listing, without.listing}) == 3


def test_an_empty_folder_beside_images_is_no_class(tmp_path):
    write_pictures(tmp_path, "a.png")
    (tmp_path / "empty").mkdir()
    assert open_images(str(tmp_path)).classes == ()


def test_class_folders_in_natural_order(tmp_path):
    root = write_pictures(tmp_path, *(f"{number}/a.png" for number in range(1, 12)))
    images = _open_folder(root, class_order="natural")
    assert images.classes == tuple(str(number) for number in range(1, 12))
    assert images.labels.tolist() == list(range(11))
    assert images.names == [f"{number}/a.png" for number in range(1, 12)]
    assert images.listing != _open_folder(root).listing
    assert open_images(str(root), class_order="natural").classes == images.classes


def test_paths_as_a_set(tmp_path):
    write_pictures(tmp_path, "b/x.png", "a/x.png")
    paths = [tmp_path / "b" / "x.png", tmp_path / "gone.png", tmp_path / "a" / "x.png"]
    images = from_paths(paths)
    assert images.names == [str(path) for path in paths]
    batch = decode(images, np.arange(3), Transform(8), skip_unreadable=True)
    assert batch.rows.tolist() == [0, 2]
    (skipped,) = batch.skipped
    assert (skipped.row, skipped.name) == (1, str(paths[1]))
    assert skipped.reason == "No such file or directory"
    with pytest.raises(UnreadableImageError, match=r"gone\.png"):
        images.digest(1)


@pytest.mark.parametrize("kind", ["folder", "npy", "npz"])
def test_size_and_time_of_the_file_of_each_image_are_known(tmp_path, kind):
    if kind == "folder":
        root = write_pictures(tmp_path / "set", "b/y.png", "a/x.png")
        paths = [root / "a" / "x.png", root / "b" / "y.png"]
    else:
        root = tmp_path / f"set.{kind}"
        array = np.zeros((2, 3, 8, 8), np.uint8)
        np.save(root, array) if kind == "npy" else np.savez(root, images=array)
        paths = [root, root]
    for number, path in enumerate(paths):
        os.utime(path, ns=(0, 1_600_000_000_123_456_789 + number))
    wanted = [[path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
    stamps = open_images(str(root)).stamps
    assert stamps is not None
    assert stamps.tolist() == wanted
    assert from_array(np.zeros((2, 3, 8, 8), np.uint8)).stamps is None


def test_images_anywhere_below_a_folder_are_found(tmp_path, caplog):
    root = write_pictures(tmp_path, "b.png", "a/c.png", "a/d/e.png")
    (root / "a" / "notes.txt").write_text("")
    assert find_images(root) == [root / "a" / "c.png", root / "a" / "d" / "e.png", root / "b.png"]
    assert "files skipped: .txt 1" in caplog.text
    assert find_images(root, skip=root / "a" / "d") == [root / "a" / "c.png", root / "b.png"]
    assert len(find_images(root / "a", skip=root)) == len(find_images(root / "a", skip=root / "a"))


def test_a_folder_of_other_files_says_what_it_found(tmp_path):
    for name in ("a.heic", "b.heic", "c.txt"):
        (tmp_path / name).write_text("")
    with pytest.raises(OodHeatmapError, match=r"no images \(.*; found: \.heic 2, \.txt 1\)"):
        open_images(str(tmp_path))


def png_header(width: int, height: int) -> bytes:
    """Return a PNG file of a size, without pixels."""
    header = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\0\0\0\0"
    data = b"IDAT" + zlib.compress(b"")
    chunks = b"".join(
        (len(chunk) - 4).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
        for chunk in (header, data, b"IEND")
    )
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.mark.parametrize("size", [(1, 89_478_485), (89_478_485, 1), (9_500, 9_500)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_sizes_made_to_fill_the_memory_are_refused_from_the_header(tmp_path, size):
    (tmp_path / "a.png").write_bytes(png_header(*size))
    with pytest.raises(UnreadableImageError, match=rf"{size[0]} x {size[1]} pixels would exhaust"):
        read_file(tmp_path / "a.png")


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


def test_the_class_order_that_index_names_gives_the_accuracy_it_says(data, classifier, tmp_path):
    """Folders 2, 10, 30, 100 are the classifier's classes 0 to 3 in their natural order."""
    names = ["2", "10", "30", "100"]
    pictures = open_images(str(data / "id"))
    pixels = decode(pictures, np.arange(len(pictures)), classifier.config.transform).pixels
    prediction = classifier(torch.from_numpy(pixels)).logits.argmax(dim=1).tolist()
    for name in names:
        (tmp_path / "set" / name).mkdir(parents=True)
    for row, label in enumerate(prediction):
        shutil.copy(data / "id" / pictures.names[row], tmp_path / "set" / names[label])
    config = IndexConfig(batch_size=32)
    found = build_index(tmp_path / "a", open_images(str(tmp_path / "set")), classifier, config)
    assert found.results["accuracy"] < 0.9
    (warning,) = found.results["warnings"]
    assert "The natural order of the classes (2, 10, 30, ...) gives 100.00%" in warning
    assert warning.endswith("index the folders with --class-order natural.")
    images = open_images(str(tmp_path / "set"), class_order="natural")
    found = build_index(tmp_path / "b", images, classifier, config)
    assert found.results["accuracy"] == 1
    assert found.results["classes"] == names
    # a test set lists its folders in its own order, and is matched by name
    others = relabel(open_images(str(tmp_path / "set")), found.results["classes"])
    expected = [names.index(name.partition("/")[0]) for name in others.names]
    assert others.labels.tolist() == expected
