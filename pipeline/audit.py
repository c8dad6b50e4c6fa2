"""Find images that the image sets of a run have in common with each other and with further sets."""

import io
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from ood_heatmap.cache.flat import FlatBank, k_nearest, unit_length
from ood_heatmap.cache.manifest import MANIFEST, Manifest
from ood_heatmap.cache.shards import Rows
from ood_heatmap.duplicates import AuditedSet, find_overlaps, hash_pixels, relative_difference
from ood_heatmap.images import ImageSet, apply_transform
from ood_heatmap.pipeline.config import AuditConfig
from ood_heatmap.pipeline.embed import embed
from ood_heatmap.pipeline.forward import BatchedClassifier
from ood_heatmap.pipeline.meter import Meter
from ood_heatmap.pipeline.run import Index, Targets, open_index, open_targets, read_file
from ood_heatmap.sanity import Finding
from ood_heatmap.sources import reopen_listed

_Float32 = NDArray[np.float32]
_UInt64 = NDArray[np.uint64]
# fields of an ``AuditedSet`` that are computed from all of its images
_Measured = Mapping[str, NDArray[Any]]
_MEASURED = ("pixel_hash", "nearest", "difference")

# file of the targets that holds them for both training sets
AUDIT = "audit.npz"
# images in memory at once, in each thread
_CHUNK = 64
_NUM_THREADS = min(16, max(2, os.cpu_count() or 1))
_EMBED_CHUNK = 1024
# ID training images that are compared with all others
_NUM_SAMPLES = 1000


def audit_training_sets(index: Index, targets: Targets) -> list[AuditedSet]:
    """Prepare the ID and the OOD training set.

    Without ``AUDIT``, as in runs of earlier versions, all of their images are read again.
    """
    stored: dict[str, _Measured] = {}
    if AUDIT in targets.manifest.files:
        content = read_file(targets.run, targets.manifest, AUDIT)
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            for kind in ("ID", "OOD"):
                stored[kind] = {field: file[f"{kind}_{field}"] for field in _MEASURED}
    return [
        audit_index(index, stored.get("ID")),
        audit_open_targets(targets, index, stored.get("OOD")),
    ]


def save_audit(path: Path, sets: Sequence[AuditedSet]) -> None:
    """Save what was computed from the images of both training sets; not atomic."""
    arrays = {f"{item.kind}_{field}": getattr(item, field) for item in sets for field in _MEASURED}
    with path.open("wb") as file:
        np.savez(file, **arrays)


def audit_index(index: Index, measured: _Measured | None = None) -> AuditedSet:
    """Prepare the ID training set; all of its images are read once if they are not measured."""
    row, source = index.columns["row"].read(), index.results.source
    if measured is None:
        pixel_hash = index.pixel_hashes()
        if pixel_hash is None:
            pixel_hash = _hash_all(index.columns["images"])
        measured = {
            "pixel_hash": pixel_hash,
            "nearest": np.arange(len(row)),
            "difference": _difference_within(index),
        }
    return AuditedSet(
        f"the ID training set ({source})",
        kind="ID",
        fitted=True,
        name_of=lambda position: _name_of_row(index.manifest, source, int(row[position])),
        **measured,
    )


