"""The classifier on its device: cores that share its weights alone, and halved batches."""

import logging
import threading
import time
import weakref
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ood_heatmap.classifier import Classifier, ClassifierConfig, Output
from ood_heatmap.decoding import iter_batches
from ood_heatmap.errors import OodHeatmapError
from ood_heatmap.images import Transform
from ood_heatmap.pipeline import forward as module
from ood_heatmap.pipeline.embed import iter_outputs
from ood_heatmap.pipeline.forward import BatchedClassifier, _make_copies, _pinned_thread_pool
from ood_heatmap.pipeline.meter import Meter
from ood_heatmap.source_array import from_array


def pixels(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 3, 16, 16)).astype(np.uint8)


def limited(classifier, monkeypatch, limit: int) -> list[int]:
    """Let the network take ``limit`` images at most; return the sizes that it was asked for."""
    forward, sizes = classifier.network.forward, []

    def guarded(images):
        sizes.append(len(images))
        if len(images) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(images)

    monkeypatch.setattr(classifier.network, "forward", guarded)
    return sizes


def _tolerance(device: torch.device) -> dict[str, Any]:
    """Return how far apart features may be: a GPU rounds the inputs of convolutions to TF32."""
    on_gpu = device.type == "cuda" and torch.cuda.is_available()
    return {"rtol": 1e-2, "atol": 1e-2} if on_gpu else {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture
def threads():
    """Return what sets the number of threads that PyTorch computes with, until the test's end."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


class Forgetful(nn.Module):
    """Keeps what passes through it in an attribute, and returns when two batches are inside."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)
        self.meet: threading.Barrier | None = None

    def forward(self, images):
        self.kept = self.conv(images).mean(dim=(2, 3))
        if self.meet is not None:
            self.meet.wait(timeout=60)
        return self.linear(self.kept)


def of(network: nn.Module) -> Classifier:
    config = ClassifierConfig("test", 5, Transform(16), (0.5,) * 3, (0.2,) * 3, num_maps=1)
    return Classifier(network, config)


def test_each_core_has_a_copy_whose_attributes_are_its_own(threads):
    threads(2)
    classifier = of(Forgetful())
    images = pixels(4 * module._IMAGES_PER_CORE)
    wanted = classifier(torch.from_numpy(images))
    forward = BatchedClassifier(classifier, len(images))
    both: list[Any] = [forward.idle.get(), forward.idle.get()]
    meet = threading.Barrier(2)
    for copy in both:
        copy.network.meet = meet  # breaks unless two pieces are inside at once
        forward.idle.put(copy)
    found = forward(images)
    torch.testing.assert_close(found.features, wanted.features)
    torch.testing.assert_close(found.logits, wanted.logits)
    torch.testing.assert_close(found.maps[0], wanted.maps[0].half())


def test_copies_share_all_weights(classifier):
    first, *others = _make_copies(classifier, 3)
    assert first is classifier
    assert len(others) == 2
    for other in others:
        assert other.network is not classifier.network
        for ours, theirs in zip(
            other.state_dict().values(), classifier.state_dict().values(), strict=True
        ):
            assert ours.data_ptr() == theirs.data_ptr()


@pytest.mark.parametrize("why", ["a lock", "a function bound to the original"])
def test_a_network_that_cannot_be_copied_is_used_as_it_is(classifier, threads, caplog, why):
    threads(2)
    if why == "a lock":
        classifier.network.lock = threading.Lock()
    else:
        own = classifier.network.forward
        # a function of its own, which a copy would share with the original
        classifier.network.forward = lambda images: own(images)  # noqa: PLW0108
    with caplog.at_level(logging.INFO):
        forward = BatchedClassifier(classifier, 4 * module._IMAGES_PER_CORE)
    assert "cannot be copied" in caplog.text
    assert forward.num_workers == 1
    images = pixels(40)
    found, wanted = forward(images), classifier(torch.from_numpy(images))
    torch.testing.assert_close(found.logits, wanted.logits)


def test_no_more_images_are_inside_at_once_than_asked_for(classifier, threads):
    threads(16)
    for batch_size, size, num_workers in ((256, 32, 8), (1024, 32, 16), (64, 32, 2), (40, 32, 1)):
        forward = BatchedClassifier(classifier, batch_size)
        assert (forward.size, forward.num_workers) == (size, num_workers)
    assert (
        BatchedClassifier(classifier, 7).size,
        BatchedClassifier(classifier, 7).num_workers,
    ) == (7, 1)


def test_no_more_large_images_are_decoded_together_than_the_cores_soon_need(classifier, threads):
    threads(2)
    assert BatchedClassifier(classifier, 256).batch_size == 256
    large = replace(classifier.config, transform=Transform(224))
    photographs = BatchedClassifier(Classifier(classifier.network, large), 256)
    assert photographs.size == 8
    assert photographs.batch_size == 2 * 4 * 8
    assert BatchedClassifier(Classifier(classifier.network, large), 24).batch_size == 24


def test_a_core_computes_with_its_own_number_of_threads_and_nobody_else_does():
    before = torch.get_num_threads()
    pool, others = _pinned_thread_pool(2, 1), []
    assert list(pool.map(lambda _: torch.get_num_threads(), range(8))) == [1] * 8
    thread = threading.Thread(target=lambda: others.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert [torch.get_num_threads(), *others] == [before, before]


def test_what_has_not_begun_is_left_out_when_the_reader_stops(classifier, monkeypatch, threads):
    threads(1)
    forward, calls = classifier.network.forward, []
    inside, gate = threading.Event(), threading.Event()

    def gated(images):
        calls.append(len(images))
        if len(calls) > 2:
            inside.set()
            gate.wait(timeout=60)
        return forward(images)

    monkeypatch.setattr(classifier.network, "forward", gated)
    images = from_array(pixels(6 * module._IMAGES_PER_CORE))
    rows = np.split(np.arange(len(images)), 3)
    decoded = iter_batches(images, rows, classifier.config.transform, workers=1)
    batched = BatchedClassifier(classifier, 2 * module._IMAGES_PER_CORE)
    done = iter_outputs(decoded, batched, Meter(len(images), "test"), images.names)
    batch, _ = next(done)
    assert inside.wait(timeout=60)  # the third piece is inside, and the fourth waits
    np.testing.assert_array_equal(batch.rows, rows[0])
    done.close()  # type: ignore[attr-defined]
    gate.set()
    batched.executor.submit(int).result()  # behind all that was left
    assert len(calls) == 3


def test_the_rest_of_a_batch_is_left_out_when_a_part_of_it_fails(classifier, monkeypatch, threads):
    threads(1)
    calls, gate = [], threading.Event()

    def failing(images):
        calls.append(len(images))
        if len(calls) > 1:
            gate.wait(timeout=60)
        raise ValueError("broken network")

    monkeypatch.setattr(classifier.network, "forward", failing)
    images = from_array(pixels(8 * module._IMAGES_PER_CORE))
    rows = np.split(np.arange(len(images)), 2)
    decoded = iter_batches(images, rows, classifier.config.transform, workers=1)
    batched = BatchedClassifier(classifier, 4 * module._IMAGES_PER_CORE)
    done = iter_outputs(decoded, batched, Meter(len(images), "test"), images.names)
    with pytest.raises(ValueError, match="broken network"):
        next(done)
    gate.set()
    batched.executor.submit(int).result()  # behind all that was left
    assert len(calls) <= 2  # the second part may have begun, of six more none


def test_a_halved_batch_is_remembered(classifier, device, monkeypatch, caplog):
    images, classifier = pixels(64), classifier.to(device)
    wanted = BatchedClassifier(classifier, 16)(images)
    sizes = limited(classifier, monkeypatch, 5)
    forward = BatchedClassifier(classifier, 16)
    found = [forward(images[:32]), forward(images[32:])]
    assert sizes == [16, 8] + [4] * 16  # each size that does not fit is tried once in a run
    assert caplog.text.count("out of memory") == 2
    assert forward.size == 4
    features = torch.cat([item.features for item in found])
    torch.testing.assert_close(features, wanted.features, **_tolerance(device))


def test_a_full_device_is_found_out_whoever_says_it_and_its_activations_are_gone_by_then(
    classifier, monkeypatch
):
    """Words as of cuDNN; cached memory can be given back only when nothing holds it."""
    forward, halve = classifier.network.forward, BatchedClassifier._halve_batch
    activations: list[weakref.ref[torch.Tensor]] = []
    alive: list[bool] = []

    def full(images):
        if len(images) == 4:
            computed = images + 1
            activations.append(weakref.ref(computed))
            raise RuntimeError("GET was unable to find an engine to execute this computation")
        return forward(images)

    def watched(*arguments):
        alive.append(activations[0]() is not None)
        halve(*arguments)

    monkeypatch.setattr(classifier.network, "forward", full)
    monkeypatch.setattr(BatchedClassifier, "_halve_batch", watched)
    batched = BatchedClassifier(classifier, 4)
    assert len(batched(pixels(4)).features) == 4
    assert alive == [False]
    assert batched.size == 2


def test_another_error_of_the_network_is_no_full_device(classifier, monkeypatch):
    def broken(images):
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(classifier.network, "forward", broken)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        BatchedClassifier(classifier, 4)(pixels(4))


def test_cores_halve_together(classifier, monkeypatch, caplog, threads):
    threads(4)
    images = pixels(8 * module._IMAGES_PER_CORE)
    wanted = BatchedClassifier(classifier, len(images))(images)
    whole = Classifier.forward

    def small(self, images):
        if len(images) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(self, images)

    monkeypatch.setattr(Classifier, "forward", small)
    forward = BatchedClassifier(classifier, len(images))
    found = forward(images)
    assert (forward.num_workers, forward.size) == (4, 4)
    assert caplog.text.count("out of memory") == 3  # for 32, 16 and 8, and not for each core
    torch.testing.assert_close(found.features, wanted.features, rtol=1e-5, atol=1e-6)


def test_a_device_without_memory_for_one_image_is_refused(classifier, monkeypatch):
    limited(classifier, monkeypatch, 0)
    with pytest.raises(
        OodHeatmapError, match=r"no memory for a single image \(CUDA out of memory\)"
    ):
        BatchedClassifier(classifier, 4)(pixels(4))


def test_every_batch_has_the_same_size_so_a_row_does_not_depend_on_its_neighbours(
    classifier, device
):
    images, classifier = pixels(16), classifier.to(device)
    whole, part = (
        BatchedClassifier(classifier, 16)(images),
        BatchedClassifier(classifier, 16)(images[:3]),
    )
    assert len(part.features) == 3
    torch.testing.assert_close(part.features, whole.features[:3], rtol=0, atol=0)


def test_maps_leave_the_device_rounded_and_in_the_order_of_the_file(classifier, device):
    """The host copies them as they are: reordering channels there would wait for one core."""
    images = pixels(16)
    wanted: Output = classifier(torch.from_numpy(images))
    assert not wanted.maps[0].is_contiguous()
    (found,) = BatchedClassifier(classifier.to(device), 16).start(images[:9]).wait()
    for ours, whole in zip(found.maps, wanted.maps, strict=True):
        assert ours.is_contiguous()
        half = {name: max(item, 1e-3) for name, item in _tolerance(device).items()}
        torch.testing.assert_close(ours, whole[:9].half(), **half)


def test_the_ceiling_is_the_rate_of_the_forward_pass_alone(classifier, monkeypatch, threads):
    threads(1)
    forward, clock = classifier.network.forward, [0.0]

    def half_a_second(images: torch.Tensor) -> torch.Tensor:
        clock[0] += 0.5
        return forward(images)

    monkeypatch.setattr(classifier.network, "forward", half_a_second)
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    assert BatchedClassifier(classifier, 32).rate(seconds=2.0) == 32 / 0.5
    assert clock[0] == 2.0


@pytest.mark.parametrize(
    ("size", "count"), [(16, 32), (112, 32), (160, 15), (224, 8), (299, 4), (1024, 1)]
)
def test_a_core_takes_fewer_large_images_at_once(classifier, size, count):
    config = replace(classifier.config, transform=Transform(size))
    classifier.config = config
    assert BatchedClassifier(classifier, 64).size == count
