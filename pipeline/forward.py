"""The classifier in fixed-size batches, at the throughput of its device.

On a GPU batches run one after the other. On a CPU every core runs its own small batches: threads
that share a convolution wait for the slowest of them, and the activations of a large batch do not
fit in the caches.
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
from ood_heatmap.devices import is_out_of_memory
from ood_heatmap.errors import OodHeatmapError
from ood_heatmap.pipeline.ranges import spatial_statistics

log = logging.getLogger(__name__)
_UInt8 = NDArray[np.uint8]
# batch size of one core, and the pixels of its images together: 8 images of 224 px take a fifth of
# the memory of 32, and a tenth to a quarter less CPU time (EfficientNet-Lite0, ResNet-50)
_IMAGES_PER_CORE, _PIXELS_PER_CORE = 32, 32 * 112**2
# batches of a core that are decoded together: more would wait in memory, several times over
_BATCHES_PER_CORE = 4
# forward passes per timing window on a GPU
_PASSES_PER_WINDOW = 4


@dataclass(frozen=True)
class HostOutput(Output):
    """Output of a batch on the host: feature maps as float16, contiguous.

    Args:
        spatial: ``(B, 2, C)`` float32 of each feature map, see ``ranges.spatial_statistics``; empty
            unless asked for.
    """

    spatial: tuple[torch.Tensor, ...] = ()


@dataclass(frozen=True)
class PendingOutputs:
    """Outputs still being computed or copied to the host."""

    outputs: Sequence[Future[list[HostOutput]]]
    copied: torch.cuda.Event | None

    def wait(self) -> list[HostOutput]:
        """Block until the outputs are on the host, and return them.

        Raises:
            OodHeatmapError: The device has no memory for a single image.
        """
        outputs = [output for future in self.outputs for output in future.result()]
        if self.copied is not None:
            self.copied.synchronize()
        return outputs

    def cancel(self) -> None:
        """Cancel work that has not started."""
        for future in self.outputs:
            future.cancel()


class BatchedClassifier:
    """Runs the classifier in fixed-size batches; on out-of-memory the size is halved and logged.

    The last batch is padded to the same size, so that results do not depend on the number of
    images.

    Args:
        classifier: The classifier, on its device.
        batch_size: Images per forward pass, over all cores of a CPU, where large images are fewer.
        spatial: Return the spatial statistics of the feature maps as well.
    """

    def __init__(self, classifier: Classifier, batch_size: int, *, spatial: bool = False) -> None:
        self.classifier, self.spatial = classifier, spatial
        self.on_gpu = classifier.device.type == "cuda"
        self.size = batch_size if self.on_gpu else min(batch_size, _images_per_core(classifier))
        self.num_threads = torch.get_num_threads()
        copies = _make_copies(classifier, min(self.num_threads, batch_size // self.size))
        self.num_workers = len(copies)
        self.batch_size = batch_size
        if not self.on_gpu:
            self.batch_size = min(batch_size, _BATCHES_PER_CORE * self.size * self.num_workers)
        self.idle: SimpleQueue[Classifier] = SimpleQueue()
        for item in copies:
            self.idle.put(item)
        self.executor = (
            _InlineExecutor()
            if self.on_gpu
            else _pinned_thread_pool(self.num_workers, self.num_threads // self.num_workers)
        )
        self._halving = threading.Lock()

    def __call__(self, images: _UInt8) -> Output:
        """Classify images ``(B, 3, H, W)`` and return the output on the host."""
        outputs = self.start(images).wait()
        return Output(
            torch.cat([item.features for item in outputs]),
            torch.cat([item.logits for item in outputs]),
            tuple(torch.cat(maps) for maps in zip(*(item.maps for item in outputs), strict=True)),
        )

    def start(self, images: _UInt8) -> PendingOutputs:
        """Start to classify images and return immediately."""
        futures = [self.executor.submit(self._run, chunk) for chunk in _chunks(images, self.size)]
        copied = None
        if self.on_gpu:
            copied = torch.cuda.current_stream(self.classifier.device).record_event()
        return PendingOutputs(futures, copied)

    def _run(self, images: _UInt8) -> list[HostOutput]:
        """Classify a chunk; on out-of-memory halve the batch size and retry."""
        size = self.size
        # the size may have been halved since the chunk was submitted
        if len(images) > size:
            return [output for chunk in _chunks(images, size) for output in self._run(chunk)]
        try:
            output = self._run_on_idle_copy(self._to_device(images, size))
            return [self._to_host(output, len(images))]
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).partition("\n")[0]
        # outside of the except block the error no longer holds the activations
        self._halve_batch(size, reason)
        return self._run(images)

    def _run_on_idle_copy(self, images: torch.Tensor) -> Output:
        classifier = self.idle.get()
        try:
            output: Output = classifier(images)
        finally:
            self.idle.put(classifier)
        return output

    def _halve_batch(self, size: int, reason: str) -> None:
        """Halve the batch size that ran out of memory.

        Args:
            size: The batch size.
            reason: Message of the device.

        Raises:
            OodHeatmapError: It is already 1.
        """
        device = self.classifier.device
        with self._halving:
            # another core has halved it already
            if self.size < size:
                return
            if size == 1:
                raise OodHeatmapError(
                    f"{device} has no memory for a single image ({reason}). Use --device cpu."
                )
            self.size = size // 2
        if self.on_gpu:
            # cached blocks of the old size cannot be reused
            torch.cuda.empty_cache()
        log.warning("out of memory on %s: batch size reduced to %d", device, self.size)

    def _to_device(self, images: _UInt8, size: int) -> torch.Tensor:
        """Pad a batch to ``size`` and copy it to the device, asynchronously from pinned memory."""
        batch = torch.from_numpy(images)
        if len(images) < size or self.on_gpu:
            shape = (size, *batch.shape[1:])
            padded = torch.empty(shape, dtype=torch.uint8, pin_memory=self.on_gpu)
            padded[: len(images)] = batch
            padded[len(images) :] = 0
            batch = padded
        return batch.to(self.classifier.device, non_blocking=True)

    def _to_host(self, output: Output, count: int) -> HostOutput:
        """Start to copy the first rows of an output to the host.

        Feature maps are converted to contiguous float16, as in a shard, on the device: reordering
        channels runs at the speed of its memory there, and on one core on the host.
        """

        def to_host(tensor: torch.Tensor) -> torch.Tensor:
            return tensor[:count].to("cpu", non_blocking=True)

        maps = [
            item.to(torch.float16, memory_format=torch.contiguous_format) for item in output.maps
        ]
        return HostOutput(
            to_host(output.features),
            to_host(output.logits),
            tuple(map(to_host, maps)),
            tuple(to_host(spatial_statistics(item)) for item in maps) if self.spatial else (),
        )

    def rate(self, seconds: float) -> float:
        """Measure images/s with images already on the device.

        Args:
            seconds: Duration of the measurement, the median over windows of a few passes. There is
                no warm-up: the classifier has already run in this process.
        """
        generator = torch.Generator().manual_seed(0)
        pixels = self.classifier.config.transform.size
        batch = torch.randint(0, 256, (self.size, 3, pixels, pixels), generator=generator)
        images = batch.to(torch.uint8).to(self.classifier.device)
        passes = _PASSES_PER_WINDOW if self.on_gpu else 2 * self.num_workers
        windows: list[float] = []
        while not windows or sum(windows) < seconds:
            start = time.perf_counter()
            self.repeat(images, passes)
            windows.append(time.perf_counter() - start)
        return passes * self.size / statistics.median(windows)

    def repeat(self, images: torch.Tensor, passes: int) -> None:
        """Classify the same images, already on the device, ``passes`` times, and synchronize."""
        futures = [self.executor.submit(self._run_on_idle_copy, images) for _ in range(passes)]
        for future in futures:
            future.result()
        if self.on_gpu:
            torch.cuda.synchronize(self.classifier.device)


def _images_per_core(classifier: Classifier) -> int:
    """Return the batch size of one core."""
    pixels = classifier.config.transform.size**2
    return max(1, min(_IMAGES_PER_CORE, _PIXELS_PER_CORE // pixels))


def _chunks(images: _UInt8, size: int) -> list[_UInt8]:
    """Split images into chunks of ``size``; the last may be smaller."""
    return [images[start : start + size] for start in range(0, len(images), size)]


def _make_copies(classifier: Classifier, count: int) -> list[Classifier]:
    """Return the classifier and ``count - 1`` copies of it that share its weights.

    One per thread, because a network may store activations in its own attributes. Falls back to
    the single classifier if copying fails or a copy disagrees.
    """
    if count == 1:
        return [classifier]
    weights = {id(item): item for item in [*classifier.parameters(), *classifier.buffers()]}
    size = classifier.config.transform.size
    probe = torch.zeros(1, 3, size, size, dtype=torch.uint8, device=classifier.device)
    # user code can raise anything here
    try:
        copies = [copy.deepcopy(classifier, dict(weights)) for _ in range(count - 1)]
        expected = classifier(probe).logits
        for other in copies:
            torch.testing.assert_close(other(probe).logits, expected, equal_nan=True)
    except Exception as error:
        log.info("the classifier cannot be copied (%s): all cores share each batch", error)
        return [classifier]
    return [classifier, *copies]


class _InlineExecutor:
    """An executor that runs work in the calling thread."""

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Run the work and return its result as a finished future."""
        future: Future[Any] = Future()
        future.set_result(work(*arguments))
        return future


@lru_cache
def _pinned_thread_pool(count: int, num_threads: int) -> ThreadPoolExecutor:
    """Return a pool of ``count`` threads, each computing with ``num_threads`` intra-op threads."""
    started, before = threading.Barrier(count + 1), torch.get_num_threads()

    def initialise() -> None:
        # torch resets the thread count on a thread's first query, so query before setting
        torch.get_num_threads()
        torch.set_num_threads(num_threads)
        started.wait()

    pool = ThreadPoolExecutor(count, "core", initializer=initialise)
    for _ in range(count):
        # the pool starts a thread for each submission while none is idle
        pool.submit(int)
    started.wait()
    # set_num_threads in a thread also changes the default of new threads
    torch.set_num_threads(before)
    return pool
