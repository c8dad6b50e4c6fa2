"""Stage 2 of 4: pair OOD training images with ID images, and store the target heatmaps.

The target of an OOD image is the difference to its nearest ID image. In addition, patches of OOD
images are pasted into ID images; the target of such an image is the change made by the patch.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ood_heatmap.cache.flat import check_faiss, describe_backend
from ood_heatmap.cache.manifest import Manifest
from ood_heatmap.cache.neighbours import Bank, Nearest, squared_distances
from ood_heatmap.cache.shards import Column, Rows, bytes_per_row
from ood_heatmap.cores import local_world_size
from ood_heatmap.devices import describe_environment, kernel_selection, one_blas_thread
from ood_heatmap.distributed import (
    barrier,
    broadcast,
    is_main,
    main_process_first,
)
from ood_heatmap.duplicates import find_overlaps
from ood_heatmap.errors import OodHeatmapError, UsageError
from ood_heatmap.heatmap import default_size, stored_target
from ood_heatmap.images import ImageSet, Transform
from ood_heatmap.pipeline.audit import (
    AUDIT,
    audit_index,
    audit_targets,
    join_measured,
    measure_images,
    measure_targets,
    save_audit,
)
from ood_heatmap.pipeline.config import TargetsConfig, result_options
from ood_heatmap.pipeline.embed import Embedded, embed
from ood_heatmap.pipeline.feed import available_memory
from ood_heatmap.pipeline.forward import BatchedClassifier
from ood_heatmap.pipeline.meter import Meter
from ood_heatmap.pipeline.patched import PastePlan, pasted_images
from ood_heatmap.pipeline.results import TargetsResults
from ood_heatmap.pipeline.run import (
    PRESENCE,
    Index,
    draw_rows,
    make_paste_plan,
    open_index,
    target_columns,
)
from ood_heatmap.pipeline.schedule import (
    BackgroundWriter,
    Schedule,
    ShardTask,
    iter_intermediates,
    open_shards,
    require_rows,
    schedule_shards,
    stage_content,
    write_intermediate,
)
from ood_heatmap.pipeline.stage import Stage, run_lock
from ood_heatmap.sanity import check_ood_names, texts

log = logging.getLogger(__name__)

# search once this many queries per class are pending, or their images take a share of the free
# memory, but at least so many bytes
_QUERIES_PER_CLASS, _PENDING_SHARE, _MIN_PENDING_BYTES = 256, 16, 512 << 20
# patched images by default: per OOD image, or if these are few, per ID image up to a number
_PATCHED_PER_OOD, _PATCHED_PER_ID, _MAX_EXTRA_PATCHED = 2.0, 3, 20_000
# filename prefixes of the shards
_PAIRED, _PATCHED = "targets", "targets-patched"


@one_blas_thread()
def build_targets(
    run: Path, images: ImageSet, device: torch.device, config: TargetsConfig
) -> Manifest:
    """Pair OOD images and store their targets, and those of patched ID images.

    Finished shards are kept, so an interrupted run resumes.

    Args:
        run: A run directory with a finished index.
        images: The OOD training set.
        device: Device to embed and search on.
        config: Settings of the stage.

    Returns:
        The manifest; its ``results`` are those of ``TargetsResults``.

    Raises:
        OodHeatmapError: A cache is stale or damaged, an image is unreadable, or the disk is full.
    """
    check_faiss()
    rows = choose_rows(images, config)
    with run_lock(run), kernel_selection(deterministic=config.deterministic):
        index = open_index(run)
        config = resolve(config, index, len(rows))
        size, inputs = heatmap_size(index, config), describe_inputs(index, images, config)
        environment = describe_environment(device, deterministic=config.deterministic)
        stage = Stage(run, "targets", inputs, environment)
        squares = config.patch_shapes == "squares"
        paste_plan = make_paste_plan(index, rows, config.patched or 0, config.seed, squares=squares)
        schedule = schedule_shards(
            stage,
            images,
            {_PAIRED: rows, _PATCHED: paste_plan.row},
            bytes_per_row(columns_from_index(index, size)),
            computed_bytes=3 * index.size**2,
            shard_mb=config.shard_mb,
            overwrite=config.overwrite,
        )
        if schedule.manifest is not None:
            return schedule.manifest
        # a random pairing does not search
        search_device = torch.device("cpu") if config.pairing == "random" else device
        # rank 0 first: a missing index.faiss is rebuilt only once
        with main_process_first():
            classifier, bank = index.classifier(device), index.bank(search_device)
        meter = Meter(schedule.num_own_rows, "targets")
        forward = BatchedClassifier(classifier, config.batch_size)
        paired, patched = schedule.own[_PAIRED], schedule.own[_PATCHED]
        _pair_all(stage, paired, images, forward, index, bank, size, config, meter)
        _paste_all(stage, patched, images, forward, index, paste_plan, size, config, meter)
        with meter.waiting("finish"):
            barrier()
            results = _collect(stage, schedule, images, index, bank, config) if is_main() else None
        speed = {**meter.close(forward.rate), "device": str(device)}
        manifest = None
        if results is not None:
            content = stage_content(stage, schedule.names)
            names = [*schedule.names, AUDIT]
            manifest = stage.commit(results, names, content=content, speed=speed)
        return broadcast(manifest)


def resolve(config: TargetsConfig, index: Index, num_ood: int) -> TargetsConfig:
    """Return the settings with the number of patched images per OOD image.

    Place is learned from patched images alone, and is learned better from many.

    Args:
        config: The settings.
        index: The index.
        num_ood: Number of OOD images.
    """
    if config.patched is not None:
        return config
    wanted = min(_PATCHED_PER_ID * len(index.columns["row"]), _MAX_EXTRA_PATCHED)
    return replace(config, patched=max(_PATCHED_PER_OOD, round(wanted / max(num_ood, 1), 2)))


def choose_rows(images: ImageSet, config: TargetsConfig) -> NDArray[np.int64]:
    """Return the rows to pair, ascending: all, or a seeded random subset.

    Raises:
        OodHeatmapError: ``--limit`` exceeds the number of images.
    """
    if config.limit is not None and config.limit > len(images):
        raise OodHeatmapError(
            f"{images.source} has {len(images)} images, --limit asks for {config.limit}. Lower it."
        )
    return draw_rows(len(images), config.limit, config.seed)


def describe_inputs(index: Index, images: ImageSet, config: TargetsConfig) -> dict[str, Any]:
    """Return everything that the result of the stage depends on."""
    size = heatmap_size(index, config)
    # the default is what it is here; the images' own size is None, as in a run of an earlier
    # version, which had no other
    averaged = {"heatmap_size": None if size == index.size else size}
    return {
        "index": index.manifest.fingerprint,
        "images": images.describe(),
        "options": {**result_options(config), **averaged},
    }


def heatmap_size(index: Index, config: TargetsConfig) -> int:
    """Return the side of the targets in pixels.

    Raises:
        UsageError: It is above that of the images.
    """
    size = config.heatmap_size or default_size(index.size)
    if size > index.size:
        raise UsageError(
            f"--heatmap-size {size} is above the {index.size} px of the classifier's input: use at "
            f"most {index.size}."
        )
    return size


def columns_from_index(index: Index, size: int) -> dict[str, Column]:
    """Return the columns of targets of ``size`` pixels built from an index."""
    results = index.results
    return target_columns(index.size, size, results.num_features, results.map_shapes)


def _pair_all(
    stage: Stage,
    tasks: Sequence[ShardTask],
    images: ImageSet,
    forward: BatchedClassifier,
    index: Index,
    bank: Bank,
    size: int,
    config: TargetsConfig,
    meter: Meter,
) -> None:
    """Embed, search and write: shards are searched in groups and written one by one."""
    embedded = embed(
        images,
        [task.source_rows for task in tasks],
        forward,
        meter,
        workers=config.num_workers,
        skip_unreadable=config.skip_unreadable,
    )
    shards = zip(tasks, embedded, strict=True)
    columns = columns_from_index(index, size)
    with BackgroundWriter(stage, meter) as writer:
        num_queries = _QUERIES_PER_CLASS * len(bank.classes)
        for group in _group_shards(shards, num_queries, max_pending_bytes()):
            with meter.waiting("search"):
                pairs = _pair([shard for _, shard in group], index, bank, config)
            for (task, shard), found in zip(group, pairs, strict=True):
                make_arrays = partial(_make_paired_arrays, stage, task, shard, found, index, size)
                writer.write(task, make_arrays, columns, content=shard.content)


def max_pending_bytes() -> int:
    """Return how much memory this rank may use for images that wait for the search.

    A sixteenth of the free memory for all ranks of this machine, and at least 512 MB: with 1,000
    classes at 224 px 256 GB make groups of 44 queries per class, 512 MB of one or two.
    """
    available = available_memory(torch.device("cpu")) // local_world_size()
    return max(_MIN_PENDING_BYTES, available // _PENDING_SHARE)


def _group_shards(
    shards: Iterable[tuple[ShardTask, Embedded]], num_queries: int, max_bytes: int
) -> Iterator[list[tuple[ShardTask, Embedded]]]:
    """Yield shards in groups of at least ``num_queries`` images or ``max_bytes``.

    Searching a few queries per class is launch-bound and rereads the whole bank.
    """
    group: list[tuple[ShardTask, Embedded]] = []
    for item in shards:
        group.append(item)
        pending = [shard for _, shard in group]
        if (
            sum(len(shard.rows) for shard in pending) >= num_queries
            or sum(shard.num_bytes for shard in pending) >= max_bytes
        ):
            yield group
            group = []
    if group:
        yield group


def _paste_all(
    stage: Stage,
    tasks: Sequence[ShardTask],
    images: ImageSet,
    forward: BatchedClassifier,
    index: Index,
    paste_plan: PastePlan,
    size: int,
    config: TargetsConfig,
    meter: Meter,
) -> None:
    """Paste, embed and write, shard by shard, as ``_pair_all`` does."""
    transform = forward.classifier.config.transform
    embedded = embed(
        pasted_images(images, index.columns["images"], paste_plan, transform, size),
        [task.positions for task in tasks],
        forward,
        meter,
        workers=config.num_workers,
        skip_unreadable=config.skip_unreadable,
        # patched images are already at the input size
        transform=Transform(transform.size),
    )
    columns = columns_from_index(index, size)
    with BackgroundWriter(stage, meter) as writer:
        for task, shard in zip(tasks, embedded, strict=True):
            make_arrays = partial(_make_patched_arrays, shard, paste_plan, index)
            writer.write(task, make_arrays, columns, content=shard.content)


def _pair(
    shards: Sequence[Embedded], index: Index, bank: Bank, config: TargetsConfig
) -> list[Nearest]:
    """Find the ID image paired with each OOD image, for several shards."""
    features = np.concatenate([shard.features for shard in shards])
    prediction = np.concatenate([shard.prediction for shard in shards])
    if config.pairing == "random":
        rows = np.concatenate([shard.rows for shard in shards])
        found = bank.random(features, prediction, rows, config.seed)
    elif config.pairing == "any":
        found = bank.nearest_of_all(features, prediction)
    else:
        found = bank.nearest(features, prediction)
    ends = np.cumsum([len(shard.rows) for shard in shards]).tolist()
    pairs = [
        found.subset(slice(start, end)) for start, end in zip([0, *ends[:-1]], ends, strict=True)
    ]
    if config.pairing == "scrambled":
        return [_scramble(found, shard, index) for found, shard in zip(pairs, shards, strict=True)]
    return pairs


def _scramble(found: Nearest, shard: Embedded, index: Index) -> Nearest:
    """Permute the pairs of a shard as the paper's released code does by mistake.

    It collects the nearest images class by class, and then reads them in the order of the images.
    """
    row = found.row[np.argsort(shard.prediction, kind="stable")]
    return replace(found, row=row, distance=_distances_to(index, row, shard))


def _distances_to(index: Index, row: NDArray[np.int64], shard: Embedded) -> NDArray[np.float64]:
    """Return the float64 feature distance of each image to an ID row."""
    features = index.columns["features"].take(index.positions(row))
    return np.sqrt(squared_distances(shard.features, features))


def _make_paired_arrays(
    stage: Stage, task: ShardTask, shard: Embedded, pairs: Nearest, index: Index, size: int
) -> dict[str, NDArray[Any]]:
    """Return the datasets of one shard of OOD images; writes what the audit needs of them."""
    nearest_images = index.columns["images"].take(index.positions(pairs.row))
    write_intermediate(stage, task, measure_images(shard.images, nearest_images))
    presence = np.full((len(shard.rows), size, size), 255, np.uint8)
    return _make_arrays(shard, shard.rows, pairs, nearest_images, presence, patched=False)


def _make_patched_arrays(
    shard: Embedded, paste_plan: PastePlan, index: Index
) -> dict[str, NDArray[Any]]:
    """Return the datasets of one shard of patched images, each paired with the ID image in it."""
    row = index.row[paste_plan.position[shard.rows]]
    pairs = Nearest(row, _distances_to(index, row, shard), np.ones(len(row), dtype=bool))
    id_images = index.columns["images"].take(index.positions(row))
    ood_row = paste_plan.row[shard.rows]
    return _make_arrays(shard, ood_row, pairs, id_images, shard.masks, patched=True)


def _make_arrays(
    shard: Embedded,
    row: NDArray[np.int64],
    pairs: Nearest,
    nearest_images: NDArray[np.uint8],
    presence: NDArray[np.uint8],
    *,
    patched: bool,
) -> dict[str, NDArray[Any]]:
    """Return the datasets of one shard; ``row`` is a row of the OOD set."""
    return {
        "heatmap": stored_target(nearest_images, shard.images, presence.shape[-1]),
        "features": shard.features,
        "prediction": shard.prediction,
        "row": row,
        "nearest": pairs.row,
        "distance": pairs.distance.astype(np.float32),
        "same_class": pairs.same_class.astype(np.uint8),
        "patched": np.full(len(row), patched, np.uint8),
        PRESENCE: presence,
        **shard.map_arrays,
    }


def _find_measured(
    stage: Stage,
    tasks: Sequence[ShardTask],
    columns: Mapping[str, Rows],
    index: Index,
    images: ImageSet,
) -> Mapping[str, NDArray[Any]]:
    """Return what was measured of the OOD images; all again if that of a shard is gone."""
    parts = list(iter_intermediates(stage, tasks))
    measured = [part for part in parts if part is not None]
    if len(measured) < len(parts):
        is_averaged = columns["heatmap"].dtype == np.uint8
        return measure_targets(columns, index, images if is_averaged else None)
    paired = columns["patched"].read() == 0
    positions = index.positions(columns["nearest"].read()[paired])
    return {**join_measured(measured), "nearest": positions}


def _collect(
    stage: Stage,
    schedule: Schedule,
    images: ImageSet,
    index: Index,
    bank: Bank,
    config: TargetsConfig,
) -> TargetsResults:
    """Compute the results of the stage from its shards."""
    for tasks in schedule.tasks.values():
        require_rows(stage, tasks)
    columns = open_shards(stage, schedule.names)
    paired = columns["patched"].read() == 0
    kept = columns["row"].read()[paired]
    wanted = np.concatenate([task.source_rows for task in schedule.tasks[_PAIRED]])
    sets = [
        audit_index(index),
        audit_targets(
            columns,
            index,
            images.source,
            lambda row: images.names[row],
            _find_measured(stage, schedule.tasks[_PAIRED], columns, index, images),
        ),
    ]
    with stage.writing(AUDIT) as scratch:
        save_audit(scratch, sets)
    findings = [
        *check_ood_names(images.source, images.class_names, index.results.classes),
        *find_overlaps(sets),
    ]
    return TargetsResults(
        source=images.source,
        num_images=len(kept),
        num_patched=int((~paired).sum()),
        pairing=config.pairing,
        backend=describe_backend(bank.device),
        num_without_class=int((columns["same_class"].read() == 0).sum()),
        median_distance=float(np.median(columns["distance"].read()[paired])),
        skipped=tuple(images.names[row] for row in np.setdiff1d(wanted, kept)),
        **texts(findings),
    )
