"""Names in the output folder of ``predict``."""

from pathlib import Path

import pytest

from ood_heatmap.pipeline.result_folder import common_folder, mirrored_names


def names_of(paths: list[str], root: str = "/r") -> list[str]:
    return mirrored_names([Path(root, path) for path in paths], Path(root))


def test_names_are_those_of_the_images():
    names = ["a.jpg", "b/a.jpg", "b/a.PNG", "b c/ä.v2.jpeg", "b/x.jfif"]
    assert names_of(names) == names


def test_other_formats_and_no_format_become_png():
    assert names_of(["a.webp", "b/7", "c.tif", "d."]) == [
        "a.webp.png",
        "b/7.png",
        "c.tif.png",
        "d_.png",
    ]


def test_names_that_differ_in_case_only_or_in_what_is_replaced_get_a_number():
    names = ["a/x.png", "A/X.png", "a/x.PNG", "a/x?.png", "a/x*.png", "a/x-2.png", "a/x"]
    found = names_of(names)
    assert len({name.casefold() for name in found}) == len(names)
    assert found[:3] == ["a/x.png", "A/X-2.png", "a/x-2.PNG"] or found[2].startswith("a/x-")
    assert found[3:5] == ["a/x_.png", "a/x_-2.png"]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("..a/b.png", "_.a/b.png"),
        (".a/=b.png", "_a/_b.png"),
        ("a./b .png", "a_/b_.png"),
        ("a\\b:c/d|e.png", "a_b_c/d_e.png"),
        ("line\nbreak.png", "line_break.png"),
    ],
)
def test_parts_that_a_system_does_not_allow_are_replaced(name, wanted):
    assert names_of([name]) == [wanted]


def test_long_names_are_cut_and_remain_different():
    found = names_of([f"{'a' * 200}{number}.jpg" for number in range(3)] + [f"{'ä' * 90}/x.jpg"])
    assert len(set(found)) == 4
    assert all(len(part.encode()) <= 124 for name in found for part in name.split("/"))
    assert all(name.endswith(".jpg") for name in found)


def test_no_name_leaves_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = [Path("../x/a.png"), Path("b.png"), Path("/etc/../c.png")]
    found = mirrored_names(paths, common_folder((), paths))
    for name in [*found, *mirrored_names(paths, None)]:
        assert not Path(name).is_absolute()
        assert ".." not in Path(name).parts


def test_the_common_folder_is_the_one_named_although_all_images_are_in_one_below(tmp_path):
    (tmp_path / "photos" / "cats").mkdir(parents=True)
    (tmp_path / "more").mkdir()
    photo, more = tmp_path / "photos" / "cats" / "a.jpg", tmp_path / "more" / "b.jpg"
    photos = tmp_path / "photos"
    assert common_folder([photos], [photo]) == photos
    assert mirrored_names([photo], photos) == ["cats/a.jpg"]
    assert common_folder([photo], [photo]) == photo.parent
    assert common_folder([photos, more], [photo, more]) == tmp_path
    assert common_folder([Path("-")], [photo, more]) == tmp_path
