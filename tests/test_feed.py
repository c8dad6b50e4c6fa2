"""The feed: every row once an epoch, the right arrays in each row, the same from either feed."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ood_heatmap.cache.shards import Rows
from ood_heatmap.pipeline import feed
from ood_heatmap.pipeline.feed import (
    ResidentFeed,
    StreamingFeed,
    TrainingSet,
    choose_feed,
    epoch_order,
)

CPU = torch.device("cpu")


def example(num_id: int = 11, num_ood: int = 7, num_maps: int = 1) -> TrainingSet:
    generator = np.random.default_rng(0)

    def columns(count: int) -> dict[str, Rows]:
        arrays = {
            "features": generator.normal(size=(count, 3)).astype(np.float32),
            "prediction": generator.integers(4, size=count).astype(np.int32),
            "feature_maps_1": generator.normal(size=(count, 2, 4, 4)).astype(np.float16),
            "heatmap": generator.integers(-255, 256, (count, 3, 4, 4)).astype(np.int16),
        }
        return {name: Rows(np.array_split(array, 2)) for name, array in arrays.items()}

    return TrainingSet(columns(num_id), columns(num_ood), num_maps)


@given(num_rows=st.integers(1, 3000), seed=st.integers(0, 99), epoch=st.integers(0, 99))
def test_every_row_comes_once_an_epoch(num_rows, seed, epoch):
    order = epoch_order(num_rows, seed, epoch)
    np.testing.assert_array_equal(np.sort(order), np.arange(num_rows))
    np.testing.assert_array_equal(order, epoch_order(num_rows, seed, epoch))


@pytest.mark.parametrize("num_rows", [1, 7, 8, 9, 31, 32, 33, 100])
def test_every_row_comes_once_also_in_groups(monkeypatch, num_rows):
    monkeypatch.setattr(feed, "CHUNK", 4)
    monkeypatch.setattr(feed, "GROUP", 2)
    order = epoch_order(num_rows, 0, 0)
    np.testing.assert_array_equal(np.sort(order), np.arange(num_rows))
    for start in range(0, num_rows - 8, 8):  # a group reads two places of the disk, no more
        assert len(np.unique(order[start : start + 8] // 4)) <= 3


def test_epochs_and_seeds_differ():
    orders = {tuple(epoch_order(50, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_groups_mix_rows_from_far_apart(monkeypatch):
    monkeypatch.setattr(feed, "CHUNK", 4)
    monkeypatch.setattr(feed, "GROUP", 2)
    order = epoch_order(400, 0, 0)
    assert np.abs(np.diff(order[:8].astype(float))).max() > 8


@pytest.mark.parametrize("kind", [ResidentFeed, StreamingFeed])
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
    pieces = np.split(np.random.default_rng(1).permutation(18), [5, 10, 15])
    found = list(kind(data, CPU).batches(pieces))  # kept: a place of the ring must not be reused
    assert len(found) == 4
    for rows, batch in zip(pieces, found, strict=True):
        np.testing.assert_array_equal(batch.features, whole["features"][rows])
        np.testing.assert_array_equal(batch.prediction, whole["prediction"][rows])
        np.testing.assert_array_equal(batch.heatmap, heatmaps[rows])
        assert batch.heatmap.dtype == torch.int16
        assert len(batch.maps) == num_maps
        for item in batch.maps:
            np.testing.assert_array_equal(item, whole["feature_maps_1"][rows])


def test_an_error_of_the_reader_reaches_the_step():
    with pytest.raises(IndexError):
        list(StreamingFeed(example(), CPU).batches([np.array([1, 99])]))


def test_a_feed_that_is_left_early_stops_its_thread():
    import threading

    before = threading.active_count()
    for _ in StreamingFeed(example(), CPU).batches([np.arange(4)] * 50):
        break
    assert threading.active_count() == before


def test_the_feed_is_chosen_by_size(monkeypatch):
    data = example()
    assert data.num_bytes == 18 * (12 + 4 + 64) + 7 * 96
    monkeypatch.setattr(feed, "available_memory", lambda _: 2 * data.num_bytes + 2)
    assert choose_feed(data, CPU, "auto") == "resident"
    monkeypatch.setattr(feed, "available_memory", lambda _: 2 * data.num_bytes)
    assert choose_feed(data, CPU, "auto") == "streaming"
    assert choose_feed(data, CPU, "resident") == "resident"
