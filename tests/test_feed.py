"""The feed: every row once an epoch, the right arrays in each row, the same from every feed."""

import logging
import os
import signal
import threading
import time
import tracemalloc
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from simulated_cuda import refuse_waiting

from ood_heatmap.cache.shards import Rows, open_rows, write_shard
from ood_heatmap.errors import OodHeatmapError
from ood_heatmap.pipeline import feed
from ood_heatmap.pipeline.feed import (
    TrainingSet,
    _iter_groups,
    _load_into_memory,
    _ResidentFeed,
    _StreamingFeed,
    choose_feed,
    iter_batches,
    open_feed,
    read_batch,
)

CPU = torch.device("cpu")


def example(num_id: int = 11, num_ood: int = 7, num_maps: int = 1) -> TrainingSet:
    generator = np.random.default_rng(0)

    def columns(count: int) -> dict[str, Rows]:
        arrays: dict[str, NDArray[Any]] = {
            "features": generator.normal(size=(count, 3)).astype(np.float32),
            "prediction": generator.integers(4, size=count).astype(np.int32),
            "feature_maps_1": generator.normal(size=(count, 2, 4, 4)).astype(np.float16),
            "heatmap": generator.integers(-255, 256, (count, 3, 4, 4)).astype(np.int16),
        }
        return {name: Rows(np.array_split(array, 2)) for name, array in arrays.items()}

    return TrainingSet(columns(num_id), columns(num_ood), num_maps)


