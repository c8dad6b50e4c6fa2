"""Folders and lists of paths as image sets; every fault ends in one line."""

import hashlib
import io
import logging
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features
from torchvision.datasets import ImageFolder

from ood_heatmap.decoding import decode
from ood_heatmap.errors import OodHeatmapError
from ood_heatmap.images import Transform, UnreadableImageError
from ood_heatmap.source_folder import (
    find_images,
    from_paths,
    image_suffixes,
    open_folder,
    read_file,
)
from ood_heatmap.sources import open_images


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
    assert list(images.names) == ["cat/deep/a.PNG", "cat/x.png", "dog/b.png"]
    assert images.labels.tolist() == [0, 0, 1]
    assert images.classes == ("cat", "dog")


def test_a_flat_folder_has_no_labels(tmp_path):
    picture().save(tmp_path / "b.png")
    picture().save(tmp_path / "a.jpg")
    images = open_images(str(tmp_path))
    assert list(images.names) == ["a.jpg", "b.png"]
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


def test_links_to_folders_are_followed(tmp_path):
    elsewhere = write_pictures(tmp_path / "elsewhere", "x.png", "deep/y.png")
    root = write_pictures(tmp_path / "set", "cat/a.png", "dog/b.png")
    (root / "cat" / "more").symlink_to(elsewhere)
    (root / "emu").symlink_to(elsewhere)
    images = open_images(str(root))
    theirs = ImageFolder(str(root))
    # their files come before their folders
    assert list(images.names) == sorted(os.path.relpath(path, root) for path, _ in theirs.samples)
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
    assert list(images.names) == ["cat/a.png", "cat/dogs/b.png", "dog/b.png", "dog/cats/a.png"]
    assert images.classes == ("cat", "dog")
    assert "broken link or special file 1, link to a folder above 5" in caplog.text


def test_files_left_out_are_counted_by_suffix_and_hidden_ones_are_not(tmp_path, caplog):
    write_pictures(tmp_path, "a.png", "b.jfif", "c.JPE", "d.jfi", ".hidden.png", ".dir/e.png")
    for name in ("f.heic", "g.HEIC", "notes.txt", "README", "._a.png", ".DS_Store"):
        (tmp_path / name).write_bytes(b"-")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.png")
    images = open_images(str(tmp_path))
    assert list(images.names) == ["a.png", "b.jfif", "c.JPE", "d.jfi"]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.message == (
        f"{tmp_path}: files skipped: .heic 2, .txt 1, broken link or special file 2, no suffix 1"
    )
    assert decode(images, np.arange(4), Transform(8)).rows.tolist() == [0, 1, 2, 3]


def test_avif_is_an_image_where_pillow_reads_it():
    assert (".avif" in image_suffixes()) == ("avif" in features.get_supported())


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
    assert list(images.names) == [f"cat/{shown}.png", f"dog{shown}/{shown}.png"]
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
    images = open_folder(root, class_order="natural")
    assert images.classes == tuple(str(number) for number in range(1, 12))
    assert images.labels.tolist() == list(range(11))
    assert list(images.names) == [f"{number}/a.png" for number in range(1, 12)]
    assert images.listing != open_folder(root).listing
    assert open_images(str(root), class_order="natural").classes == images.classes


def test_paths_as_a_set(tmp_path):
    write_pictures(tmp_path, "b/x.png", "a/x.png")
    paths = [tmp_path / "b" / "x.png", tmp_path / "gone.png", tmp_path / "a" / "x.png"]
    images = from_paths(paths)
    assert list(images.names) == [str(path) for path in paths]
    batch = decode(images, np.arange(3), Transform(8), skip_unreadable=True)
    assert batch.rows.tolist() == [0, 2]
    (skipped,) = batch.skipped
    assert (skipped.row, skipped.name) == (1, str(paths[1]))
    assert skipped.reason == "No such file or directory"
    with pytest.raises(UnreadableImageError, match=r"gone\.png"):
        images.digest(1)


def test_a_pipe_in_a_list_is_unreadable_instead_of_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    # the device first: it tells without blocking
    for path in (Path(os.devnull), tmp_path / "pipe.png"):
        with pytest.raises(UnreadableImageError, match=rf"{path.name} .*\(not a regular file\)"):
            from_paths([path]).read(0)


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


def test_the_order_is_that_of_paths_not_of_their_text(tmp_path):
    names = ("cat/a.png", "cat-x/a.png", "cat!/b.png", "cat/a/z.png", "Z/b.png", "\u00fc/c.png")
    write_pictures(tmp_path, *names)
    found = sorted(tmp_path.rglob("*.png"))
    assert find_images(tmp_path) == found
    assert list(open_images(str(tmp_path)).names) == [
        str(path.relative_to(tmp_path)) for path in found
    ]
