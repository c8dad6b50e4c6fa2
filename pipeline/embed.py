"""Images through the classifier: decoding runs ahead in threads, and whole shards come out."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ood_heatmap.checks import check_finite
from ood_heatmap.classifier import Classifier, Output
from ood_heatmap.errors import OodHeatmapError
from ood_heatmap.images import Batch, ImageSet, Transform, iter_batches
from ood_heatmap.pipeline.forward import BatchedClassifier, PendingOutputs
from ood_heatmap.pipeline.meter import Meter as Meter
from ood_heatmap.pipeline.run import map_column
from ood_heatmap.pipeline.stage import content_hash

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
    def map_arrays(self) -> dict[str, NDArray[np.float16]]:
        """The feature maps under the names they have in every shard."""
        return {map_column(number): item for number, item in enumerate(self.maps)}

    @property
    def prediction(self) -> NDArray[np.int32]:
        """``(B,)`` int32 predicted classes."""
        prediction: NDArray[np.int32] = self.logits.argmax(axis=1).astype(np.int32)
        return prediction


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
    decoded = iter_batches(
        images,
        [piece for pieces in split for piece in pieces],
        transform or classifier.config.transform,
        workers=workers,
        skip_unreadable=skip_unreadable,
    )
    done = classified(decoded, BatchedClassifier(classifier, batch_size), meter, images.names)
    for rows, pieces in zip(shards, split, strict=True):
        shard = joined(islice(done, len(pieces)), len(rows), classifier)
        if not len(shard.rows):
            raise OodHeatmapError(
                f"none of {len(pieces[0])} images in a row of {images.source} is readable."
            )
        yield shard


def classified(
    decoded: Iterable[Batch], forward: BatchedClassifier, meter: Meter, names: Sequence[str] | None
) -> Iterator[tuple[Batch, Sequence[Output]]]:
    """Yield each batch with what the classifier says of it.

    One batch behind: the device computes while this process puts away the batch before.

    Args:
        decoded: Batches of images.
        forward: The classifier.
        meter: Accumulates counts and wait times.
        names: Of all images, for the error that features are not finite; None to let them pass.
    """
    meter.forward = forward
    behind: deque[tuple[Batch, PendingOutputs]] = deque()

    def oldest() -> tuple[Batch, Sequence[Output]]:
        batch, pending = behind[
            0
        ]  # stays there while it is waited for: it may have to be cancelled
        with meter.waiting("embed"):
            outputs = pending.wait()
        behind.popleft()
        at = 0
        for output in outputs:
            rows = batch.rows[at : at + len(output.features)]
            if names is not None:
                check_finite(output.features.numpy(), rows, names)
                check_finite(output.logits.numpy(), rows, names, "logits")
            at += len(rows)
        return batch, outputs

    try:
        for batch in meter.each(decoded, "decode"):
            with meter.waiting("embed"):
                behind.append((batch, forward.start(batch.pixels)))
            meter.add(batch, len(batch.rows) + len(batch.skipped))
            if len(behind) > 1:
                yield oldest()
        while behind:
            yield oldest()
    finally:
        for _, pending in behind:
            pending.cancel()


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
    content = content_hash(b"".join(digests))
    return Embedded(rows[:count], images[:count], features[:count], logits[:count], kept, content)
