"""Stage 2 of 4.

Pair each OOD training image with its nearest ID image and store the target heatmap.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ood_heatmap.cache.files import locked, require_space
from ood_heatmap.cache.manifest import Manifest, Stage, check_files, read_manifest, require_from
from ood_heatmap.cache.neighbours import Bank, Nearest, backend, check_faiss
from ood_heatmap.cache.shards import Rows, open_rows
from ood_heatmap.classifier import Classifier
from ood_heatmap.errors import OodHeatmapError
from ood_heatmap.heatmap import SCALE, difference
from ood_heatmap.images import ImageSet
from ood_heatmap.pipeline.config import TargetsConfig
from ood_heatmap.pipeline.embed import (
    Embedded,
    Meter,
    Writer,
    content_of_stage,
    embed,
    split_rows,
    unfinished,
)
from ood_heatmap.pipeline.index import Index, map_arrays, missing, open_index
from ood_heatmap.pipeline.log import log_event

log = logging.getLogger(__name__)
Int64 = NDArray[np.int64]

NOTES: dict[str, dict[str, str | float]] = {
    "heatmap": {
        "about": "nearest ID image minus OOD image, [m, C, H, W]; times scale it is in [-1, 1]",
        "scale": SCALE,
    },
    "features": {"about": "input of the classifier's last linear layer, [m, D]"},
    "prediction": {"about": "predicted class, [m]"},
    "row": {"about": "row of the OOD data set, [m]"},
    "nearest": {"about": "row of the ID data set of the nearest ID image, [m]"},
    "distance": {"about": "Euclidean distance of the features to it, [m]"},
    "same_class": {
        "about": "0 where no ID image has the predicted class and all were searched, [m]"
    },
}


def build_targets(
    run: Path, images: ImageSet, device: torch.device, config: TargetsConfig
) -> Manifest:
    """Pair OOD images and store their targets.

    Finished shards are kept, so a stopped run goes on where it was.

    Args:
        run: A run directory with a finished index.
        images: The OOD training set.
        device: Where to embed and search.
        config: Settings of the stage.

    Returns:
        The manifest.

    Raises:
        OodHeatmapError: See the design: stale or damaged caches, unreadable images, a full disk
            and so on.
    """
    check_faiss()
    rows = chosen_rows(images, config)
    with locked(run):
        index = open_index(run)
        inputs = {
            "index": index.manifest.fingerprint,
            "images": images.describe(),
            "options": {
                "limit": config.limit,
                "seed": config.seed,
                "pairing": config.pairing,
                "shard_mb": config.shard_mb,
                "skip_unreadable": config.skip_unreadable,
            },
        }
        stage = Stage(run, "targets", inputs)
        finished = stage.begin(overwrite=config.overwrite)
        row_bytes = bytes_per_row(index)
        todo = unfinished(
            stage,
            images,
            split_rows(rows, row_bytes, config.shard_mb, config.batch_size),
            "targets",
        )
        if finished is not None and not todo:
            log.info("%s is finished already", stage.directory)
            return finished
        num_rows = sum(len(part) for _, part in todo)
        log.info("targets: will write %d heatmaps, %.0f MB", num_rows, num_rows * row_bytes / 1e6)
        require_space(run, num_rows * row_bytes)
        classifier, bank = index.classifier(device), index.bank(device)
        pair_all(stage, todo, images, classifier, index, bank, config)
        return finish(stage, images, rows, bank, config)


def chosen_rows(images: ImageSet, config: TargetsConfig) -> Int64:
    """Return the rows to pair, ascending: all, or a seeded draw.

    Raises:
        OodHeatmapError: There are fewer than asked for.
    """
    if config.limit is None:
        return np.arange(len(images))
    if config.limit > len(images):
        raise OodHeatmapError(
            f"{images.source} has {len(images)} images, --limit asks for {config.limit}. Lower it."
        )
    return np.sort(
        np.random.default_rng(config.seed).choice(len(images), config.limit, replace=False)
    )


def bytes_per_row(index: Index) -> int:
    """Return the bytes of one OOD image in a shard."""
    columns = index.columns
    maps = sum(
        int(np.prod(rows.shape[1:])) * 2
        for name, rows in columns.items()
        if name.startswith("feature_maps")
    )
    return (
        2 * int(np.prod(columns["images"].shape[1:])) + 4 * columns["features"].shape[1] + maps + 25
    )


def pair_all(
    stage: Stage,
    todo: list[tuple[Path, Int64]],
    images: ImageSet,
    classifier: Classifier,
    index: Index,
    bank: Bank,
    config: TargetsConfig,
) -> None:
    """Embed, search and write, shard by shard: as many queries at once as a shard has rows."""
    meter = Meter(sum(len(rows) for _, rows in todo), "targets")
    embedded = embed(
        images,
        [rows for _, rows in todo],
        classifier,
        meter,
        batch_size=config.batch_size,
        workers=config.workers,
        skip_unreadable=config.skip_unreadable,
    )
    with Writer() as writer:
        for (path, _), shard in zip(todo, embedded, strict=True):
            pairs = pair(shard, bank, config)
            nearest = index.columns["images"].take(index.positions(pairs.row))
            attributes = {"fingerprint": stage.settings_fingerprint, "content": shard.content}
            writer.write(path, arrays_of(shard, pairs, nearest), attributes, NOTES)
    log_event(stage.run, "targets", **meter.close(), device=str(classifier.device))


def pair(shard: Embedded, bank: Bank, config: TargetsConfig) -> Nearest:
    """Return the ID partner of each OOD image."""
    if config.pairing == "random":
        return bank.random(shard.features, shard.prediction, shard.rows, config.seed)
    return bank.nearest(shard.features, shard.prediction)


def arrays_of(
    shard: Embedded, pairs: Nearest, nearest_images: NDArray[np.uint8]
) -> dict[str, NDArray[Any]]:
    """Return the datasets of one shard."""
    return {
        "heatmap": difference(nearest_images, shard.images),
        "features": shard.features,
        "prediction": shard.prediction,
        "row": shard.rows,
        "nearest": pairs.row,
        "distance": pairs.distance.astype(np.float32),
        "same_class": pairs.same_class.astype(np.uint8),
        **map_arrays(shard),
    }


def finish(
    stage: Stage, images: ImageSet, rows: Int64, bank: Bank, config: TargetsConfig
) -> Manifest:
    """Write the manifest."""
    paths = sorted(stage.directory.glob("targets-*.h5"))
    columns = open_rows(paths)
    kept = columns["row"].read()
    results = {
        "source": images.source,
        "num_images": len(kept),
        "pairing": config.pairing,
        "backend": backend(bank.device),
        "num_without_class": int((columns["same_class"].read() == 0).sum()),
        "median_distance": float(np.median(columns["distance"].read())),
        "skipped": [
            images.names[row] for row in rows[missing(np.searchsorted(rows, kept), len(rows))]
        ],
    }
    return stage.finish(content_of_stage(paths), results, [path.name for path in paths])


@dataclass(frozen=True)
class Targets:
    """Finished targets, opened for reading; ``columns`` as in ``NOTES``, and feature maps."""

    run: Path
    manifest: Manifest
    columns: Mapping[str, Rows]


def open_targets(run: Path, index: Index) -> Targets:
    """Open finished targets, every file checked.

    Raises:
        OodHeatmapError: They are missing, unfinished, damaged, or of another index.
    """
    manifest = read_manifest(run, "targets")
    require_from(manifest, index.manifest, run)
    check_files(run, manifest)
    return Targets(run, manifest, open_rows(manifest.shard_paths(run / "targets")))
