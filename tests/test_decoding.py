"""Batches decoded in threads and in processes are the same, and so are their errors."""

import errno
import os
import shutil
import signal
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing import active_children

import numpy as np
import pytest
from PIL import Image

from ood_heatmap import decoding as module
from ood_heatmap.decoding import Batch, decode, iter_batches
from ood_heatmap.errors import OodHeatmapError
from ood_heatmap.images import ImageSet, Transform, UnreadableImageError
from ood_heatmap.sources import open_images

TRANSFORM = Transform(16)
CHUNKS = np.array_split(np.arange(23), 6)
linux = pytest.mark.skipif(sys.platform != "linux", reason="forks on Linux alone")


@pytest.fixture
def images(tmp_path) -> ImageSet:
    """23 files of four kinds: grey, 16-bit, turned by EXIF, and plain; one of them is broken."""
    generator = np.random.default_rng(0)
    for number in range(23):
        pixels = generator.integers(0, 256, (20 + number, 31, 3), np.uint8)
        image = Image.fromarray(pixels)
        exif = Image.Exif()
        if number % 4 == 1:
            image = image.convert("L")
        elif number % 4 == 2:
            image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 256)
        elif number % 4 == 3:
            exif[0x0112] = 6
        image.save(tmp_path / f"{number:02d}.png", exif=exif)
    (tmp_path / "17.png").write_bytes(b"not an image")
    return open_images(str(tmp_path))


def comparable(batch: Batch) -> tuple[object, ...]:
    rows, pixels = batch.rows.tolist(), batch.pixels.tobytes()
    return rows, pixels, batch.digests, batch.modes, batch.notes, batch.skipped


@linux
def test_processes_yield_the_batches_of_threads_in_order(images, monkeypatch):
    pids = {os.getpid()}
    monkeypatch.setattr(module, "_iter_in_processes", recording(pids))
    threads, processes = (
        list(iter_batches(images, CHUNKS, TRANSFORM, workers=workers, skip_unreadable=True))
        for workers in (1, 3)
    )
    assert list(map(comparable, processes)) == list(map(comparable, threads))
    assert sum(len(batch.rows) for batch in processes) == 22
    assert len(pids) == 4
    for batch in processes:
        assert batch.pixels.flags.writeable
        assert batch.seconds > 0


@linux
@pytest.mark.parametrize("workers", [1, 3])
def test_masks_are_those_of_the_images_that_could_be_read(images, workers):
    masked = replace(images, mask=lambda row: np.full((2, 2), row, np.uint8))
    batches = list(iter_batches(masked, CHUNKS, TRANSFORM, workers=workers, skip_unreadable=True))
    rows = np.concatenate([batch.rows for batch in batches])
    assert rows.tolist() == [row for row in range(23) if row != 17]
    masks = np.concatenate([batch.masks for batch in batches])
    np.testing.assert_array_equal(masks, np.tile(rows[:, None, None], (1, 2, 2)))


def recording(pids: set[int]) -> Callable[..., Iterator[Batch]]:
    """Return the generator in processes that also notes their numbers."""
    original = module._iter_in_processes

    def wrapped(dataset: module._Chunks, workers: int) -> Iterator[Batch]:
        batches = original(dataset, workers)
        yield next(batches)
        pids.update(child.pid for child in active_children() if child.pid)
        yield from batches

    return wrapped


@linux
def test_an_unreadable_image_ends_processes_in_its_own_line(images):
    with pytest.raises(
        UnreadableImageError, match=r"^\S+17\.png is not a readable image"
    ) as caught:
        list(iter_batches(images, CHUNKS, TRANSFORM, workers=3))
    assert caught.value.reason == "not an image"


