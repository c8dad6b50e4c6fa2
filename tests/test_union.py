"""Several sets as one: rows, labels, names and fingerprints."""

import json

import h5py
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from ood_heatmap.cli import main
from ood_heatmap.decoding import decode
from ood_heatmap.errors import OodHeatmapError, UsageError
from ood_heatmap.images import Transform
from ood_heatmap.pipeline.config import IndexConfig
from ood_heatmap.pipeline.index import build_index
from ood_heatmap.source_array import from_array
from ood_heatmap.sources import open_images, open_union, reopen_images
from ood_heatmap.union import unite


def write_classes(root, *names):
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), (number, len(str(root)), 0)).save(root / name / "x.png")
    return str(root)


def test_one_source_is_opened_as_it_is(data):
    one, same = open_union([str(data / "id")]), open_images(str(data / "id"))
    assert one.describe() == same.describe()
    assert one.source == same.source


def test_rows_of_a_union_are_those_of_its_parts_in_order(tmp_path):
    folder = write_classes(tmp_path / "a", "cat", "dog")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3)).astype(np.uint8)
    np.save(tmp_path / "b.npy", pixels)
    parts = [open_images(folder), open_images(str(tmp_path / "b.npy"))]
    union = open_union([folder, str(tmp_path / "b.npy")])
    assert list(union.names) == [f"{folder}/cat/x.png", f"{folder}/dog/x.png"] + [
        f"{tmp_path}/b.npy/{row}" for row in range(3)
    ]
    assert union.labels.tolist() == [0, 1, -1, -1, -1]
    transform, rows = Transform(8), np.array([1, 2, 4])
    found = decode(union, rows, transform)
    wanted = [decode(parts[0], rows[:1], transform), decode(parts[1], rows[1:] - 2, transform)]
    np.testing.assert_array_equal(found.pixels, np.concatenate([one.pixels for one in wanted]))
    assert found.digests == b"".join(one.digests for one in wanted)
    assert [union.digest(row) for row in (1, 4)] == [parts[0].digest(1), parts[1].digest(2)]
    assert union.stamps is not None
    np.testing.assert_array_equal(union.stamps, np.concatenate([one.stamps for one in parts]))


def test_a_part_without_stamps_leaves_the_union_without(tmp_path):
    folder = open_images(write_classes(tmp_path / "a", "cat"))
    assert unite([folder, from_array(np.zeros((1, 8, 8, 3), np.uint8))]).stamps is None


def test_classes_are_matched_by_name(tmp_path):
    one = write_classes(tmp_path / "one", "c10", "dog")
    two = write_classes(tmp_path / "two", "c2", "c10")
    union = open_union([one, two])
    assert union.classes == ("c10", "c2", "dog")
    assert union.labels.tolist() == [0, 2, 0, 1]
    natural = open_union([one, two], class_order="natural")
    assert natural.classes == ("c2", "c10", "dog")
    assert natural.labels.tolist() == [1, 2, 0, 1]
    assert len({union.listing, natural.listing, open_union([two, one]).listing}) == 3


def test_the_listing_of_a_union_changes_with_the_order_of_its_classes(tmp_path):
    sources = [write_classes(tmp_path / name, name) for name in ("c2", "c10")]
    by_name, natural = (open_union(sources, class_order=order) for order in ("name", "natural"))
    assert by_name.labels.tolist() == [1, 0]
    assert natural.labels.tolist() == [0, 1]
    assert by_name.listing != natural.listing


