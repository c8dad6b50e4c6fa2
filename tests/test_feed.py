"""The feed: every row once an epoch, the right arrays in each row, the same from every feed."""

import time
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from ood_heatmap.cache.shards import Rows
from ood_heatmap.pipeline import feed
from ood_heatmap.pipeline.feed import (
    TrainingSet,
    _epoch_order,
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


@given(num_rows=st.integers(1, 3000), seed=st.integers(0, 99), epoch=st.integers(0, 99))
def test_every_row_comes_once_an_epoch(num_rows, seed, epoch):
    order = _epoch_order(num_rows, seed, epoch)
    np.testing.assert_array_equal(np.sort(order), np.arange(num_rows))
    np.testing.assert_array_equal(order, _epoch_order(num_rows, seed, epoch))


@pytest.mark.parametrize("num_rows", [1, 7, 8, 9, 31, 32, 33, 100])
def test_every_row_comes_once_also_in_groups(monkeypatch, num_rows):
    monkeypatch.setattr(feed, "_CHUNK", 4)
    monkeypatch.setattr(feed, "_GROUP", 2)
    order = _epoch_order(num_rows, 0, 0)
    np.testing.assert_array_equal(np.sort(order), np.arange(num_rows))
    for start in range(0, num_rows - 8, 8):  # a group reads two places of the disk, no more
        assert len(np.unique(order[start : start + 8] // 4)) <= 3


def test_epochs_and_seeds_differ():
    orders = {tuple(_epoch_order(50, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_groups_mix_rows_from_far_apart(monkeypatch):
    monkeypatch.setattr(feed, "_CHUNK", 4)
    monkeypatch.setattr(feed, "_GROUP", 2)
    order = _epoch_order(400, 0, 0)
    assert np.abs(np.diff(order[:8].astype(float))).max() > 8


def resident(data: TrainingSet) -> _ResidentFeed:
    return _ResidentFeed(data, CPU)


def pinned(data: TrainingSet) -> _StreamingFeed:
    return _StreamingFeed(_load_into_memory(data, CPU), CPU, 5)


def streaming(data: TrainingSet) -> _StreamingFeed:
    return _StreamingFeed(data, CPU, 5)


@pytest.mark.parametrize("kind", [resident, pinned, streaming])
@pytest.mark.parametrize("num_maps", [0, 1])
def test_a_batch_holds_the_rows_asked_for(kind, num_maps):
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
    found = 0
    for rows, batch in zip(pieces, kind(data).batches(iter(pieces)), strict=True):
        time.sleep(0.001)  # time enough for a reader that is ahead to fill what is in use
        np.testing.assert_array_equal(batch.features, whole["features"][rows])
        np.testing.assert_array_equal(batch.prediction, whole["prediction"][rows])
        np.testing.assert_array_equal(batch.target, heatmaps[rows])
        assert batch.target.dtype == torch.int16
        assert len(batch.maps) == num_maps
        for item in batch.maps:
            np.testing.assert_array_equal(item, whole["feature_maps_1"][rows])
        found += 1
    assert found == 23


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
    order = [_epoch_order(43, 3, epoch)[:40].reshape(4, 10) for epoch in range(2)]
    assert [len(share) for share in shares] == [8] * processes
    for whole, *parts in zip(np.concatenate(order), *shares, strict=True):
        assert sorted(np.concatenate(parts)) == sorted(whole)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        assert all((np.diff(part) > 0).all() for part in parts)


def test_an_error_of_the_reader_reaches_the_step():
    with pytest.raises(IndexError):
        list(_StreamingFeed(example(), CPU, 4).batches([np.array([1, 99])]))


def test_a_feed_that_is_left_early_stops_its_thread():
    import threading

    before = threading.active_count()
    for _ in _StreamingFeed(example(), CPU, 4).batches([np.arange(4)] * 50):
        break
    assert threading.active_count() == before


def test_the_feed_is_chosen_by_size(monkeypatch):
    data, gpu = example(), torch.device("cuda")
    assert data.num_bytes == 18 * (12 + 4 + 64) + 7 * 96
    fits = 2 * data.num_bytes + 2
    free = {"cpu": fits, "cuda": fits}
    monkeypatch.setattr(feed, "available_memory", lambda device: free[device.type])
    assert choose_feed(data, CPU, "auto") == choose_feed(data, gpu, "auto") == "resident"
    free["cuda"] -= 2
    assert choose_feed(data, gpu, "auto") == "pinned"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # each process has its own copy on the host
    assert choose_feed(data, CPU, "auto") == choose_feed(data, gpu, "auto") == "streaming"
    assert choose_feed(data, CPU, "resident") == "resident"


@pytest.mark.parametrize("kind", ["resident", "pinned"])
def test_what_does_not_fit_after_all_is_streamed(monkeypatch, caplog, kind):
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(feed, "_ResidentFeed", full)
    monkeypatch.setattr(feed, "_load_into_memory", full)
    name, found = open_feed(example(), CPU, kind, 4)
    assert name == "streaming"
    assert isinstance(found, _StreamingFeed)
    assert f"no memory for the {kind} feed on cpu: falling back to streaming" in caplog.text
