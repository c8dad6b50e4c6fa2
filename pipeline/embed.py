"""Images through the classifier: decoding runs ahead in threads, and whole shards come out."""

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ood_heatmap.classifier import Classifier, Output, check_finite
from ood_heatmap.errors import OodHeatmapError
from ood_heatmap.images import Batch, ImageSet, Transform, batches
from ood_heatmap.pipeline.meter import Meter as Meter
from ood_heatmap.pipeline.shares import content_of

log = logging.getLogger(__name__)
Int64 = NDArray[np.int64]
UInt8 = NDArray[np.uint8]


@dataclass(frozen=True)
class Embedded:
    """Images of one shard with all that the classifier says of them, on the host.

    Args:
        rows: ``(B,)`` int64 rows of the set.
        images: ``(B, 3, H, W)`` uint8.
        features: ``(B, D)`` float32.
        logits: ``(B, L)`` float32.
        maps: Feature maps ``(B, C, h, w)`` float16, the deepest first.
        content: sha256 of the images' bytes.
    """

    rows: Int64
    images: UInt8
    features: NDArray[np.float32]
    logits: NDArray[np.float32]
    maps: tuple[NDArray[np.float16], ...]
    content: str

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays."""
        arrays: list[NDArray[Any]] = [self.rows, self.images, self.features, self.logits]
        return sum(array.nbytes for array in [*arrays, *self.maps])

    @property
    def prediction(self) -> NDArray[np.int32]:
        """``(B,)`` int32 predicted classes."""
        prediction: NDArray[np.int32] = self.logits.argmax(axis=1).astype(np.int32)
        return prediction


class Forward:
    """The classifier, batch by batch, with as many images at once as its device has memory for.

    Every batch is padded to the same size, so that no result depends on how many came along. When
    the device runs out of memory the size is halved for the rest of the run, and that is said.

    Args:
        classifier: On its device.
        batch_size: Images at once.
    """

    def __init__(self, classifier: Classifier, batch_size: int) -> None:
        self.classifier, self.batch_size = classifier, batch_size
        self.on_gpu = classifier.device.type == "cuda"

    def start(self, images: UInt8) -> "Pending":
        """Begin to classify; on a GPU this returns while it still computes."""
        outputs: list[Output] = []
        start = 0
        while start < len(images):
            step = self.batch_size
            piece = images[start : start + step]
            try:
                outputs.append(self.to_host(self.classifier(self.to_device(piece)), len(piece)))
            except torch.OutOfMemoryError:
                self.halve()
                continue
            start += step
        return Pending(outputs, self.event())

    def event(self) -> torch.cuda.Event | None:
        """Return what tells that all work so far is done; on a CPU it is."""
        if not self.on_gpu:
            return None
        event: torch.cuda.Event = torch.cuda.current_stream(self.classifier.device).record_event()
        return event

    def halve(self) -> None:
        """Go on with smaller batches.

        Raises:
            OodHeatmapError: They cannot be smaller.
        """
        device = self.classifier.device
        if self.batch_size == 1:
            raise OodHeatmapError(
                f"{device} has no memory for a single image. Use --device cpu."
            ) from None
        self.batch_size //= 2
        if self.on_gpu:
            torch.cuda.empty_cache()  # blocks of the old size are of no use any more
        log.warning("out of memory on %s: going on with batches of %d", device, self.batch_size)

    def to_device(self, images: UInt8) -> torch.Tensor:
        """Return a batch of full size on the device; from pinned memory, so that nothing waits."""
        batch = torch.from_numpy(images)
        if len(images) < self.batch_size or self.on_gpu:
            shape = (self.batch_size, *batch.shape[1:])
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


@dataclass(frozen=True)
class Pending:
    """Outputs that may still be on their way from the device."""

    outputs: Sequence[Output]
    arrived: torch.cuda.Event | None

    def wait(self) -> Sequence[Output]:
        """Return them once they are there."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.outputs


