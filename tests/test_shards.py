"""Shards: what was written is what is mapped; damage and a full disk leave no lie behind."""

import ctypes
import errno
import mmap
import os
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ood_heatmap.cache import shards
from ood_heatmap.cache.shards import (
    Column,
    Rows,
    bytes_per_row,
    map_shard,
    open_rows,
    read_attributes,
    take_ascending,
    write_shard,
)
from ood_heatmap.errors import DamagedCacheError, OodHeatmapError


def example(num_rows: int = 6) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {
        "heatmap": generator.integers(-255, 256, (num_rows, 3, 4, 4)).astype(np.int16),
        "features": generator.normal(size=(num_rows, 5)).astype(np.float32),
        "row": np.arange(num_rows),
    }


@given(
    array=hnp.arrays(
        st.sampled_from([np.int16, np.float32, np.uint8, np.int64, np.float16]),
        hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=5),
        elements=st.integers(0, 100),
    )
)
def test_h5py_and_the_map_read_what_was_written(array, tmp_path_factory):
    path = tmp_path_factory.mktemp("shard") / "a.h5"
    write_shard(path, {"values": array})
    with h5py.File(path) as file:
        np.testing.assert_array_equal(file["values"][...], array)
        assert file["values"].dtype == array.dtype
    np.testing.assert_array_equal(map_shard(path)["values"], array)


def test_arrays_in_any_memory_order_are_written_in_row_order(tmp_path):
    array = np.asfortranarray(np.arange(24).reshape(4, 6))
    write_shard(tmp_path / "a.h5", {"values": array[:, ::-1]})
    np.testing.assert_array_equal(map_shard(tmp_path / "a.h5")["values"], array[:, ::-1])


def test_the_same_arrays_give_the_same_bytes(tmp_path):
    for name in ("a.h5", "b.h5"):
        write_shard(tmp_path / name, example(), attributes={"fingerprint": "f"})
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()


def test_datasets_are_contiguous_and_explain_themselves(tmp_path):
    write_shard(
        tmp_path / "a.h5",
        example(),
        attributes={"fingerprint": "abc"},
        columns={
            "heatmap": Column("int16", (3, 4, 4), "difference", {"scale": 1 / 255}),
            "features": Column("float32", (5,), "features"),
            "row": Column("int64", (), "row"),
        },
    )
    with h5py.File(tmp_path / "a.h5") as file:
        assert file["heatmap"].chunks is None
        assert file["heatmap"].compression is None
        assert file["heatmap"].attrs["scale"] == 1 / 255
        assert file["heatmap"].attrs["about"] == "difference"
    assert read_attributes(tmp_path / "a.h5")["fingerprint"] == "abc"


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("row", Column("int32", (), "another dtype")),
        ("features", Column("float32", (4,), "another shape")),
    ],
)
def test_arrays_that_are_not_the_columns_are_refused(tmp_path, name, column):
    columns = {
        "heatmap": Column("int16", (3, 4, 4), ""),
        "features": Column("float32", (5,), ""),
        "row": Column("int64", (), ""),
    }
    assert bytes_per_row(columns) == sum(array[0].nbytes for array in example().values())
    path = tmp_path / "a.h5"
    write_shard(path, example(), columns=columns)
    open_rows([path], columns)
    with pytest.raises(DamagedCacheError, match=f"dataset {name} of the shards is missing or not"):
        open_rows([path], columns | {name: column})
    with pytest.raises(ValueError, match="do not match its columns"):
        write_shard(path, example(), columns=columns | {name: column})
    del columns[name]
    with pytest.raises(ValueError, match="do not match its columns"):
        write_shard(path, example(), columns=columns)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
def test_many_shards_are_mapped_without_a_descriptor_each(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    for number in range(50):
        write_shard(tmp_path / f"{number}.h5", example())
    rows = open_rows([tmp_path / f"{number}.h5" for number in range(50)])
    assert len(os.listdir("/proc/self/fd")) == before
    assert rows["row"].shape == (300,)
    with pytest.raises(ValueError, match="read-only"):
        rows["row"].arrays[0][0] = 1


def test_more_shards_are_opened_than_files_may_be(tmp_path):
    resource = pytest.importorskip("resource")
    paths = [tmp_path / f"{number}.h5" for number in range(400)]
    write_shard(paths[0], example())
    for path in paths[1:]:
        shutil.copy(paths[0], path)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        rows = open_rows(paths)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    np.testing.assert_array_equal(rows["row"].read(), np.tile(np.arange(6), 400))


@pytest.mark.parametrize("num_shards", [10, 1000])
def test_a_batch_touches_only_its_own_shards(num_shards):
    class Counted(list):
        touched = 0

        def __getitem__(self, index):
            Counted.touched += 1
            return super().__getitem__(index)

        def __iter__(self):
            raise AssertionError("a loop over all shards")

    whole = np.arange(num_shards * 3)
    rows = Rows(np.split(whole, num_shards))
    object.__setattr__(rows, "arrays", Counted(rows.arrays))
    wanted, out = np.array([1, 2, 4, 12, 13, 29]), np.empty(6, np.int64)
    take_ascending([rows], wanted, [out])
    np.testing.assert_array_equal(out, wanted)
    assert Counted.touched == 4


def test_too_many_maps_are_named_with_the_way_out(tmp_path, monkeypatch):
    write_shard(tmp_path / "a.h5", example())
    monkeypatch.setattr(ctypes, "get_errno", lambda: errno.ENOMEM)
    monkeypatch.setattr(mmap, "MAP_SHARED", 0)
    with pytest.raises(OodHeatmapError, match=r"a\.h5 cannot be mapped.*vm\.max_map_count"):
        map_shard(tmp_path / "a.h5")


def test_unequal_numbers_of_rows_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"equally many rows.*'a': 2.*'b': 3"):
        write_shard(tmp_path / "a.h5", {"a": np.zeros(2), "b": np.zeros(3)})