def epoch_order(num_rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.concatenate(list(_iter_groups(num_rows, seed, epoch)))


@given(num_rows=st.integers(1, 3000), seed=st.integers(0, 99), epoch=st.integers(0, 99))
def test_every_row_comes_once_an_epoch(num_rows, seed, epoch):
    order = epoch_order(num_rows, seed, epoch)
    np.testing.assert_array_equal(np.sort(order), np.arange(num_rows))
    np.testing.assert_array_equal(order, epoch_order(num_rows, seed, epoch))


@pytest.mark.parametrize("num_rows", [1, 7, 8, 9, 31, 32, 33, 100])
def test_every_row_comes_once_also_in_groups(monkeypatch, num_rows):
    monkeypatch.setattr(feed, "_CHUNK", 4)
    monkeypatch.setattr(feed, "_GROUP", 2)
    order = epoch_order(num_rows, 0, 0)
    np.testing.assert_array_equal(np.sort(order), np.arange(num_rows))
    for start in range(0, num_rows - 8, 8):  # a group reads two places of the disk, no more
        assert len(np.unique(order[start : start + 8] // 4)) <= 3


def test_epochs_and_seeds_differ():
    orders = {tuple(epoch_order(50, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_groups_mix_rows_from_far_apart(monkeypatch):
    monkeypatch.setattr(feed, "_CHUNK", 4)
    monkeypatch.setattr(feed, "_GROUP", 2)
    order = epoch_order(400, 0, 0)
    assert np.abs(np.diff(order[:8].astype(float))).max() > 8


def resident(data: TrainingSet, device: torch.device) -> _ResidentFeed:
    return _ResidentFeed(data, device)


def memory(data: TrainingSet, device: torch.device) -> _StreamingFeed:
    return _StreamingFeed(_load_into_memory(data), device, 5)


def streaming(data: TrainingSet, device: torch.device) -> _StreamingFeed:
    return _StreamingFeed(data, device, 5)


@pytest.mark.parametrize("kind", [resident, memory, streaming])
@pytest.mark.parametrize("num_maps", [0, 1])
def test_a_batch_holds_the_rows_asked_for(device, kind, num_maps):
    data = example(num_maps=num_maps)
    whole = {
        name: np.concatenate([data.id_columns[name].read(), data.ood_columns[name].read()])
        for name in data.names
    }
    heatmaps = np.concatenate(
        [np.zeros((11, 3, 4, 4), np.int16), data.ood_columns["heatmap"].read()]
    )
    generator = np.random.default_rng(1)
    pieces = [np.sort(generator.permutation(18)[: 5 - i % 2]) for i in range(20)]
    pieces += [np.array([0, 10]), np.array([11, 17]), np.array([], np.int64)]
    found = []
    feed_of_kind = kind(data, device)
    with refuse_waiting(device):
        for batch in feed_of_kind.batches(iter(pieces)):
            time.sleep(0.001)  # time enough for a reader that is ahead to fill what is in use
            found.append(batch.clone())
    for rows, batch in zip(pieces, found, strict=True):
        features, prediction, target, *maps = (item.cpu() for item in batch.tensors)
        np.testing.assert_array_equal(features, whole["features"][rows])
        np.testing.assert_array_equal(prediction, whole["prediction"][rows])
        np.testing.assert_array_equal(target, heatmaps[rows])
        assert target.dtype == torch.int16
        assert len(maps) == num_maps
        for item in maps:
            np.testing.assert_array_equal(item, whole["feature_maps_1"][rows])


def test_rows_that_do_not_ascend_are_refused():
    with pytest.raises(ValueError, match="must ascend"):
        read_batch(example(), np.array([3, 2]), CPU)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_the_processes_share_each_batch_of_the_one_order(monkeypatch, processes):
    monkeypatch.setattr(feed, "world_size", lambda: processes)
    shares = []
    for number in range(processes):
        monkeypatch.setattr(feed, "rank", lambda number=number: number)
        shares.append(list(iter_batches(43, 10, seed=3, epochs=range(2))))
    order = [epoch_order(43, 3, epoch)[:40].reshape(4, 10) for epoch in range(2)]
    assert [len(share) for share in shares] == [8] * processes
    for whole, *parts in zip(np.concatenate(order), *shares, strict=True):
        assert sorted(np.concatenate(parts)) == sorted(whole)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        assert all((np.diff(part) > 0).all() for part in parts)


def test_an_epoch_of_any_size_starts_at_once_in_little_memory():
    tracemalloc.start()
    try:
        batches = iter_batches(10**9, 200, seed=0, epochs=[0])
        found = [next(batches) for _ in range(3)]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(np.unique(found)) == 600
    assert peak < 50e6


@given(num_rows=st.integers(1, 70), size=st.integers(1, 30))
def test_batches_that_span_groups_are_those_of_the_whole_order(num_rows, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feed, "_CHUNK", 4)
        patch.setattr(feed, "_GROUP", 2)
        order, count = epoch_order(num_rows, 1, 0), num_rows // size
        expected = np.sort(order[: count * size].reshape(count, size), axis=1)
        found = list(iter_batches(num_rows, size, 1, [0]))
    np.testing.assert_array_equal(np.array(found).reshape(count, size), expected)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> TrainingSet:
    """The example, memory-mapped from three shards for ID and for OOD rows."""
    data, folder = example(40, 50), tmp_path_factory.mktemp("shards")

    def write(name: str, columns: Mapping[str, Rows]) -> dict[str, Rows]:
        whole = {name: rows.read() for name, rows in columns.items()}
        for number in range(3):
            part = {name: array[number * 15 :][:15] for name, array in whole.items()}
            write_shard(folder / f"{name}{number}.h5", part)
        return open_rows(sorted(folder.glob(f"{name}*")))

    return TrainingSet(write("id", data.id_columns), write("ood", data.ood_columns), 1)


@given(
    pieces=st.lists(st.sets(st.integers(0, 84), max_size=12).map(sorted), max_size=9),
    num_readers=st.integers(1, 4),
    bytes_per_read=st.integers(1, 4000),
    num_slots=st.integers(1, 5),
    large_row=st.sampled_from([0, 1 << 30]),
    direct=st.booleans(),
)
def test_any_threads_and_ring_deliver_the_bytes_of_a_plain_gather_in_order(
    shards, pieces, num_readers, bytes_per_read, num_slots, large_row, direct
):
    whole = {
        name: np.concatenate([shards.id_columns[name].read(), shards.ood_columns[name].read()])
        for name in shards.names
    }
    heatmaps = shards.ood_columns["heatmap"].read()
    whole["heatmap"] = np.concatenate([np.zeros((40, *heatmaps.shape[1:]), np.int16), heatmaps])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feed, "_BYTES_PER_READ", bytes_per_read)
        patch.setattr(feed, "_NUM_SLOTS", num_slots)
        patch.setattr(feed, "_choose_num_readers", lambda: num_readers)
        if direct:
            patch.setattr(feed, "available_memory", lambda _: 0)
        patch.setattr("ood_heatmap.cache.reader._LARGE_ROW", large_row)
        rows = [np.array(piece, np.int64) for piece in pieces]
        reused = _StreamingFeed(shards, CPU, 12)
        # left early: what it has read ahead is not taken for what is read next
        with closing(reused.batches(rows[::-1])) as left:  # type: ignore[type-var]
            next(left, None)
        batches = reused.batches(iter(rows))
        for piece, batch in zip(rows, batches, strict=True):
            for name, tensor in zip(
                ("features", "prediction", "heatmap", "feature_maps_1"), batch.tensors, strict=True
            ):
                np.testing.assert_array_equal(tensor, whole[name][piece])


def test_an_error_of_the_reader_reaches_the_step():
    with pytest.raises(IndexError):
        list(_StreamingFeed(example(), CPU, 4).batches([np.array([1, 99])]))


def test_an_error_of_the_order_reaches_the_step():
    def broken() -> Iterator[NDArray[np.int64]]:
        yield np.array([0])
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(_StreamingFeed(example(), CPU, 4).batches(broken()))


def test_a_feed_that_is_left_early_stops_its_threads():
    before = threading.active_count()
    for _ in _StreamingFeed(example(), CPU, 4).batches([np.arange(4)] * 50):
        break
    assert threading.active_count() == before


def test_ctrl_c_while_the_step_waits_stops_the_threads_and_starts_no_further_read(
    monkeypatch, interruptible
):
    before, started = threading.active_count(), []

    def slow(self: object, rows: NDArray[np.int64], out: object) -> None:
        started.append(rows)
        # the step is waiting by then
        time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)

    monkeypatch.setattr(feed._BatchReader, "read", slow)
    monkeypatch.setattr(feed, "_choose_num_readers", lambda: 1)
    with pytest.raises(KeyboardInterrupt):
        next(_StreamingFeed(example(), CPU, 4).batches([np.arange(4)] * 50))
    assert threading.active_count() == before
    assert len(started) == 1


@pytest.mark.parametrize(
    ("cores", "ranks", "readers"), [(1, 1, 2), (4, 1, 4), (64, 1, 8), (64, 16, 4), (64, 64, 2)]
)
def test_reader_threads_come_from_the_cores_of_this_rank(monkeypatch, cores, ranks, readers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert feed._choose_num_readers() == readers


def test_what_the_page_cache_cannot_keep_is_read_past_it(shards, monkeypatch):
    in_memory = _load_into_memory(shards)
    for data, spare, direct in ((shards, 0, False), (shards, -1, True), (in_memory, -1, False)):
        free = data.num_bytes + spare
        monkeypatch.setattr(feed, "available_memory", lambda _, free=free: free)
        found = _StreamingFeed(data, CPU, 4)
        assert found.reader.id_rows.direct == found.reader.ood_rows.direct == direct
        assert (found.num_readers == feed._NUM_DIRECT_READERS) == direct


def test_the_size_of_the_ring_buffer_is_logged(caplog):
    with caplog.at_level(logging.INFO):
        _StreamingFeed(example(), CPU, 4)
    # 4 slots of 4 rows of 3 float32, an int32, 32 float16 and 48 int16
    assert f"ring buffer of 4 batches ({4 * 4 * (12 + 4 + 64 + 96) / 1e6:.0f} MB)" in caplog.text


def pinning(monkeypatch: pytest.MonkeyPatch, error: Exception | None) -> list[int]:
    """Have page-locked memory, or none; return the sizes asked for."""
    sizes: list[int] = []
    allocate = torch.empty

    def empty(*arguments: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        made = allocate(*arguments, **options)
        if pin_memory:
            sizes.append(made.nbytes)
            if error is not None:
                raise error
        return made

    monkeypatch.setattr(torch, "empty", empty)
    return sizes


def test_only_the_ring_buffer_is_page_locked(monkeypatch):
    sizes = pinning(monkeypatch, None)
    data = _load_into_memory(example())
    assert not sizes
    feed._allocate_ring(data, torch.device("cuda"), 5)
    assert sum(sizes) == feed._NUM_SLOTS * 5 * (12 + 4 + 64 + 96)


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA error: out of memory\nmore"), torch.OutOfMemoryError()]
)
def test_a_ring_buffer_without_page_locked_memory_is_one_line(monkeypatch, caplog, error):
    pinning(monkeypatch, error)
    ring = feed._allocate_ring(example(), torch.device("cuda"), 5)
    assert len(ring) == feed._NUM_SLOTS
    assert not any(item.is_pinned() for slot in ring for item in slot.values())
    (line,) = caplog.messages
    assert "no page-locked memory" in line
    assert "\n" not in line


def cgroups(root: Path, lines: str, files: Mapping[str, str]) -> list[int]:
    for name, text in {"proc/self/cgroup": lines, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return list(feed._iter_cgroup_memory(root))


STAT = "anon 1\ninactive_file 300\nactive_file 20\n"


def test_the_limits_of_all_cgroups_of_a_job_count(tmp_path):
    v2 = "sys/fs/cgroup"
    files = {
        f"{v2}/jobs/memory.max": "5000\n",
        f"{v2}/jobs/memory.current": "1000\n",
        f"{v2}/jobs/memory.stat": STAT,
        f"{v2}/jobs/one/memory.max": "max\n",
    }
    assert cgroups(tmp_path, "0::/jobs/one\n", files) == [5000 - 1000 + 320]


def test_the_limit_of_a_container_is_at_the_mount(tmp_path):
    v1 = "sys/fs/cgroup/memory/memory"
    files = {
        f"{v1}.limit_in_bytes": "5000\n",
        f"{v1}.usage_in_bytes": "1000\n",
        f"{v1}.stat": "total_inactive_file 7\ntotal_active_file 0\n",
    }
    lines = "2:cpu:/\n4:memory:/docker/0123\n0::/\n"
    assert cgroups(tmp_path, lines, files) == [5000 - 1000 + 7]


def test_a_system_without_cgroups_has_no_such_limit(tmp_path):
    assert list(feed._iter_cgroup_memory(tmp_path)) == []
    assert cgroups(tmp_path, "0::/\n", {}) == []


def test_the_limit_of_a_cgroup_is_the_memory_available(monkeypatch):
    monkeypatch.setattr(feed, "_iter_cgroup_memory", lambda root: iter([12345]))
    assert feed.available_memory(CPU) == 12345


def test_the_feed_is_chosen_by_size(monkeypatch):
    data, gpu = example(), torch.device("cuda")
    assert data.num_bytes == 18 * (12 + 4 + 64) + 7 * 96
    fits = 2 * data.num_bytes + 2
    free = {"cpu": fits, "cuda": fits}
    monkeypatch.setattr(feed, "available_memory", lambda device: free[device.type])
    assert choose_feed(data, CPU, "auto") == choose_feed(data, gpu, "auto") == "resident"
    free["cuda"] -= 2
    assert choose_feed(data, gpu, "auto") == "memory"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # each process has its own copy on the host
    assert choose_feed(data, CPU, "auto") == choose_feed(data, gpu, "auto") == "streaming"
    assert choose_feed(data, CPU, "resident") == "resident"
    assert choose_feed(data, CPU, "pinned") == "memory"


@pytest.mark.parametrize("kind", ["resident", "memory"])
def test_what_does_not_fit_after_all_is_streamed(monkeypatch, caplog, kind):
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(feed, "_ResidentFeed", full)
    monkeypatch.setattr(feed, "_load_into_memory", full)
    name, found = open_feed(example(), CPU, kind, 4)
    assert name == "streaming"
    assert isinstance(found, _StreamingFeed)
    assert f"no memory for the {kind} feed on cpu: falling back to streaming" in caplog.text


@pytest.mark.parametrize("kind", ["resident", "memory"])
def test_a_copy_that_would_end_the_process_is_not_made(monkeypatch, caplog, kind):
    data = example()
    monkeypatch.setattr(feed, "available_memory", lambda _: data.num_bytes)
    assert open_feed(data, CPU, kind, 4)[0] == kind
    # two ranks make two copies
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert open_feed(data, CPU, kind, 4)[0] == "streaming"
    assert f"no memory for the {kind} feed" in caplog.text


def failing(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(feed, "_StreamingFeed", fail)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError(), MemoryError(), RuntimeError("CUDA error: out of memory")]
)
def test_a_ring_buffer_that_does_not_fit_is_one_line(monkeypatch, error):
    failing(monkeypatch, error)
    with pytest.raises(OodHeatmapError, match="no memory for a ring buffer of 4 batches of 9 im"):
        open_feed(example(), CPU, "streaming", 9)


@pytest.mark.parametrize("kind", ["memory", "streaming"])
def test_another_error_is_not_taken_for_missing_memory(monkeypatch, kind):
    failing(monkeypatch, RuntimeError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal"):
        open_feed(example(), CPU, kind, 4)
