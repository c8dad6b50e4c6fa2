"""Images through the classifier: each with its own output, and what the meter says of a stage."""

import logging
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch

from ood_heatmap.pipeline import meter as module
from ood_heatmap.pipeline.embed import embed
from ood_heatmap.pipeline.meter import Meter, held_back_by, report, together
from ood_heatmap.sources import from_array


def pixels(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3)).astype(np.uint8)


def embedded(classifier, count: int, *, batch_size: int, shard: int, meter: Meter | None = None):
    rows = np.arange(count)
    shards = [rows[start : start + shard] for start in range(0, count, shard)]
    meter = meter or Meter(count, "test")
    options = {"batch_size": batch_size, "workers": 2, "skip_unreadable": False}
    return list(embed(from_array(pixels(count)), shards, classifier, meter, **options))


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


def read_by(images, read):
    """Return the images as a set that is read one by one, by a function."""
    return replace(images, array=None, reader=SimpleNamespace(read=read, digest=images.digest))


def test_the_meter_finds_what_held_the_stage_back(classifier, monkeypatch, caplog):
    # a slow network is its own ceiling; decoding that is slower still shows as what was waited for
    forward = classifier.network.forward
    monkeypatch.setattr(
        classifier.network, "forward", lambda images: (time.sleep(0.02), forward(images))[1]
    )
    monkeypatch.setattr(module, "PROBE_SHARE", 1.0)
    quick = from_array(pixels(64))
    images = read_by(quick, lambda row: (time.sleep(0.01), quick.read(row))[1])
    meter, options = Meter(64, "test"), {"workers": 1, "skip_unreadable": False}
    with caplog.at_level(logging.INFO):
        list(embed(images, [np.arange(64)], classifier, meter, batch_size=8, **options))
        figures = report(meter)
    assert figures["held_back_by"] == "decode"
    assert figures["waited"]["decode"] > 0.3  # 0.64 s of decoding, 0.16 s of it hidden
    assert figures["busy"]["decode"] > 0.6
    assert 0.1 < figures["share_of_ceiling"] < 0.5
    assert "held back by decode" in caplog.text
    assert "% of the classifier alone" in caplog.text


def test_embedding_counts_only_beyond_the_classifier_alone():
    waited = {"decode": 2.0, "embed": 10.0, "write": 1.0}
    assert held_back_by(waited, alone=9.5, taken=0.0) == ("decode", 2.0)
    assert held_back_by(waited, alone=5.0, taken=0.0) == ("embed", 5.0)


def test_the_cores_that_decoding_takes_from_the_classifier_are_decodings():
    waited = {"decode": 0.5, "embed": 10.0, "write": 1.0}
    assert held_back_by(waited, alone=6.0, taken=0.0) == ("embed", 4.0)
    assert held_back_by(waited, alone=6.0, taken=3.0) == ("decode", 3.5)


def test_decoding_on_the_classifiers_own_cores_is_measured(classifier):
    quick = from_array(pixels(64))

    def read(row: int):
        until = time.thread_time() + 0.005
        while time.thread_time() < until:
            pass
        return quick.read(row)

    images, meter = read_by(quick, read), Meter(64, "test")
    options = {"workers": 2, "skip_unreadable": False}
    list(embed(images, [np.arange(64)], classifier, meter, batch_size=8, **options))
    assert meter.taken >= 64 * 0.005 / torch.get_num_threads()


def test_several_processes_are_reported_as_one():
    one = Meter(10, "test")
    one.done, one.waited = 10, {"decode": 1.0, "embed": 3.0}
    first = {**one.figures(), "seconds": 4.0, "ceiling": 5.0}
    second = {**first, "images": 30, "seconds": 5.0, "waited": {"embed": 5.0}, "ceiling": 11.0}
    figures = together([first, second])
    assert figures["images_per_second"] == 8.0
    assert figures["share_of_ceiling"] == 0.5
    assert figures["waited"] == {"decode": 0.5, "embed": 4.0}
    assert figures["processes"] == 2
