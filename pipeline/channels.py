"""Projections of wide feature maps to fewer channels, fitted once and stored with the index."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ood_heatmap.cache.files import save_tensors
from ood_heatmap.classifier import Classifier
from ood_heatmap.decoding import iter_batches
from ood_heatmap.distributed import barrier, is_main
from ood_heatmap.errors import OodHeatmapError
from ood_heatmap.images import ImageSet
from ood_heatmap.pipeline.config import IndexConfig
from ood_heatmap.pipeline.run import PROJECTIONS
from ood_heatmap.pipeline.stage import Stage
from ood_heatmap.projection import Projection, fit_projection, load_projections, to_tensors

# ID images that a projection is fitted on, evenly spaced over the set: with maps of 7x7 they have
# 12,544 channel vectors
_NUM_IMAGES = 256
# images per forward pass: always the same, for the same rounding
_BATCH_SIZE = 32


def cached_shapes(classifier: Classifier, channels: int) -> tuple[tuple[int, ...], ...]:
    """Return the shape of each feature map as it is cached.

    A wider map with more places than the deepest keeps so few that it takes no more space than the
    deepest may: 14x14 places of a ResNet-50 keep 32 of 1,024 channels.

    Args:
        classifier: The classifier, whether or not it projects its maps.
        channels: Maximum number of channels; 0 for any number.
    """
    shapes = classifier.whole_shapes
    if not channels or not shapes:
        return tuple(shapes)
    values = channels * shapes[0][1] * shapes[0][2]
    return tuple(
        (width, height, breadth)
        if width <= channels
        else (min(channels, max(1, values // (height * breadth))), height, breadth)
        for width, height, breadth in shapes
    )


def is_projected(classifier: Classifier, channels: int) -> bool:
    """Return whether a feature map has more than ``channels`` channels."""
    return cached_shapes(classifier, channels) != tuple(classifier.whole_shapes)


def project_maps(
    stage: Stage, images: ImageSet, classifier: Classifier, config: IndexConfig
) -> None:
    """Let a classifier project its wide feature maps, as fitted on some ID images by rank 0.

    A projection that an interrupted stage has stored is used again.

    Raises:
        OodHeatmapError: No image of the sample is readable.
    """
    classifier.project({})
    if not is_projected(classifier, config.map_channels):
        return
    path = stage.directory / PROJECTIONS
    if is_main() and not stage.is_intact(PROJECTIONS):
        fitted = _fit(images, classifier, config)
        save_tensors(path, to_tensors(fitted), record=partial(stage.record, PROJECTIONS))
    barrier()
    classifier.project(_read(path))


def _fit(images: ImageSet, classifier: Classifier, config: IndexConfig) -> dict[str, Projection]:
    """Fit a projection to each wide feature map, by name of the map."""
    shapes = zip(
        classifier.map_names,
        classifier.whole_shapes,
        cached_shapes(classifier, config.map_channels),
        strict=True,
    )
    return {
        name: fit_projection(_iter_maps(number, images, classifier, config), after[0])
        for number, (name, before, after) in enumerate(shapes)
        if before != after
    }


def _iter_maps(
    number: int, images: ImageSet, classifier: Classifier, config: IndexConfig
) -> Iterator[torch.Tensor]:
    """Yield one feature map of a sample of the images, batch by batch, on the CPU."""
    rows = np.unique(np.linspace(0, len(images) - 1, _NUM_IMAGES).astype(np.int64))
    count = 0
    for batch in iter_batches(
        images,
        [rows[start : start + _BATCH_SIZE] for start in range(0, len(rows), _BATCH_SIZE)],
        classifier.config.transform,
        workers=config.num_workers,
        skip_unreadable=config.skip_unreadable,
    ):
        count += len(batch.rows)
        if len(batch.rows):
            output = classifier(torch.from_numpy(batch.pixels).to(classifier.device))
            yield output.maps[number].cpu()
    if not count:
        raise OodHeatmapError(f"none of {len(rows)} images of {images.source} is readable.")


def _read(path: Path) -> dict[str, Projection]:
    """Read the projections of an unfinished index."""
    return load_projections(path.read_bytes(), path)
