"""The reader of shards: the bytes of a plain gather, however the system delivers them."""

import errno
import fcntl
import os
import resource
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ood_heatmap.cache import reader
from ood_heatmap.cache.reader import RowReader
from ood_heatmap.cache.shards import Rows, open_rows, write_shard
from ood_heatmap.errors import DamagedCacheError, OodHeatmapError

SIZES = (5, 1, 9, 3)
NUM_ROWS = sum(SIZES)


def arrays() -> dict[str, NDArray[Any]]:
    generator = np.random.default_rng(0)
    return {
        "heatmap": generator.integers(-255, 256, (NUM_ROWS, 3, 40, 40)).astype(np.int16),
        "features": generator.normal(size=(NUM_ROWS, 5)).astype(np.float32),
        "maps": generator.normal(size=(NUM_ROWS, 2, 3, 3)).astype(np.float16),
        "prediction": generator.integers(9, size=NUM_ROWS).astype(np.int32),
    }


@pytest.fixture(scope="module")
def columns(tmp_path_factory):
    return opened(write(tmp_path_factory.mktemp("shards")))


def write(folder: Path) -> Path:
    edges = np.cumsum((0, *SIZES))
    for number, (first, last) in enumerate(pairwise(edges)):
        shard = {name: array[first:last] for name, array in arrays().items()}
        write_shard(folder / f"{number}.h5", shard)
    return folder


def opened(folder: Path) -> dict[str, Rows]:
    return open_rows(sorted(folder.glob("*.h5")))


def read(reader: RowReader, rows: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    # not zeros: what is never written must not look right
    outs = {name: np.full_like(array[: len(rows)], 77) for name, array in arrays().items()}
    outs = {name: np.repeat(out[:1], len(rows), axis=0) for name, out in outs.items()}
    reader.read(rows, outs)
    return outs


def check(found: dict[str, NDArray[Any]], rows: NDArray[np.int64]) -> None:
    for name, array in arrays().items():
        np.testing.assert_array_equal(found[name], array[rows])


PREADV = os.preadv


def few_bytes(file: int, buffers: list[Any], offset: int, flags: int = 0) -> int:
    """Deliver at most 1,000 bytes at a time."""
    return PREADV(file, [memoryview(buffers[0])[:1000]], offset, flags)


def no_flags(file: int, buffers: list[Any], offset: int, flags: int = 0) -> int:
    """Refuse to say what is in the page cache, as some file systems do."""
    if flags:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
    return PREADV(file, buffers, offset, flags)


def not_cached(file: int, buffers: list[Any], offset: int, flags: int = 0) -> int:
    """Have nothing in the page cache, and deliver few bytes."""
    if flags:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
    return few_bytes(file, buffers, offset)


def not_cached_blocks(file: int, buffers: list[Any], offset: int, flags: int = 0) -> int:
    """Have nothing in the page cache, and deliver a block at a time."""
    if flags:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
    return PREADV(file, [memoryview(buffers[0])[:4096]], offset)


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("large_row", [0, 8000, 1 << 30])
@pytest.mark.parametrize("preadv", [PREADV, few_bytes, no_flags, not_cached, not_cached_blocks])
@settings(max_examples=20)
@given(rows=st.lists(st.integers(0, NUM_ROWS - 1), max_size=40).map(sorted))
def test_any_ascending_rows_are_those_of_a_plain_gather(columns, large_row, preadv, direct, rows):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader, "_LARGE_ROW", large_row)
        patch.setattr(os, "preadv", preadv)
        rows = np.array(rows, np.int64)
        check(read(RowReader(columns, direct=direct), rows), rows)


def test_contiguous_rows_are_one_read_and_all_are_requested_before_the_first(columns, monkeypatch):
    events: list[tuple[str, int]] = []

    def preadv(file: int, buffers: list[Any], offset: int, flags: int = 0) -> int:
        if flags:
            return not_cached(file, buffers, offset, flags)
        events.append(("read", len(buffers[0])))
        return PREADV(file, buffers, offset)

    def advise(file: int, offset: int, num_bytes: int, advice: int) -> None:
        if advice == os.POSIX_FADV_WILLNEED:
            events.append(("request", num_bytes))

    monkeypatch.setattr(reader, "_LARGE_ROW", 0)
    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(os, "posix_fadvise", advise)
    rows = np.array([0, 1, 2, 4, 6, 7, 16])
    RowReader({"heatmap": columns["heatmap"]}).read(
        rows, {"heatmap": np.empty((7, 3, 40, 40), np.int16)}
    )
    sizes = [9600 * count for count in (3, 1, 2, 1)]
    assert events == [("request", size) for size in sizes] + [("read", size) for size in sizes]


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("preadv", [PREADV, not_cached])
@pytest.mark.parametrize("large_row", [0, 1 << 30])
def test_a_truncated_shard_is_named(tmp_path, monkeypatch, large_row, preadv, direct):
    monkeypatch.setattr(reader, "_LARGE_ROW", large_row)
    monkeypatch.setattr(os, "preadv", preadv)
    shards = RowReader(opened(write(tmp_path)), direct=direct)
    os.truncate(tmp_path / "2.h5", 5000)
    read(shards, np.arange(6))
    with pytest.raises(DamagedCacheError, match=r"2\.h5 was truncated .*Delete it") as caught:
        read(shards, np.arange(12))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("direct", [False, True])
