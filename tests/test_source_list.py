"""Lists and tables of image files; every fault ends in one line."""

import os

import numpy as np
import pytest
from PIL import Image

from ood_heatmap.decoding import decode
from ood_heatmap.errors import OodHeatmapError
from ood_heatmap.images import Transform
from ood_heatmap.sources import open_images


@pytest.fixture
def folder(tmp_path):
    for number, name in enumerate(("a.png", "b c.png", "sub/d,e.png")):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(path)
    return tmp_path


def write(folder, name, text):
    (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return str(folder / name)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tabs.txt", "a.png\tdog\nb c.png\tcat\nsub/d,e.png\tdog\n"),
        ("windows.txt", "\ufeffa.png\tdog\r\nb c.png\tcat\r\n\r\nsub/d,e.png\tdog"),
        ("table.csv", 'path,label\na.png,dog\nb c.png,cat\n"sub/d,e.png",dog\n'),
        (
            "more.csv",
            '\ufeffid,Label,File_Name\r\n7,dog,a.png\r\n8,cat,b c.png\r\n9,dog,"sub/d,e.png"',
        ),
        ("table.tsv", "label\timage\ndog\ta.png\ncat\tb c.png\ndog\tsub/d,e.png\n"),
    ],
)
def test_paths_and_class_names_are_read_in_order(folder, name, text):
    images = open_images(write(folder, name, text))
    assert list(images.names) == ["a.png", "b c.png", "sub/d,e.png"]
    assert images.labels.tolist() == [1, 0, 1]
    assert images.class_names == ("cat", "dog")
    pixels = decode(images, np.arange(3), Transform(8)).pixels
    assert pixels[:, 0, 0, 0].tolist() == [0, 1, 2]


def test_a_space_before_a_number_is_a_label_as_in_lists_of_caffe(folder):
    images = open_images(write(folder, "list.txt", "a.png 3\nb c.png -1\nsub/d,e.png 0\n"))
    assert list(images.names) == ["a.png", "b c.png", "sub/d,e.png"]
    assert images.labels.tolist() == [3, -1, 0]
    assert (images.classes, images.has_class_names) == (("0", "1", "2", "3"), False)


def test_paths_alone_have_no_labels(folder):
    for name, text in (("l.txt", "b c.png\na.png\n"), ("l.csv", "path\nb c.png\na.png\n")):
        images = open_images(write(folder, name, text))
        assert list(images.names) == ["b c.png", "a.png"]
        assert images.labels.tolist() == [-1, -1]
        assert images.classes == ()


def test_absolute_paths_and_names_of_any_bytes_are_read(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    raw = os.fsencode(folder) + b"/caf\xe9.png"
    Image.new("RGB", (8, 8), (9, 0, 0)).save(os.fsdecode(raw))
    images = open_images(write(elsewhere, "list.txt", raw + b"\n"))
    assert list(images.names) == [f"{folder}/caf\\udce9.png"]
    assert decode(images, np.arange(1), Transform(8)).pixels[0, 0, 0, 0] == 9


def test_a_file_that_is_missing_is_unreadable(folder):
    images = open_images(write(folder, "list.txt", "a.png\ngone.png\nnull\0.png\n"))
    batch = decode(images, np.arange(3), Transform(8), skip_unreadable=True)
    assert [(item.row, item.name) for item in batch.skipped] == [
        (1, "gone.png"),
        (2, "null\\x00.png"),
    ]


def test_the_listing_changes_with_paths_order_and_labels(folder):
    texts = ["a.png\t0\nb c.png\t1\n", "a.png\t1\nb c.png\t0\n", "b c.png\t1\na.png\t0\n"]
    listings = {open_images(write(folder, "list.txt", text)).listing for text in texts}
    assert len(listings) == 3
    named = {open_images(write(folder, "l.txt", f"a.png\t{name}\n")).listing for name in "cd"}
    assert len(named) == 2


def test_class_names_in_natural_order(folder):
    source = write(folder, "list.txt", "a.png\tc10\nb c.png\tc2\n")
    assert open_images(source).classes == ("c10", "c2")
    natural = open_images(source, class_order="natural")
    assert natural.classes == ("c2", "c10")
    assert natural.labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("l.txt", "", "l.txt lists no images"),
        ("l.csv", "path,label\n", "l.csv lists no images"),
        ("l.csv", "", r"l.csv has the columns \(none\), none of which is path"),
        ("l.csv", "x,y\na.png,0\n", "l.csv has the columns x, y, none of which is path"),
        ("l.csv", "path,label\na.png,0\nb c.png\n", "line 3 of .*l.csv has 1 columns"),
        ("l.csv", f"path\n{'x' * 200_000}\n", "l.csv cannot be read as a list of images"),
        ("l.txt", "x.png\ny.png\n", "none of the 2 files that .*l.txt lists exists, x.png first"),
        ("l.txt", f"a.png\t{'x' * 1001}\n", "l.txt has a label that is not a class"),
        ("l.txt", "a.png\t-7\n", "l.txt has the label -7"),
    ],
)
def test_what_is_wrong_with_a_list_is_one_line(folder, name, text, message):
    with pytest.raises(OodHeatmapError, match=message):
        open_images(write(folder, name, text))
    with pytest.raises(OodHeatmapError, match=r"gone\.csv cannot be read .*No such file"):
        open_images(str(folder / "gone.csv"))