def classify(classifier: Classifier, images: UInt8, batch_size: int) -> Output:
    """Return what the classifier says of some images, on the host."""
    outputs = Forward(classifier, batch_size).start(images).wait()
    return Output(
        torch.cat([item.features for item in outputs]),
        torch.cat([item.logits for item in outputs]),
        tuple(torch.cat(maps) for maps in zip(*(item.maps for item in outputs), strict=True)),
    )


def embed(
    images: ImageSet,
    shards: Sequence[Int64],
    classifier: Classifier,
    meter: Meter,
    *,
    batch_size: int,
    workers: int,
    skip_unreadable: bool,
    transform: Transform | None = None,
) -> Iterator[Embedded]:
    """Yield the images of each shard with their embedding.

    Decoding goes on across the shards' borders.

    Args:
        images: The set.
        shards: Rows of each shard, ascending.
        classifier: On its device.
        meter: Counts what was read, and what was waited for.
        batch_size: Images the classifier takes at once.
        workers: Threads that decode.
        skip_unreadable: Leave unreadable images out.
        transform: The classifier's when None.

    Raises:
        OodHeatmapError: An image is unreadable, features are not finite, or no image of a shard is
            left.
    """
    split = [
        [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
        for rows in shards
    ]
    decoded = batches(
        images,
        [piece for pieces in split for piece in pieces],
        transform or classifier.config.transform,
        workers=workers,
        skip_unreadable=skip_unreadable,
    )
    done = classified(decoded, Forward(classifier, batch_size), meter, images.names)
    for rows, pieces in zip(shards, split, strict=True):
        shard = joined(islice(done, len(pieces)), len(rows), classifier)
        if not len(shard.rows):
            raise OodHeatmapError(
                f"none of {len(pieces[0])} images in a row of {images.source} is readable."
            )
        yield shard


def classified(
    decoded: Iterable[Batch], forward: Forward, meter: Meter, names: Sequence[str]
) -> Iterator[tuple[Batch, Sequence[Output]]]:
    """Yield each batch with what the classifier says of it.

    On a GPU one batch behind: it computes while this process puts away the batch before.
    """
    behind: deque[tuple[Batch, Pending]] = deque()

    def oldest() -> tuple[Batch, Sequence[Output]]:
        batch, pending = behind.popleft()
        with meter.waiting("embed"):
            outputs = pending.wait()
        at = 0
        for output in outputs:
            features = output.features.numpy()
            check_finite(features, batch.rows[at:], names)
            at += len(features)
        return batch, outputs

    for batch in meter.each(decoded, "decode"):
        with meter.waiting("embed"):
            behind.append((batch, forward.start(batch.pixels)))
        meter.batch_size = forward.batch_size
        meter.add(batch, len(batch.rows) + len(batch.skipped))
        if len(behind) > forward.on_gpu:
            yield oldest()
    while behind:
        yield oldest()


def joined(
    parts: Iterable[tuple[Batch, Sequence[Output]]], num_rows: int, classifier: Classifier
) -> Embedded:
    """Return the batches of a shard as one; memory for ``num_rows`` is taken once."""
    size = classifier.config.transform.size
    rows = np.empty(num_rows, np.int64)
    images = np.empty((num_rows, 3, size, size), np.uint8)
    features = np.empty((num_rows, classifier.num_features), np.float32)
    logits = np.empty((num_rows, classifier.num_classes), np.float32)
    maps = [np.empty((num_rows, *shape), np.float16) for shape in classifier.map_shapes]
    digests: list[bytes] = []
    count = 0
    for batch, outputs in parts:
        here = slice(count, count + len(batch.rows))
        rows[here], images[here] = batch.rows, batch.pixels
        digests.append(batch.digests)
        for output in outputs:
            here = slice(count, count + len(output.features))
            features[here], logits[here] = output.features, output.logits
            for whole, item in zip(maps, output.maps, strict=True):
                whole[here] = item
            count += len(output.features)
    kept = tuple(item[:count] for item in maps)
    content = content_of(b"".join(digests))
    return Embedded(rows[:count], images[:count], features[:count], logits[:count], kept, content)
