"""Files of a source that has several."""

import pytest

from ood_heatmap.errors import OodHeatmapError, UsageError
from ood_heatmap.patterns import find_files, is_pattern


def test_braces_and_stars_as_in_a_shell(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a-08.tar", "a-09.tar", "a-10.tar", "b-08.tar", "c.tar", ".hidden.tar"):
        (tmp_path / name).write_bytes(b"")
    assert find_files("a-{08..10}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert find_files("{b,a}-08.tar") == ["b-08.tar", "a-08.tar"]
    assert find_files("{b,a}-{08..08}.tar") == ["b-08.tar", "a-08.tar"]
    assert find_files("*.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "b-08.tar", "c.tar"]
    assert find_files("{c,a-*}.tar") == ["c.tar", "a-08.tar", "a-09.tar", "a-10.tar"]
    assert find_files("a-0[89].tar") == ["a-08.tar", "a-09.tar"]


def test_a_file_whose_name_looks_like_a_pattern_is_a_file(tmp_path):
    (tmp_path / "a[1].tar").write_bytes(b"")
    assert not is_pattern(str(tmp_path / "a[1].tar"))
    assert is_pattern(str(tmp_path / "a[2].tar"))
    assert not is_pattern("cifar10/test")
    assert find_files(f"{tmp_path}/{{a[1],a[1]}}.tar") == [str(tmp_path / "a[1].tar")] * 2


def test_what_is_not_there_is_named(tmp_path):
    (tmp_path / "1.tar").write_bytes(b"")
    with pytest.raises(OodHeatmapError, match=r"no file .*/2\.tar, which .*\{1\.\.3\}\.tar names"):
        find_files(f"{tmp_path}/{{1..3}}.tar")
    with pytest.raises(OodHeatmapError, match=r"no file .*/\*\.parquet"):
        find_files(f"{tmp_path}/*.parquet")


@pytest.mark.parametrize("pattern", ["{0..999999999}", "{0..999}{0..999}{0..999}"])
def test_a_pattern_of_any_number_of_files_ends(pattern):
    with pytest.raises(UsageError, match="names more than 1000000 files"):
        find_files(pattern)
