"""Image sets: every mode, every orientation, every order of classes; batches in order."""

import hashlib
import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps, features

from ood_heatmap.decoding import decode, iter_batches
from ood_heatmap.images import (
    Transform,
    UnreadableImageError,
    class_orders,
    relabel,
    sort_classes,
    to_rgb,
)
from ood_heatmap.source_array import from_array
from ood_heatmap.sources import open_images


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


def saved(image: Image.Image, suffix: str, **options) -> Image.Image:
    """Return an image as it is read from a file."""
    buffer = io.BytesIO()
    image.save(buffer, suffix, **options)
    return Image.open(io.BytesIO(buffer.getvalue()))


FORMATS = ["jpeg", "png", "webp", "tiff", *(["avif"] if "avif" in features.get_supported() else [])]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", FORMATS)
def test_images_are_upright_whatever_their_exif_orientation_and_format(suffix, orientation):
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    picture(9, 6).save(buffer, suffix, exif=exif)
    wanted = np.asarray(ImageOps.exif_transpose(Image.open(buffer)))
    assert wanted.shape[:2] == ((9, 6) if orientation > 4 else (6, 9))
    np.testing.assert_array_equal(np.asarray(to_rgb(Image.open(buffer))), wanted)
    # loaded or not: Pillow turns TIFF files when it loads them
    image = Image.open(buffer)
    image.load()
    np.testing.assert_array_equal(np.asarray(to_rgb(image)), wanted)


def test_orientation_is_told_by_a_corner():
    """Orientation 6: the camera was turned left, the first row of the file is the right side."""
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[0] = 255
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    upright = np.asarray(to_rgb(saved(Image.fromarray(pixels), "png", exif=exif)))
    assert upright.shape == (6, 4, 3)
    assert (upright[:, -1] == 255).all()
    assert upright[:, :-1].max() == 0


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0"]
)
def test_damaged_exif_leaves_an_image_as_it_is(exif):
    image = picture()
    image.info["exif"] = exif
    np.testing.assert_array_equal(np.asarray(to_rgb(image)), np.asarray(picture()))


def test_an_orientation_that_does_not_exist_leaves_an_image_as_it_is():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 9
    np.testing.assert_array_equal(
        np.asarray(to_rgb(saved(picture(), "png", exif=exif))), np.asarray(picture())
    )


def test_turned_images_are_counted(tmp_path):
    exif = Image.Exif()
    for number, orientation in enumerate([1, 6, 3, 8, 1]):
        exif[ExifTags.Base.Orientation] = orientation
        picture(9, 6).save(tmp_path / f"{number}.jpg", exif=exif)
    picture(9, 6).save(tmp_path / "5.jpg")
    batch = decode(open_images(str(tmp_path)), np.arange(6), Transform(6))
    assert batch.notes == {"rotated by EXIF orientation": 3}


def test_what_is_hidden_below_transparency_shows():
    """As with torchvision, which drops the channel too."""
    pixels = np.random.default_rng(0).integers(0, 256, (5, 5, 4)).astype(np.uint8)
    pixels[..., 3] = 0
    np.testing.assert_array_equal(np.asarray(to_rgb(Image.fromarray(pixels))), pixels[..., :3])


GREYS = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)