def test_a_shard_that_ends_while_it_is_read_is_named(columns, monkeypatch, direct):
    monkeypatch.setattr(reader, "_LARGE_ROW", 0)
    monkeypatch.setattr(os, "preadv", lambda file, buffers, offset, flags=0: 0)
    with pytest.raises(DamagedCacheError, match=r"0\.h5 was truncated"):
        read(RowReader(columns, direct=direct), np.array([0]))


@pytest.mark.parametrize("direct", [False, True])
def test_a_disk_that_fails_is_one_line_with_the_shard(columns, monkeypatch, direct):
    def fail(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(reader, "_LARGE_ROW", 0)
    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(OodHeatmapError, match=r"^cannot read .*1\.h5: Input/output error\.$"):
        read(RowReader(columns, direct=direct), np.array([5]))


def test_a_shard_that_is_gone_is_named(tmp_path):
    shards = RowReader(opened(write(tmp_path)))
    (tmp_path / "1.h5").unlink()
    with pytest.raises(OodHeatmapError, match=r"cannot read .*1\.h5: No such file"):
        read(shards, np.array([5]))


@pytest.mark.parametrize("rows", [[-1, 0], [3, NUM_ROWS]])
def test_a_row_out_of_range_is_refused(columns, rows):
    with pytest.raises(IndexError):
        read(RowReader(columns), np.array(rows))


def open_files(folder: Path) -> list[str]:
    found = []
    for number in os.listdir("/proc/self/fd"):
        # the descriptor of this listing is closed by now
        with suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/self/fd/{number}"))
    return [name for name in found if name.startswith(str(folder))]


@pytest.mark.parametrize("preadv", [PREADV, not_cached])
def test_threads_share_few_open_files(tmp_path, monkeypatch, preadv: Callable[..., int]):
    monkeypatch.setattr(reader, "_LARGE_ROW", 0)
    monkeypatch.setattr(reader, "_MAX_OPEN", 1)
    monkeypatch.setattr(os, "preadv", preadv)
    shards = RowReader(opened(write(tmp_path)))
    pieces = [np.array([number % NUM_ROWS]) for number in range(0, 7 * 200, 7)]
    with ThreadPoolExecutor(4) as executor:
        results = executor.map(read, [shards] * len(pieces), pieces)
        for found, rows in zip(results, pieces, strict=True):
            check(found, rows)
    assert len(open_files(tmp_path)) == 1
    del shards, results
    assert not open_files(tmp_path)


def test_a_file_system_without_direct_reads_is_read_through_the_page_cache(columns, monkeypatch):
    system_open = os.open

    def refuse(path: Path, flags: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return system_open(path, flags)

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(os, "preadv", not_cached)
    monkeypatch.setattr(reader, "_LARGE_ROW", 0)
    rows = np.arange(NUM_ROWS)
    check(read(RowReader(columns, direct=True), rows), rows)


def test_large_columns_are_read_past_the_page_cache(columns, monkeypatch):
    files = set()

    def preadv(file: int, buffers: list[Any], offset: int, flags: int = 0) -> int:
        if not flags:
            files.add(fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT)
        return not_cached_blocks(file, buffers, offset, flags)

    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(reader, "_LARGE_ROW", 8000)
    shards = RowReader({"heatmap": columns["heatmap"]}, direct=True)
    shards.read(np.array([1]), {"heatmap": np.empty((1, 3, 40, 40), np.int16)})
    assert files == {os.O_DIRECT}


def test_rows_in_memory_need_no_file():
    columns = {name: Rows([array]) for name, array in arrays().items()}
    rows = np.array([0, 3, 4, 17])
    check(read(RowReader(columns), rows), rows)


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> dict[str, Rows]:
    """Return the rows of the example ten times, each in a shard of its own."""
    folder = tmp_path_factory.mktemp("many")
    for number in range(10 * NUM_ROWS):
        row = slice(number % NUM_ROWS, number % NUM_ROWS + 1)
        shard = {name: array[row] for name, array in arrays().items()}
        write_shard(folder / f"{number:03d}.h5", shard)
    return opened(folder)


@pytest.mark.parametrize("direct", [False, True])
def test_few_descriptors_are_enough_for_many_shards_and_threads(many, monkeypatch, direct):
    monkeypatch.setattr(os, "preadv", not_cached_blocks)
    monkeypatch.setattr(reader, "_LARGE_ROW", 8000)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = max(map(int, os.listdir("/proc/self/fd"))) + 100
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        readers, rows = [RowReader(many, direct=direct) for _ in range(2)], np.arange(10 * NUM_ROWS)
        with ThreadPoolExecutor(16) as executor:
            for found in executor.map(read, readers * 16, [rows] * 32):
                for name, array in arrays().items():
                    np.testing.assert_array_equal(found[name], np.concatenate([array] * 10))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_without_a_limit_of_descriptors_there_is_still_one(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)
    assert reader._shards_open(direct=True) == (2048, 64)