def _difference_within(index: Index) -> _Float32:
    """Return the differences between a sample of ID training images and the nearest other image."""
    num_images = len(index.columns["row"])
    sample = np.arange(0, num_images, -(-num_images // _NUM_SAMPLES))
    queries = unit_length(index.columns["features"].take(sample))
    nearest, closest = np.zeros(len(sample), np.int64), np.full(len(sample), np.inf, np.float32)
    start = 0
    # shard by shard, to bound the memory
    for features in index.columns["features"]:
        distance, positions = k_nearest(queries, unit_length(features), 2)
        positions += start
        distance[positions == sample[:, None]] = np.inf
        best = distance.argmin(axis=1)[:, None]
        shard_closest = np.take_along_axis(distance, best, axis=1)[:, 0]
        closer = shard_closest < closest
        nearest[closer] = np.take_along_axis(positions, best, axis=1)[closer, 0]
        closest = np.minimum(closest, shard_closest)
        start += len(features)
    images = index.columns["images"]
    return np.concatenate(
        [
            relative_difference(images.take(sample[rows]), images.take(nearest[rows]))
            for rows in np.array_split(np.arange(len(sample)), -(-len(sample) // _CHUNK))
        ]
    )


def audit_targets(
    columns: Mapping[str, Rows],
    index: Index,
    source: str,
    name_of_row: Callable[[int], str],
    measured: _Measured | None = None,
) -> AuditedSet:
    """Prepare the OOD training set; its images are recovered from their targets.

    Args:
        columns: Columns of stage 2.
        index: Index of the run.
        source: The OOD training set, as named by the user.
        name_of_row: Maps a row of the OOD training set to the name of the image.
        measured: Computed from the images before; None to read them.
    """
    row = columns["row"].read()[columns["patched"].read() == 0]
    return AuditedSet(
        f"the OOD training set ({source})",
        kind="OOD",
        fitted=True,
        name_of=lambda position: name_of_row(int(row[position])),
        **(measured or measure_targets(columns, index)),
    )


def measure_targets(
    columns: Mapping[str, Rows], index: Index, images: ImageSet | None = None
) -> _Measured:
    """Hash the OOD images and compare them with their nearest ID images.

    Args:
        columns: Columns of stage 2.
        index: Index of the run.
        images: The OOD training set; None to recover the images from exact targets.
    """
    paired = np.flatnonzero(columns["patched"].read() == 0)
    positions = index.positions(columns["nearest"].read()[paired])

    def read(chunk: NDArray[np.int64], id_images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        if images is None:
            recovered: NDArray[np.uint8] = (id_images - columns["heatmap"].take(chunk)).astype("u1")
            return recovered
        transform, rows = index.classifier_config.transform, columns["row"].take(chunk).tolist()
        return np.stack(
            [apply_transform(transform, images.read(row)[0], images.names[row]) for row in rows]
        )

    def measure(start: int) -> _Measured:
        chunk = slice(start, start + _CHUNK)
        id_images = index.columns["images"].take(positions[chunk])
        return measure_images(read(paired[chunk], id_images), id_images)

    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        parts = list(pool.map(measure, range(0, len(paired), _CHUNK)))
    return {**join_measured(parts), "nearest": positions}


def measure_images(images: NDArray[np.uint8], nearest_images: NDArray[np.uint8]) -> _Measured:
    """Hash OOD images ``(B, 3, H, W)`` and compare them with their nearest ID images."""
    return {
        "pixel_hash": hash_pixels(images),
        "difference": relative_difference(images, nearest_images),
    }


def join_measured(parts: Sequence[_Measured]) -> _Measured:
    """Concatenate what was measured of parts of a set, in order."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def audit_open_targets(
    targets: Targets, index: Index, measured: _Measured | None = None
) -> AuditedSet:
    """Prepare the OOD training set of finished targets."""
    source = targets.results.source
    return audit_targets(
        targets.columns,
        index,
        source,
        lambda row: _name_of_row(targets.manifest, source, row),
        measured,
    )


def _hash_all(images: Rows) -> _UInt64:
    """Return the hash of every image of a column."""
    chunks = [
        shard[start : start + _CHUNK] for shard in images for start in range(0, len(shard), _CHUNK)
    ]
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        return np.concatenate(list(pool.map(hash_pixels, chunks)))


def _name_of_row(manifest: Manifest, source: str, row: int) -> str:
    """Return the name of an image that a stage was made from, or its row if the name is unknown."""
    images = reopen_listed(source, manifest.inputs["images"]["listing"])
    return f"row {row}" if images is None else images.names[row]


def audit(
    run: Path,
    id_sets: Mapping[str, ImageSet],
    ood_sets: Mapping[str, ImageSet],
    device: torch.device,
    config: AuditConfig,
) -> list[Finding]:
    """Find overlaps between the training sets of a run and further sets; write nothing.

    Args:
        run: A run directory with a finished index; targets are included if they are finished.
        id_sets: ID test and calibration sets by title.
        ood_sets: OOD test sets by title.
        device: Device to embed on.
        config: Settings of the command.

    Raises:
        OodHeatmapError: The cache is damaged, or an image is unreadable.
    """
    index = open_index(run)
    if (run / "targets" / MANIFEST).is_file():
        sets = audit_training_sets(index, open_targets(run, index))
    else:
        sets = [audit_index(index)]
    forward = BatchedClassifier(index.classifier(device, num_maps=0), config.batch_size)
    id_features = FlatBank(index.columns["features"], unit_length, device)
    kinds: tuple[Literal["ID", "OOD"], ...] = ("ID", "OOD")
    for kind, further in zip(kinds, (id_sets, ood_sets), strict=True):
        for title, images in further.items():
            sets.append(_audit_images(title, kind, images, index, forward, id_features, config))
    return find_overlaps(sets)


def _audit_images(
    title: str,
    kind: Literal["ID", "OOD"],
    images: ImageSet,
    index: Index,
    forward: BatchedClassifier,
    id_features: FlatBank,
    config: AuditConfig,
) -> AuditedSet:
    """Prepare a set that is not part of the run."""
    rows = np.arange(len(images))
    meter = Meter(len(rows), "audit")
    row, pixel_hash, nearest, difference = [], [], [], []
    for chunk in embed(
        images,
        [rows[start : start + _EMBED_CHUNK] for start in range(0, len(rows), _EMBED_CHUNK)],
        forward,
        meter,
        workers=config.num_workers,
        skip_unreadable=config.skip_unreadable,
    ):
        positions = id_features.search(chunk.features, k=1)[1][:, 0]
        row.append(chunk.rows)
        pixel_hash.append(hash_pixels(chunk.images))
        nearest.append(positions)
        difference.append(
            relative_difference(chunk.images, index.columns["images"].take(positions))
        )
    meter.close()
    kept = np.concatenate(row)
    return AuditedSet(
        title,
        kind,
        fitted=False,
        name_of=lambda position: images.names[kept[position]],
        pixel_hash=np.concatenate(pixel_hash),
        nearest=np.concatenate(nearest),
        difference=np.concatenate(difference),
    )