@pytest.mark.parametrize("dtype", [np.uint16, ">u2", np.int32])
@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_integer_greys_over_16_bits_are_scaled(dtype, suffix):
    image = Image.fromarray(GREYS.astype(dtype))
    if suffix == "tiff" or image.mode != "I":
        image = saved(image, suffix)
    found = np.asarray(to_rgb(image))
    np.testing.assert_array_equal(found, np.repeat((GREYS // 256)[..., None], 3, axis=2))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.arange(256, dtype=np.uint16), "maximum of 255 of 65535 would all be black"),
        (np.arange(256, dtype=np.int32), "maximum of 255 of 65535 would all be black"),
        (np.arange(256, dtype=np.int32) * 1000, "from 0 to 255000 have no known range"),
        (np.arange(256, dtype=np.int32) - 3, "from -3 to 252 have no known range"),
    ],
)
def test_integer_greys_of_another_range_are_refused(tmp_path, values, message):
    saved(Image.fromarray(values.reshape(16, 16)), "tiff").save(tmp_path / "a.tif")
    with pytest.raises(UnreadableImageError, match=rf"a\.tif is not a readable .*{message}"):
        decode(open_images(str(tmp_path)), np.arange(1), Transform(16))


def test_a_black_16_bit_image_is_black():
    assert np.asarray(to_rgb(Image.fromarray(np.zeros((4, 4), np.uint16)))).max() == 0


def test_greys_of_12_bits_are_named(tmp_path):
    Image.fromarray((GREYS // 16).astype(np.uint16)).save(tmp_path / "a.png")
    Image.fromarray(GREYS).save(tmp_path / "b.png")
    batch = decode(open_images(str(tmp_path)), np.arange(2), Transform(64))
    assert batch.notes == {"nearly black: 16-bit grey values below 4096 of 65535": 1}


def test_class_orders():
    names = ["10", "1", "Truck", "2", "cat"]
    assert sort_classes(names, "name") == ["1", "10", "2", "Truck", "cat"]
    assert sort_classes(names, "natural") == ["1", "2", "10", "cat", "Truck"]
    assert sort_classes(names, "case-insensitive") == ["1", "10", "2", "cat", "Truck"]
    assert class_orders(["1", "10", "2"]) == {"natural": ("1", "2", "10")}
    assert class_orders(["cat", "dog"]) == {}


def test_the_natural_order_is_that_of_timm():
    natural_key = pytest.importorskip("timm.utils").natural_key
    generator = np.random.default_rng(0)
    for _ in range(100):
        names = {"".join(generator.choice(list("aB10 _"), 4)) for _ in range(20)}
        wanted = sorted(sorted(names), key=natural_key)
        assert sort_classes(names, "natural") == wanted


def labelled(labels: list[int], classes: tuple[str, ...]):
    images = from_array(np.zeros((len(labels), 4, 4, 3), np.uint8), np.array(labels))
    return replace(images, classes=classes, has_class_names=True)


def test_labels_are_matched_by_class_name():
    images = labelled([0, 0, 1, 2, -1], ("bird", "dog", "ufo"))
    found = relabel(images, ["cat", "dog", "frog", "bird"])
    assert found.labels.tolist() == [3, 3, 1, -1, -1]
    assert found.labels.dtype == np.int32
    assert found.classes == ("cat", "dog", "frog", "bird")


def test_relabelling_in_every_order_keeps_the_name_of_each_image():
    generator = np.random.default_rng(0)
    names = [str(number) for number in range(12)]
    for _ in range(20):
        images = labelled(
            generator.integers(12, size=50).tolist(), tuple(generator.permutation(names))
        )
        found = relabel(images, generator.permutation(names).tolist())
        before = [images.classes[label] for label in images.labels]
        assert [found.classes[label] for label in found.labels] == before


def test_labels_without_names_are_positions():
    images = from_array(np.zeros((4, 4, 4, 3), np.uint8), np.array([0, 10, 2, -1]))
    assert relabel(images, ["0", "1", "10", "2"]).labels.tolist() == [0, -1, 2, -1]
    assert relabel(images, [str(n) for n in range(11)]).labels.tolist() == [0, 10, 2, -1]


@pytest.mark.parametrize("fault", [MemoryError, RuntimeError])
def test_a_lack_of_memory_is_not_taken_for_an_unreadable_image(tmp_path, monkeypatch, fault):
    picture().save(tmp_path / "a.png")

    def fail(*_):
        raise fault("cannot allocate memory")

    monkeypatch.setattr(Transform, "__call__", fail)
    with pytest.raises(fault):
        decode(open_images(str(tmp_path)), np.arange(1), Transform(8), skip_unreadable=True)
