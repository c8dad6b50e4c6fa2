"""The classifier, batch by batch, as fast as its device goes.

A GPU takes one batch after the other. On a CPU each core takes a few images of its own: threads
that share a convolution wait for the slowest of them, and what it makes of a large batch does not
stay in the caches.
"""

import copy
import logging
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ood_heatmap.classifier import Classifier, Output
from ood_heatmap.errors import OodHeatmapError

log = logging.getLogger(__name__)
UInt8 = NDArray[np.uint8]
PIECE = 32  # images that a core takes at once
WINDOW = 4  # forward passes of a GPU between two looks at the clock


@dataclass(frozen=True)
class Pending:
    """Outputs that may still be computed, or on their way from the device."""

    outputs: Sequence[Future[list[Output]]]
    arrived: torch.cuda.Event | None

    def wait(self) -> list[Output]:
        """Return them once they are there.

        Raises:
            OodHeatmapError: The device has no memory for a single image.
        """
        outputs = [output for future in self.outputs for output in future.result()]
        if self.arrived is not None:
            self.arrived.synchronize()
        return outputs

    def cancel(self) -> None:
        """Leave out what has not begun."""
        for future in self.outputs:
            future.cancel()


class Forward:
    """The classifier, with as many images at once as its device has memory for.

    All that goes through it at once is padded to one size, so that no result depends on how many
    images came along. When the device runs out of memory the size is halved for the rest of the
    run, and that is said.

    Args:
        classifier: On its device.
        batch_size: Images at once, over all cores of a CPU.
    """

    def __init__(self, classifier: Classifier, batch_size: int) -> None:
        self.classifier = classifier
        self.on_gpu = classifier.device.type == "cuda"
        self.size = batch_size if self.on_gpu else min(batch_size, PIECE)
        self.resizing = threading.Lock()
        self.num_threads = torch.get_num_threads()
        copies = copies_of(classifier, min(self.num_threads, batch_size // self.size))
        self.num_lanes = len(copies)
        self.idle: SimpleQueue[Classifier] = SimpleQueue()
        for item in copies:
            self.idle.put(item)
        of_each = self.num_threads // self.num_lanes
        self.pool = AtOnce() if self.on_gpu else cores(self.num_lanes, of_each)

    def __call__(self, images: UInt8) -> Output:
        """Return what the classifier says of images ``(B, 3, H, W)``, on the host."""
        outputs = self.start(images).wait()
        return Output(
            torch.cat([item.features for item in outputs]),
            torch.cat([item.logits for item in outputs]),
            tuple(torch.cat(maps) for maps in zip(*(item.maps for item in outputs), strict=True)),
        )

    def start(self, images: UInt8) -> Pending:
        """Begin to classify; this returns while the device still computes."""
        futures = [self.pool.submit(self.run, part) for part in parts_of(images, self.size)]
        return Pending(futures, self.event())

    def run(self, images: UInt8) -> list[Output]:
        """Classify, in smaller and smaller parts where the device has no memory for more."""
        size = self.size
        if len(images) > size:  # halved since these were dealt out
            return [output for part in parts_of(images, size) for output in self.run(part)]
        try:
            output = self.on_idle_copy(self.to_device(images, size))
            return [self.to_host(output, len(images))]
        except torch.OutOfMemoryError:
            self.halve(size)
        return self.run(images)

    def on_idle_copy(self, images: torch.Tensor) -> Output:
        """Return what the classifier says of images on its device."""
        classifier = self.idle.get()
        try:
            output: Output = classifier(images)
        finally:
            self.idle.put(classifier)
        return output

    def event(self) -> torch.cuda.Event | None:
        """Return what tells that all work of a GPU so far is done."""
        if not self.on_gpu:
            return None
        event: torch.cuda.Event = torch.cuda.current_stream(self.classifier.device).record_event()
        return event

    def halve(self, size: int) -> None:
        """Go on with less than ``size`` images at once.

        Raises:
            OodHeatmapError: There is no less.
        """
        device = self.classifier.device
        with self.resizing:
            if self.size < size:  # another core has said so already
                return
            if size == 1:
                raise OodHeatmapError(
                    f"{device} has no memory for a single image. Use --device cpu."
                ) from None
            self.size = size // 2
        if self.on_gpu:
            torch.cuda.empty_cache()  # blocks of the old size are of no use any more
        log.warning("out of memory on %s: going on with batches of %d", device, self.size)

    def to_device(self, images: UInt8, size: int) -> torch.Tensor:
        """Return a batch of full size on the device; from pinned memory, so that nothing waits."""
        batch = torch.from_numpy(images)
        if len(images) < size or self.on_gpu:
            shape = (size, *batch.shape[1:])
            padded = torch.empty(shape, dtype=torch.uint8, pin_memory=self.on_gpu)
            padded[: len(images)] = batch
            padded[len(images) :] = 0
            batch = padded
        return batch.to(self.classifier.device, non_blocking=True)

    def to_host(self, output: Output, count: int) -> Output:
        """Return the first rows of an output, on their way to the host; maps as float16."""

        def host(tensor: torch.Tensor) -> torch.Tensor:
            return tensor[:count].to("cpu", non_blocking=True)  # into pinned memory

        maps = tuple(host(item.to(torch.float16)) for item in output.maps)
        return Output(host(output.features), host(output.logits), maps)

    def rate(self, seconds: float) -> float:
        """Return the images/s with images that are on the device already.

        Args:
            seconds: How long to look; the median of windows of a few passes, one at least. There
                is no warm-up: the classifier has run before in this process.
        """
        generator = torch.Generator().manual_seed(0)
        pixels = self.classifier.config.transform.size
        batch = torch.randint(0, 256, (self.size, 3, pixels, pixels), generator=generator)
        images = batch.to(torch.uint8).to(self.classifier.device)
        passes = WINDOW if self.on_gpu else 2 * self.num_lanes
        windows: list[float] = []
        while not windows or sum(windows) < seconds:
            started = time.perf_counter()
            self.repeat(images, passes)
            windows.append(time.perf_counter() - started)
        return passes * self.size / statistics.median(windows)

    def repeat(self, images: torch.Tensor, passes: int) -> None:
        """Classify the same images, on the device already, some times, and wait for all of it."""
        for future in [self.pool.submit(self.on_idle_copy, images) for _ in range(passes)]:
            future.result()
        if self.on_gpu:
            torch.cuda.synchronize(self.classifier.device)


def parts_of(images: UInt8, size: int) -> list[UInt8]:
    """Return images in parts of ``size``; the last may be smaller."""
    return [images[start : start + size] for start in range(0, len(images), size)]


def copies_of(classifier: Classifier, count: int) -> list[Classifier]:
    """Return the classifier and copies of it, ``count`` in all, that share its weights.

    One for each thread: a network may keep what passes through it in attributes of its own. The
    classifier alone where a copy fails or says something else.
    """
    if count == 1:
        return [classifier]
    weights = {id(item): item for item in [*classifier.parameters(), *classifier.buffers()]}
    size = classifier.config.transform.size
    probe = torch.zeros(1, 3, size, size, dtype=torch.uint8, device=classifier.device)
    try:
        copies = [copy.deepcopy(classifier, dict(weights)) for _ in range(count - 1)]
        wanted = classifier(probe).logits
        for other in copies:
            torch.testing.assert_close(other(probe).logits, wanted, equal_nan=True)
    except Exception as error:  # whatever a user's own network keeps
        log.info("the classifier cannot be copied (%s): all cores share each batch", error)
        return [classifier]
    return [classifier, *copies]


class AtOnce:
    """A pool of no threads: the caller does the work."""

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Return what is done already."""
        future: Future[Any] = Future()
        future.set_result(work(*arguments))
        return future


@lru_cache
def cores(count: int, num_threads: int) -> ThreadPoolExecutor:
    """Return a pool of ``count`` threads, each of which computes with ``num_threads``."""
    started, before = threading.Barrier(count + 1), torch.get_num_threads()

    def start() -> None:
        torch.get_num_threads()  # a thread's first look at the number undoes what was set before it
        torch.set_num_threads(num_threads)
        started.wait()

    pool = ThreadPoolExecutor(count, "core", initializer=start)
    for _ in range(count):
        pool.submit(int)  # a thread is started when none is idle
    started.wait()
    torch.set_num_threads(before)  # what threads of others begin with
    return pool