@linux
def test_a_killed_process_is_said_in_one_line(images, monkeypatch):
    def die(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(module, "decode", die)
    handler = signal.getsignal(signal.SIGCHLD)
    with pytest.raises(OodHeatmapError, match=r"was killed.*Use fewer --workers"):
        list(iter_batches(images, CHUNKS, TRANSFORM, workers=3))
    # one that raises would do so anywhere, not only where the next batch is waited for
    assert signal.getsignal(signal.SIGCHLD) == handler


def test_little_shared_memory_means_threads(images, monkeypatch, caplog):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(64, 60, 4))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(module, "_iter_in_processes", None)
    batches = list(iter_batches(images, CHUNKS, TRANSFORM, workers=3, skip_unreadable=True))
    assert len(batches) == 6
    assert "decoding in threads" in caplog.text


@pytest.mark.parametrize(("workers", "chunks"), [(2, 6), (3, 3)])
def test_few_workers_or_batches_are_threads(images, monkeypatch, workers, chunks):
    monkeypatch.setattr(module, "_iter_in_processes", None)
    taken = iter_batches(images, CHUNKS[:chunks], TRANSFORM, workers=workers, skip_unreadable=True)
    assert len(list(taken)) == chunks


def test_arrays_of_the_input_size_are_never_decoded_in_processes(monkeypatch, tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (24, 16, 16, 3), np.uint8)
    np.save(tmp_path / "images.npy", array)
    monkeypatch.setattr(module, "_iter_in_processes", None)
    images = open_images(str(tmp_path / "images.npy"))
    chunks = np.array_split(np.arange(24), 6)
    taken = list(iter_batches(images, chunks, TRANSFORM, workers=4))
    whole = np.concatenate([batch.pixels for batch in taken])
    np.testing.assert_array_equal(whole, array.transpose(0, 3, 1, 2))


@linux
def test_leaving_early_leaves_no_process(images):
    batches = iter_batches(images, CHUNKS, TRANSFORM, workers=3, skip_unreadable=True)
    next(batches)
    assert len(active_children()) >= 3
    del batches
    for child in active_children():
        child.join(20)
    assert not active_children()


@linux
def test_an_interrupt_while_processes_start_is_raised(images, interruptible):
    # Python drops what is raised here
    interrupts = [signal.SIGINT]
    os.register_at_fork(
        after_in_parent=lambda: interrupts and signal.raise_signal(interrupts.pop())
    )
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        list(iter_batches(images, CHUNKS, TRANSFORM, workers=3, skip_unreadable=True))
    assert signal.getsignal(signal.SIGINT) is handler
    for child in active_children():
        child.join(20)
    assert not active_children()


@linux
def test_processes_leave_an_interrupt_to_their_parent(images):
    batches = iter_batches(images, CHUNKS, TRANSFORM, workers=3, skip_unreadable=True)
    first = next(batches)
    for child in active_children():
        assert child.pid
        os.kill(child.pid, signal.SIGINT)
    assert sum(len(batch.rows) for batch in [first, *batches]) == 22


@linux
def test_processes_that_cannot_be_started_are_said_in_one_line(images, monkeypatch):
    def refuse() -> int:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(os, "fork", refuse)
    with pytest.raises(OodHeatmapError, match=r"^3 processes .*unavailable.*Use fewer --workers"):
        next(iter_batches(images, CHUNKS, TRANSFORM, workers=3))


def test_no_shared_memory_means_threads(images, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(module, "_SHARED_MEMORY", str(tmp_path / "missing"))
    monkeypatch.setattr(module, "_iter_in_processes", None)
    taken = iter_batches(images, CHUNKS, TRANSFORM, workers=3, skip_unreadable=True)
    assert len(list(taken)) == 6


@linux
@pytest.mark.parametrize("ranks", [1, 8])
def test_ranks_share_the_shared_memory(images, monkeypatch, ranks):
    usage = namedtuple("usage", "total used free")
    # seven batches of four images for each of at most seven ranks
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 7 * 7 * 4 * 3 * 16**2))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    processes = iter([decode(images, CHUNKS[0], TRANSFORM)])
    monkeypatch.setattr(module, "_iter_in_processes", lambda *_: processes)
    taken = iter_batches(images, CHUNKS, TRANSFORM, workers=3, skip_unreadable=True)
    assert (taken is processes) == (ranks == 1)