def test_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shards, "reserve", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path / "a.h5", example())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("function", ["posix_fallocate", "fsync", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_refused_write_is_one_line_and_keeps_the_old_file(tmp_path, monkeypatch, function, code):
    path = tmp_path / "a.h5"
    write_shard(path, example(3))
    before = path.read_bytes()

    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, function, refuse)
    with pytest.raises(
        OodHeatmapError, match="no space left" if code == errno.ENOSPC else "cannot"
    ):
        write_shard(path, example(6))
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["a.h5"]


@pytest.mark.parametrize("keep", [0, 100, 2000, -1])
def test_a_file_cut_short_is_refused(tmp_path, keep):
    path = tmp_path / "a.h5"
    write_shard(path, example())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DamagedCacheError, match=r"a\.h5"):
        map_shard(path)


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.EMFILE])
def test_what_the_system_refuses_to_read_is_not_called_damaged(tmp_path, monkeypatch, code):
    write_shard(tmp_path / "a.h5", example())

    def refuse(*_: object, **__: object) -> None:
        raise OSError(f"Unable to open file (file read failed: errno = {code}, flags = 0)")

    monkeypatch.setattr(h5py, "File", refuse)
    with pytest.raises(OodHeatmapError, match=f"cannot read .*: {os.strerror(code)}") as caught:
        map_shard(tmp_path / "a.h5")
    assert "elete" not in str(caught.value)


def test_what_the_system_refuses_to_map_is_not_called_damaged(tmp_path, monkeypatch):
    write_shard(tmp_path / "a.h5", example())
    monkeypatch.setattr(mmap, "MAP_SHARED", 0)  # the system knows no map of this kind
    with pytest.raises(OodHeatmapError, match=r"cannot read .*a\.h5: Invalid argument"):
        map_shard(tmp_path / "a.h5")


def test_a_dataset_that_cannot_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise KeyError("unable to open object (file read failed: errno = 5)")

    write_shard(tmp_path / "a.h5", example())
    monkeypatch.setattr(h5py.Group, "__getitem__", refuse)
    with pytest.raises(OodHeatmapError, match=r"cannot read .*a\.h5: Input/output error"):
        map_shard(tmp_path / "a.h5")


def test_a_file_that_is_no_shard_has_no_attributes(tmp_path):
    (tmp_path / "a.h5").write_bytes(b"not HDF5")
    assert read_attributes(tmp_path / "a.h5") == {}


def test_a_chunked_dataset_is_refused(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.attrs["format"] = shards.FORMAT
        file.create_dataset("heatmap", data=np.zeros((8, 2)), chunks=(4, 2))
    with pytest.raises(DamagedCacheError, match="heatmap is truncated or not contiguous"):
        map_shard(tmp_path / "a.h5")


def test_another_format_is_refused_by_number(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "FORMAT", 99)
    write_shard(tmp_path / "a.h5", example())
    monkeypatch.undo()
    with pytest.raises(DamagedCacheError, match="format 99, this version reads 1"):
        map_shard(tmp_path / "a.h5")


@given(
    sizes=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    picks=st.lists(st.integers(0, 10**6), max_size=12),
)
def test_rows_over_shards_read_as_one_array(sizes, picks):
    whole = np.random.default_rng(1).integers(0, 99, (sum(sizes), 2))
    rows = Rows(np.split(whole, np.cumsum(sizes)[:-1]))
    wanted = np.array([pick % max(len(whole), 1) for pick in picks if len(whole)], dtype=np.int64)
    np.testing.assert_array_equal(rows.take(wanted), whole[wanted])
    np.testing.assert_array_equal(rows.read(), whole)
    assert rows.shape == whole.shape


@pytest.mark.parametrize("row", [-1, 6])
@pytest.mark.parametrize("parts", [1, 2])
def test_a_row_out_of_range_is_an_error_not_another_row(row, parts):
    rows = Rows(np.array_split(np.arange(6), parts))
    with pytest.raises(IndexError):
        rows.take(np.array([0, row]))


def test_shards_with_other_datasets_do_not_go_together(tmp_path: Path):
    write_shard(tmp_path / "a.h5", {"x": np.zeros((2, 3))})
    write_shard(tmp_path / "b.h5", {"x": np.zeros((2, 4))})
    with pytest.raises(DamagedCacheError, match=r"b\.h5 does not have the same datasets as a\.h5"):
        open_rows([tmp_path / "a.h5", tmp_path / "b.h5"])
