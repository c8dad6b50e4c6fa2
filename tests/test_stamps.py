"""Stamps: a file that has not been touched is not read again, any other is, and no line lies."""

import hashlib
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest

from ood_heatmap.cache import files
from ood_heatmap.cache import manifest as manifests
from ood_heatmap.cache.manifest import FileRecord, Manifest, write_manifest
from ood_heatmap.cache.shards import Header, map_shard, read_header, write_shard
from ood_heatmap.cache.stamps import (
    STAMPS,
    Stamp,
    check_unstamped,
    current_stamps,
    make_stamp,
    match_stamp,
    parse_stamps,
    read_stamps,
    write_stamps,
)
from ood_heatmap.errors import DamagedCacheError
from ood_heatmap.pipeline.run import open_index, open_targets
from ood_heatmap.pipeline.verify import verify

COMMAND = "ood-heatmap index runs/x ..."
OLD = 1_700_000_000_000_000_000


def age(path: Path, when: int = OLD) -> None:
    os.utime(path, ns=(when, when))


@pytest.fixture
def hashed(monkeypatch):
    """Return the names of the files that are hashed, as they are."""
    names: list[str] = []
    hash_file = files.hash_file

    def count(path: Path) -> str:
        names.append(path.name)
        return hash_file(path)

    monkeypatch.setattr(manifests, "hash_file", count)
    return names


@pytest.fixture
def stage(tmp_path):
    """Return directory and manifest of a stage with a shard and another file, not stamped yet."""
    write_shard(tmp_path / "a.h5", {"x": np.arange(6)}, attributes={"rows": "r", "num_skipped": 2})
    (tmp_path / "b.bin").write_bytes(b"content")
    records = {}
    for name in ("a.h5", "b.bin"):
        age(tmp_path / name)
        records[name] = FileRecord.from_file(tmp_path / name)
    manifest = Manifest(tmp_path.name, {}, "", {}, records)
    write_manifest(tmp_path, manifest)
    return tmp_path, manifest


def test_what_was_checked_once_is_not_read_again(stage, hashed):
    directory, manifest = stage
    check_unstamped(directory, manifest, command=COMMAND)
    assert sorted(hashed) == ["a.h5", "b.bin"]
    check_unstamped(directory, manifest, command=COMMAND)
    assert len(hashed) == 2
    age(directory / "b.bin", OLD + 1)
    check_unstamped(directory, manifest, command=COMMAND)
    assert hashed[2:] == ["b.bin"]
    assert current_stamps(directory, manifest).keys() == {"a.h5", "b.bin"}


def test_a_run_is_opened_without_reading_it_and_a_copy_is_read_once(run, hashed):
    def open_both():
        index = open_index(run)
        return index, open_targets(run, index)

    open_both()
    hashed.clear()
    index, targets = open_both()
    assert hashed == []
    for path in run.rglob("*"):
        age(path)
    open_both()
    names = [*index.manifest.files, *targets.manifest.files]
    assert sorted(hashed) == sorted(Path(name).name for name in names)
    hashed.clear()
    open_both()
    assert hashed == []


@pytest.mark.parametrize("opened", [True, False])
def test_a_changed_byte_is_found_by_its_time_and_without_one_by_verify(run, opened):
    open_index(run)
    path = run / "index" / "images-00000.h5"
    content, when = bytearray(path.read_bytes()), path.stat().st_mtime_ns
    content[-5] ^= 1
    path.write_bytes(content)
    age(path, when + 1 if opened else when)
    with pytest.raises(DamagedCacheError, match=r"images-00000\.h5 has changed"):
        open_index(run) if opened else verify(run)


def test_the_header_of_a_stamp_maps_the_same_arrays(stage):
    directory, manifest = stage
    check_unstamped(directory, manifest, command=COMMAND)
    stamp = current_stamps(directory, manifest)["a.h5"]
    assert stamp.header == read_header(directory / "a.h5")
    assert stamp.header.attributes == {"format": 1, "rows": "r", "num_skipped": 2}
    found = map_shard(directory / "a.h5", stamp.header)
    np.testing.assert_array_equal(found["x"], np.arange(6))