def test_a_set_that_has_all_classes_says_their_order(tmp_path):
    part = open_images(write_classes(tmp_path / "a", "cat", "emu"))
    whole = from_array(np.zeros((2, 8, 8, 3), np.uint8), np.array(["emu", "cat"]))
    whole = type(whole)(**{**vars(whole), "classes": ("emu", "dog", "cat")})
    union = unite([part, whole])
    assert union.classes == ("emu", "dog", "cat")
    assert union.labels.tolist() == [2, 0, 1, 0]
    # a set of another order that lacks a class cannot be matched with one that has it
    fewer = type(whole)(**{**vars(whole), "classes": ("dog", "cat")})
    with pytest.raises(OodHeatmapError, match="are not numbered in the order 'name'"):
        unite([part, fewer])
    assert unite([part, fewer], need_labels=False).classes == ("cat", "dog", "emu")


def test_numbers_are_not_matched_with_names(tmp_path):
    named = open_images(write_classes(tmp_path / "a", "cat", "dog"))
    numbered = from_array(np.zeros((2, 8, 8, 3), np.uint8), np.array([1, 2]))
    with pytest.raises(OodHeatmapError, match=r"array has class numbers and .*a has class names"):
        unite([named, numbered])
    union = unite([named, numbered], need_labels=False)
    assert union.labels.tolist() == [0, 1, -1, -1]
    assert union.class_names == ("cat", "dog")
    numbers = unite([numbered, from_array(np.zeros((1, 8, 8, 3), np.uint8), np.array([4]))])
    assert numbers.labels.tolist() == [1, 2, 4]
    assert (numbers.classes, numbers.has_class_names) == (("0", "1", "2", "3", "4"), False)


def test_a_source_named_twice_is_refused(data):
    with pytest.raises(UsageError, match="ood is named twice"):
        open_union([str(data / "ood"), str(data / "ood")])


def test_a_union_is_opened_again_by_the_name_that_a_manifest_has(tmp_path):
    one = write_classes(tmp_path / "one + half", "cat")
    two = write_classes(tmp_path / "two", "dog")
    union = open_union([one, two])
    with pytest.raises(OodHeatmapError):
        reopen_images(union.source)
    (tmp_path / "one + half").rename(tmp_path / "one")
    union = open_union([str(tmp_path / "one"), two])
    assert union.source == f"{tmp_path / 'one'} + {two}"
    assert reopen_images(union.source).listing == union.listing


def test_parts_of_a_folder_make_the_index_of_the_folder(data, classifier, tmp_path):
    for label in range(4):
        part = tmp_path / ("first" if label < 2 else "second")
        part.mkdir(exist_ok=True)
        (part / f"class{label}").symlink_to(data / "id" / f"class{label}")
    whole = open_images(str(data / "id"))
    union = open_union([str(tmp_path / "first"), str(tmp_path / "second")])
    config = IndexConfig(batch_size=16)
    manifests = [
        build_index(tmp_path / name, images, classifier, config)
        for name, images in (("whole", whole), ("union", union))
    ]
    for name in ("accuracy", "classes", "class_counts", "num_images"):
        assert manifests[0].results[name] == manifests[1].results[name]
    assert manifests[1].results["source"] == union.source
    assert manifests[1].content == manifests[0].content
    with (
        h5py.File(tmp_path / "whole" / "index" / "images-00000.h5") as wanted,
        h5py.File(tmp_path / "union" / "index" / "images-00000.h5") as found,
    ):
        assert set(found) == set(wanted)
        for name in wanted:
            np.testing.assert_array_equal(found[name][...], wanted[name][...])


def test_the_limit_is_of_the_union(data, run):
    def targets(*arguments):
        command = ["targets", str(run), "--ood", str(data / "ood"), "--patched", "0", *arguments]
        return CliRunner().invoke(main, [*command, "--overwrite", "--allow-suspicious"])

    result = targets("--ood", str(data / "far"), "--limit", "75")
    assert result.exit_code == 0, result.output
    results = json.loads((run / "targets" / "manifest.json").read_text())["results"]
    assert results["num_images"] == 75
    assert results["source"] == f"{data / 'ood'} + {data / 'far'}"
    result = targets("--ood", str(data / "far"), "--limit", "76")
    assert "far has 75 images, --limit asks for 76" in result.output
