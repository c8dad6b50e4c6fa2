"""Images through the classifier: each with its own output, and what the meter says of a stage."""

import logging
import time

import numpy as np
import pytest
import torch

from ood_heatmap.decoding import Batch
from ood_heatmap.pipeline.embed import embed, iter_outputs
from ood_heatmap.pipeline.forward import BatchedClassifier
from ood_heatmap.pipeline.meter import Meter, _find_bottleneck, _format_summary, _merge_ranks
from ood_heatmap.source_array import from_array


def pixels(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3)).astype(np.uint8)


def embedded(classifier, count: int, *, batch_size: int, shard: int):
    rows = np.arange(count)
    shards = [rows[start : start + shard] for start in range(0, count, shard)]
    forward, meter = BatchedClassifier(classifier, batch_size), Meter(count, "test")
    images = from_array(pixels(count))
    return list(embed(images, shards, forward, meter, workers=2, skip_unreadable=False))


def test_shards_hold_each_image_with_its_own_output(classifier):
    shards = embedded(classifier, 50, batch_size=8, shard=24)
    wanted = classifier(torch.from_numpy(pixels(50).transpose(0, 3, 1, 2).copy()))
    assert [len(shard.rows) for shard in shards] == [24, 24, 2]
    for name in ("features", "logits"):
        found = np.concatenate([getattr(shard, name) for shard in shards])
        np.testing.assert_allclose(found, getattr(wanted, name), rtol=1e-5, atol=1e-6)
    for number, item in enumerate(wanted.maps):
        found = np.concatenate([shard.maps[number] for shard in shards])
        np.testing.assert_allclose(found, item, rtol=2e-3, atol=1e-4)


def test_embedding_counts_only_beyond_the_classifier_alone():
    waits = {"decode": 2.0, "embed": 10.0, "write": 1.0}
    assert _find_bottleneck(waits, alone=9.5, stolen=0.0) == ("decode", 2.0)
    assert _find_bottleneck(waits, alone=5.0, stolen=0.0) == ("embed", 5.0)


def test_the_cores_that_decoding_takes_from_the_classifier_count_as_decoding():
    waits = {"decode": 0.5, "embed": 10.0, "write": 1.0}
    assert _find_bottleneck(waits, alone=6.0, stolen=0.0) == ("embed", 4.0)
    assert _find_bottleneck(waits, alone=6.0, stolen=3.0) == ("decode", 3.5)


def test_cpu_time_of_decoding_is_spread_over_the_classifiers_threads(classifier):
    images = pixels(8).transpose(0, 3, 1, 2)
    batches = [Batch(np.arange(8), images, b"", seconds=3.0, cpu_seconds=2.0) for _ in range(3)]
    forward, meter = BatchedClassifier(classifier, 8), Meter(24, "test")
    assert len(list(iter_outputs(batches, forward, meter, None))) == 3
    assert meter.done == 24
    assert meter.thread_seconds["decode"] == 9.0
    assert meter.stolen_seconds == pytest.approx(3 * 2.0 / torch.get_num_threads())


def test_a_summary_names_the_ceiling_and_the_bottleneck(caplog):
    started = time.perf_counter() - 8.0
    meter = Meter(40, "index", done=40, wait_seconds={"decode": 3.0, "embed": 5.0}, started=started)
    with caplog.at_level(logging.INFO):
        stats = meter.close(ceiling=lambda _: 10.0)
    assert stats["ceiling_images_per_second"] == 10.0
    # 40 images take the classifier alone 4 s
    assert (stats["bottleneck"], stats["bottleneck_seconds"]) == ("decode", 3.0)
    assert "of the classifier alone (10 images/s); bottleneck: decode (3.0 s)" in caplog.text


def test_a_ceiling_below_one_image_a_second_is_not_rounded_to_none(caplog):
    started = time.perf_counter() - 80.0
    meter = Meter(20, "index", done=20, wait_seconds={"embed": 80.0}, started=started)
    with caplog.at_level(logging.INFO):
        meter.close(ceiling=lambda _: 0.3)
    assert "of the classifier alone (0.3 images/s)" in caplog.text


def test_a_ceiling_below_the_rate_is_not_taken_for_one(caplog):
    meter = Meter(40, "index", done=40, wait_seconds={"embed": 1.0})
    with caplog.at_level(logging.INFO):
        stats = meter.close(ceiling=lambda _: 1e-3)
    assert not {"ceiling_images_per_second", "share_of_ceiling", "bottleneck"} & stats.keys()
    assert "images/s, the classifier alone could not be measured" in caplog.text


def test_several_ranks_are_reported_as_one():
    meter = Meter(10, "test", done=10, wait_seconds={"decode": 1.0, "embed": 3.0})
    first = {**meter.stats(), "seconds": 4.0, "ceiling": 5.0}
    second = {
        **first,
        "images": 30,
        "seconds": 5.0,
        "wait_seconds": {"embed": 5.0},
        "ceiling": 11.0,
    }
    merged = _merge_ranks([first, second])
    assert merged["images_per_second"] == 8.0
    assert merged["share_of_ceiling"] == 0.5
    assert merged["wait_seconds"] == {"decode": 0.5, "embed": 4.0}
    assert merged["processes"] == 2


def test_a_slow_rate_is_not_shown_as_none():
    stats = {"images": 1, "seconds": 1.9, "images_per_second": 0.5}
    assert _format_summary(stats) == "1 images in 1.9 s, 0.5 images/s"