def test_no_flipped_bit_of_a_line_changes_more_than_what_must_be_read_again(stage, hashed):
    directory, manifest = stage
    check_unstamped(directory, manifest, command=COMMAND)
    right = current_stamps(directory, manifest)
    content, dice = (directory / STAMPS).read_bytes(), random.Random(0)
    for at in range(0, len(content), 3):
        changed = bytearray(content)
        changed[at] ^= 1 << dice.randrange(8)
        (directory / STAMPS).write_bytes(changed)
        assert current_stamps(directory, manifest).items() <= right.items()
    hashed.clear()
    check_unstamped(directory, manifest, command=COMMAND)
    assert len(hashed) == 1


def test_a_stamp_of_another_build_of_a_file_counts_for_nothing(stage):
    directory, manifest = stage
    check_unstamped(directory, manifest, command=COMMAND)
    (directory / "b.bin").write_bytes(b"CONTENT")
    age(directory / "b.bin")
    other = manifest.files | {"b.bin": FileRecord.from_file(directory / "b.bin")}
    assert current_stamps(directory, Manifest(directory.name, {}, "", {}, other)).keys() == {"a.h5"}


def test_a_file_too_young_to_tell_a_later_change_is_read_again(tmp_path):
    path = tmp_path / "b.bin"
    path.write_bytes(b"content")
    os.utime(path)
    stamp = make_stamp("b.bin", path)
    assert (stamp.mtime_ns, stamp.fits(path)) == (-1, False)
    assert match_stamp(path, [stamp]) is not None
    path.write_bytes(b"Content")
    assert match_stamp(path, [stamp]) is None


def test_a_line_of_an_earlier_version_holds_the_record_alone():
    text = '{"name": "a.h5", "sha256": "abc", "num_bytes": 3}\n{"name": "b.h5", "sha'
    assert list(parse_stamps(text)) == [Stamp("a.h5", FileRecord("abc", 3))]


def test_what_is_written_is_read_back(tmp_path):
    header = Header(
        {"rows": "r"}, {"x": (2048, (3, 2), np.dtype("<f2")), "y": (None, (0,), np.dtype("u1"))}
    )
    stamp = Stamp("ä\udcff.h5", FileRecord("abc", 3), OLD, header, "source")
    assert list(parse_stamps(stamp.to_line())) == [stamp]


def test_stamps_that_cannot_be_kept_are_no_error(stage, hashed):
    directory, manifest = stage
    (directory / STAMPS).mkdir()
    write_stamps(directory, [])
    check_unstamped(directory, manifest, command=COMMAND)
    check_unstamped(directory, manifest, command=COMMAND)
    assert len(hashed) == 4


@pytest.mark.parametrize(
    "extent",
    [
        [-4096, [6], "<i8"],
        ["0", [6], "<i8"],
        [0.5, [6], "<i8"],
        [0, [-1, 2], "<i8"],
        [0, [6.0], "<i8"],
        [0, [0, 10**30], "<i8"],
        [0, [1] * 99, "<i8"],
        [0, [6], "|O"],
        [0, [6], "|V0"],
        [0, [6], "i4,("],
    ],
)
def test_a_forged_header_is_read_from_the_shard_instead(stage, extent):
    directory, manifest = stage
    check_unstamped(directory, manifest, command=COMMAND)
    stamp = read_stamps(directory, manifest)["a.h5"]
    content = json.loads(stamp.to_line())
    content["header"]["datasets"]["x"] = extent
    text = json.dumps({key: item for key, item in content.items() if key != "checksum"})[:-1]
    checksum = hashlib.sha256(text.encode()).hexdigest()
    (directory / STAMPS).write_text(f'{text}, "checksum": "{checksum}"}}\n')
    check_unstamped(directory, manifest, command=COMMAND)
    assert read_stamps(directory, manifest)["a.h5"] == stamp


@pytest.mark.parametrize(
    "line", ['{"name": "a", "sha256": "", "num_bytes": 1e999}', "[" * 200_000, "[]", "{}", "\0"]
)
def test_a_line_that_holds_no_stamp_is_skipped(tmp_path, line):
    stamp = Stamp("a", FileRecord("0" * 64, 1))
    assert list(parse_stamps(f"{line}\n{stamp.to_line()}")) == [stamp]
