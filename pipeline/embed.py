"""Run the classifier over an image set: prefetched decoding, output shard by shard."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ood_heatmap.checks import check_finite
from ood_heatmap.decoding import Batch, iter_batches
from ood_heatmap.errors import OodHeatmapError
from ood_heatmap.images import ImageSet, Transform
from ood_heatmap.pipeline.forward import BatchedClassifier, HostOutput, PendingOutputs
from ood_heatmap.pipeline.meter import Meter
from ood_heatmap.pipeline.run import map_column
from ood_heatmap.pipeline.schedule import content_hash


@dataclass(frozen=True)
class Embedded:
    """Images and classifier outputs of one shard, on the host.

    Args:
        rows: ``(B,)`` int64 rows of the set.
        images: ``(B, 3, H, W)`` uint8.
        features: ``(B, D)`` float32.
        logits: ``(B, L)`` float32.
        maps: Feature maps ``(B, C, h, w)`` float16, the deepest first.
        content: Hash of the digests of all images.
        masks: ``(B, h, h)`` uint8 if the set has masks, otherwise empty.
        spatial: ``(B, 2, C)`` float32 of each feature map, see ``ranges.spatial_statistics``; empty
            unless asked for.
    """

    rows: NDArray[np.int64]
    images: NDArray[np.uint8]
    features: NDArray[np.float32]
    logits: NDArray[np.float32]
    maps: tuple[NDArray[np.float16], ...]
    content: str
    masks: NDArray[np.uint8]
    spatial: tuple[NDArray[np.float32], ...] = ()

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays."""
        arrays: list[NDArray[Any]] = [
            self.rows,
            self.images,
            self.features,
            self.logits,
            self.masks,
        ]
        return sum(array.nbytes for array in [*arrays, *self.maps])

    @property
    def map_arrays(self) -> dict[str, NDArray[np.float16]]:
        """Maps column name to feature map."""
        return {map_column(number): values for number, values in enumerate(self.maps)}

    @property
    def prediction(self) -> NDArray[np.int32]:
        """``(B,)`` int32 predicted classes."""
        prediction: NDArray[np.int32] = self.logits.argmax(axis=1).astype(np.int32)
        return prediction


def embed(
    images: ImageSet,
    shards: Sequence[NDArray[np.int64]],
    forward: BatchedClassifier,
    meter: Meter,
    *,
    workers: int,
    skip_unreadable: bool,
    transform: Transform | None = None,
) -> Iterator[Embedded]:
    """Yield the images and outputs of each shard.

    Decoding continues across shard boundaries.

    Args:
        images: The set.
        shards: Rows of each shard, ascending.
        forward: The classifier on its device.
        meter: Accumulates image counts and wait times.
        workers: Number of threads or processes that decode.
        skip_unreadable: Skip unreadable images instead of raising.
        transform: Transform of the images; the classifier's if None.

    Raises:
        OodHeatmapError: An image is unreadable, features are not finite, or a shard has no readable
            image.
    """
    size = forward.batch_size
    chunks = [
        [rows[start : start + size] for start in range(0, len(rows), size)] for rows in shards
    ]
    decoded = iter_batches(
        images,
        [chunk for shard_chunks in chunks for chunk in shard_chunks],
        transform or forward.classifier.config.transform,
        workers=workers,
        skip_unreadable=skip_unreadable,
    )
    outputs = iter_outputs(decoded, forward, meter, images.names)
    for rows, shard_chunks in zip(shards, chunks, strict=True):
        batches = islice(outputs, len(shard_chunks))
        shard = _concatenate(batches, len(rows), forward)
        if not len(shard.rows):
            raise OodHeatmapError(
                f"none of {len(rows)} consecutive images of {images.source} is readable."
            )
        yield shard


def iter_outputs(
    decoded: Iterable[Batch],
    forward: BatchedClassifier,
    meter: Meter,
    names: Sequence[str] | None,
) -> Iterator[tuple[Batch, Sequence[HostOutput]]]:
    """Yield each batch with the classifier's outputs.

    Pipelined by one batch: the device computes batch n while the host stores batch n-1.

    Args:
        decoded: Batches of images.
        forward: The classifier.
        meter: Accumulates image counts and wait times.
        names: Names of all images, for the error on non-finite outputs; None to allow those.
    """
    pipeline: deque[tuple[Batch, PendingOutputs]] = deque()

    def oldest() -> tuple[Batch, Sequence[HostOutput]]:
        # peek, do not pop: if waiting fails, `finally` still cancels it
        batch, pending = pipeline[0]
        with meter.waiting("embed"):
            outputs = pending.wait()
        pipeline.popleft()
        start = 0
        for output in outputs:
            rows = batch.rows[start : start + len(output.features)]
            if names is not None:
                check_finite(output.features.numpy(), rows, names)
                check_finite(output.logits.numpy(), rows, names, "logits")
            start += len(rows)
        return batch, outputs

    try:
        for batch in meter.iter_timed(decoded, "decode"):
            with meter.waiting("embed"):
                pipeline.append((batch, forward.start(batch.pixels)))
            # on a CPU, decoding and the classifier share the cores
            stolen = 0.0 if forward.on_gpu else batch.cpu_seconds / forward.num_threads
            meter.add(batch, stolen_seconds=stolen)
            if len(pipeline) > 1:
                yield oldest()
        while pipeline:
            yield oldest()
    finally:
        for _, pending in pipeline:
            pending.cancel()


def _concatenate(
    batches: Iterable[tuple[Batch, Sequence[HostOutput]]],
    num_rows: int,
    forward: BatchedClassifier,
) -> Embedded:
    """Concatenate the batches of a shard into arrays allocated once for ``num_rows``."""
    classifier = forward.classifier
    size = classifier.config.transform.size
    rows = np.empty(num_rows, np.int64)
    images = np.empty((num_rows, 3, size, size), np.uint8)
    features = np.empty((num_rows, classifier.num_features), np.float32)
    logits = np.empty((num_rows, classifier.num_classes), np.float32)
    maps = [np.empty((num_rows, *shape), np.float16) for shape in classifier.map_shapes]
    spatial = [
        np.empty((num_rows, 2, shape[0]), np.float32)
        for shape in classifier.map_shapes
        if forward.spatial
    ]
    digests: list[bytes] = []
    masks: list[NDArray[np.uint8]] = []
    count = 0
    for batch, outputs in batches:
        chunk = slice(count, count + len(batch.rows))
        rows[chunk], images[chunk] = batch.rows, batch.pixels
        digests.append(batch.digests)
        masks.extend(batch.masks)
        for output in outputs:
            chunk = slice(count, count + len(output.features))
            features[chunk], logits[chunk] = output.features, output.logits
            for values, feature_map in zip(maps, output.maps, strict=True):
                values[chunk] = feature_map
            for statistics, found in zip(spatial, output.spatial, strict=True):
                statistics[chunk] = found
            count += len(output.features)
    return Embedded(
        rows[:count],
        images[:count],
        features[:count],
        logits[:count],
        tuple(values[:count] for values in maps),
        content_hash(b"".join(digests)),
        np.array(masks, np.uint8),
        tuple(values[:count] for values in spatial),
    )
