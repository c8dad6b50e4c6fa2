"""Stage 1 of 4: embed the ID training set with the classifier, and index it by predicted class."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save

from ood_heatmap.cache.files import hash_file, make_directory, save_tensors
from ood_heatmap.cache.flat import check_faiss, describe_backend, write_index
from ood_heatmap.cache.manifest import Manifest, hash_json
from ood_heatmap.cache.neighbours import order_by_class
from ood_heatmap.cache.shards import Column, Rows, bytes_per_row, map_shard
from ood_heatmap.checks import library_versions
from ood_heatmap.classifier import Classifier, ClassifierConfig, restore_classifier
from ood_heatmap.devices import describe_environment, kernel_selection
from ood_heatmap.distributed import barrier, broadcast, is_main
from ood_heatmap.duplicates import hash_pixels
from ood_heatmap.errors import OodHeatmapError
from ood_heatmap.images import ImageSet
from ood_heatmap.in_memory import passing_network
from ood_heatmap.pipeline.channels import cached_shapes, is_projected, project_maps
from ood_heatmap.pipeline.config import IndexConfig, result_options
from ood_heatmap.pipeline.embed import Embedded, embed
from ood_heatmap.pipeline.forward import BatchedClassifier
from ood_heatmap.pipeline.meter import Meter
from ood_heatmap.pipeline.ranges import (
    STATISTICS,
    Moments,
    moments_of_arrays,
    shard_moments,
    sum_moments,
)
from ood_heatmap.pipeline.results import IndexResults
from ood_heatmap.pipeline.run import (
    CODE,
    INDEX,
    PIXEL_HASHES,
    PROBE,
    PROBED,
    PROJECTIONS,
    WEIGHTS,
    check_probe,
    index_columns,
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
from ood_heatmap.sanity import Finding, check_classification, texts
from ood_heatmap.user_code import trusting_code

log = logging.getLogger(__name__)

_SHARDS, _PIXEL_HASH = "images", "pixel_hash"
# number of images whose outputs are stored to verify a restored classifier
_NUM_PROBES = 8


def build_index(
    run: Path, images: ImageSet, classifier: Classifier, config: IndexConfig
) -> Manifest:
    """Embed and index the ID training set.

    Finished shards are kept, so an interrupted run resumes.

    Args:
        run: The run directory; created if missing.
        images: The ID training set.
        classifier: The fixed classifier, on the device to compute on.
        config: Settings of the stage.

    Returns:
        The manifest; its ``results`` are those of ``IndexResults``.

    Raises:
        OodHeatmapError: A cache is stale or damaged, an image is unreadable, the disk is full, or
            the labels cannot be the classifier's classes.
    """
    check_faiss()
    check_classes(images, classifier, config)
    if config.ignore_labels:
        images = replace(images, labels=np.full(len(images), -1, np.int32), classes=())
    make_directory(run)
    # None if all maps are narrow, as in a run of an earlier version, which projected none
    channels = config.map_channels if is_projected(classifier, config.map_channels) else None
    inputs = {
        "classifier": classifier.fingerprint(),
        "images": images.describe(),
        "options": {**result_options(config), "map_channels": channels},
    }
    environment = describe_environment(classifier.device, deterministic=config.deterministic)
    stage = Stage(run, "index", inputs, environment)
    with run_lock(run), kernel_selection(deterministic=config.deterministic):
        schedule = schedule_shards(
            stage,
            images,
            {_SHARDS: np.arange(len(images))},
            bytes_per_row(columns_from_classifier(classifier, config)),
            shard_mb=config.shard_mb,
            overwrite=config.overwrite,
            # index.faiss and the weights
            other_bytes=4 * len(images) * classifier.num_features
            + sum(tensor.nbytes for tensor in classifier.network.state_dict().values()),
        )
        if schedule.manifest is not None:
            return schedule.manifest
        project_maps(stage, images, classifier, config)
        meter = Meter(schedule.num_own_rows, "index")
        forward = BatchedClassifier(classifier, config.batch_size, spatial=True)
        _embed_shards(stage, schedule.own[_SHARDS], images, forward, config, meter)
        with meter.waiting("finish"):
            barrier()
            results = _write_derived(stage, schedule, images, classifier) if is_main() else None
        speed = {**meter.close(forward.rate), "device": str(classifier.device)}
        manifest = None
        if results is not None:
            names = [*schedule.names, INDEX, WEIGHTS, STATISTICS, PIXEL_HASHES, PROBE]
            names += _code_files(classifier)
            content = stage_content(stage, schedule.names)
            if channels is not None:
                names.append(PROJECTIONS)
                content = hash_json([content, hash_file(stage.directory / PROJECTIONS)])
            manifest = stage.commit(results, names, content=content, speed=speed)
        return broadcast(manifest)


def _embed_shards(
    stage: Stage,
    tasks: Sequence[ShardTask],
    images: ImageSet,
    forward: BatchedClassifier,
    config: IndexConfig,
    meter: Meter,
) -> None:
    """Embed the images and write them shard by shard."""
    embedded = embed(
        images,
        [task.source_rows for task in tasks],
        forward,
        meter,
        workers=config.num_workers,
        skip_unreadable=config.skip_unreadable,
    )
    columns = columns_from_classifier(forward.classifier, config)
    with BackgroundWriter(stage, meter) as writer:
        for task, shard in zip(tasks, embedded, strict=True):
            make_arrays = partial(_make_arrays, stage, task, shard, images)
            writer.write(task, make_arrays, columns, content=shard.content)


def _iter_intermediates(
    stage: Stage, tasks: Sequence[ShardTask]
) -> Iterator[dict[str, NDArray[Any]]]:
    """Yield moments and pixel hashes of each shard; of one of an earlier version from the shard."""
    for task, found in zip(tasks, iter_intermediates(stage, tasks), strict=True):
        if found is not None:
            yield found
        else:
            shard = map_shard(stage.directory / task.name)
            maps = [shard[column] for column in sorted(shard) if column.startswith("feature_maps")]
            moments = moments_of_arrays(shard["features"], maps)
            yield {**moments, _PIXEL_HASH: hash_pixels(shard["images"])}


def check_classes(images: ImageSet, classifier: Classifier, config: IndexConfig) -> None:
    """Reject labels that cannot be the classifier's classes.

    Raises:
        OodHeatmapError: The number of classes differs.
    """
    if (
        images.classes
        and not config.ignore_labels
        and len(images.classes) != classifier.num_classes
    ):
        raise OodHeatmapError(
            f"{images.source} has {len(images.classes)} classes, "
            f"but the classifier has {classifier.num_classes}. "
            "Use its training set, or add --ignore-labels if the folders are not classes."
        )


def _make_arrays(
    stage: Stage, task: ShardTask, shard: Embedded, images: ImageSet
) -> dict[str, NDArray[Any]]:
    """Return the datasets of one shard; writes its moments and pixel hashes."""
    moments = shard_moments(shard.features, shard.spatial, [item.shape[1:] for item in shard.maps])
    write_intermediate(stage, task, {**moments, _PIXEL_HASH: hash_pixels(shard.images)})
    return {
        "images": shard.images,
        "features": shard.features,
        "prediction": shard.prediction,
        "label": images.labels[shard.rows],
        "row": shard.rows,
        **shard.map_arrays,
    }


def columns_from_classifier(classifier: Classifier, config: IndexConfig) -> dict[str, Column]:
    """Return the columns of an index built with a classifier."""
    size, shapes = classifier.config.transform.size, cached_shapes(classifier, config.map_channels)
    return index_columns(size, classifier.num_features, shapes)


def _write_derived(
    stage: Stage, schedule: Schedule, images: ImageSet, classifier: Classifier
) -> IndexResults:
    """Write the files derived from the shards, and return the results of the stage."""
    require_rows(stage, schedule.tasks[_SHARDS])
    columns = open_shards(stage, schedule.names)
    prediction, label, row = (columns[name].read() for name in ("prediction", "label", "row"))
    write_index(
        stage.directory / INDEX,
        columns["features"],
        order_by_class(prediction, row),
        record=partial(stage.record, INDEX),
    )
    save_tensors(
        stage.directory / WEIGHTS,
        classifier.network.state_dict(),
        record=partial(stage.record, WEIGHTS),
    )
    for name, source in _code_files(classifier).items():
        with stage.writing(name) as scratch:
            scratch.write_bytes(source)
    _add_up(stage, schedule.tasks[_SHARDS])
    _write_probe(stage, columns, classifier)
    known = (label >= 0) & (label < classifier.num_classes)
    skipped = np.setdiff1d(np.arange(len(images)), row)
    findings = _check(columns, images.classes, classifier)
    return IndexResults(
        source=images.source,
        classes=images.classes if len(images.classes) == classifier.num_classes else (),
        classifier=classifier.config.to_json(),
        head=classifier.head,
        num_features=classifier.num_features,
        num_classes=classifier.num_classes,
        map_names=tuple(classifier.map_names),
        map_shapes=tuple(classifier.map_shapes),
        backend=describe_backend(classifier.device),
        num_images=len(prediction),
        num_labelled=int(known.sum()),
        accuracy=float((prediction == label)[known].mean()) if known.any() else None,
        class_counts=tuple(np.bincount(prediction, minlength=classifier.num_classes).tolist()),
        feature_min=min(float(shard.min()) for shard in columns["features"]),
        feature_max=max(float(shard.max()) for shard in columns["features"]),
        skipped=tuple(images.names[row] for row in skipped),
        versions=library_versions(),
        **texts(findings),
    )


def _code_files(classifier: Classifier) -> dict[str, bytes]:
    """Return the copy of the user's model code that the run keeps, by file name in the stage."""
    files = classifier.code.kept_files() if classifier.code else {}
    return {f"{CODE}/{name}": source for name, source in files.items()}


def _add_up(stage: Stage, tasks: Sequence[ShardTask]) -> None:
    """Write the statistics over all shards, and the pixel hashes of all images."""
    hashes = []

    def iter_moments() -> Iterator[dict[str, Moments]]:
        for part in _iter_intermediates(stage, tasks):
            hashes.append(part.pop(_PIXEL_HASH))
            yield part

    statistics = sum_moments(iter_moments())
    with stage.writing(STATISTICS) as scratch:
        scratch.write_bytes(save(statistics))
    with stage.writing(PIXEL_HASHES) as scratch:
        scratch.write_bytes(save({_PIXEL_HASH: np.concatenate(hashes)}))


def _write_probe(stage: Stage, columns: Mapping[str, Rows], classifier: Classifier) -> None:
    """Store outputs of a few images, and verify that the restored classifier reproduces them.

    Later stages repeat this check: no hash covers a change of a library, of data that the user's
    code reads, or of the processor.

    Raises:
        OodHeatmapError: The classifier cannot be restored from its weights and SPEC, or has other
            outputs when restored.
    """
    row = columns["row"]
    rows = np.unique(np.linspace(0, len(row) - 1, _NUM_PROBES).astype(np.int64))
    names = [name for name in columns if name in PROBED or name.startswith("feature_maps_")]
    tensors = {name: torch.from_numpy(columns[name].take(rows)) for name in names}
    save_tensors(stage.directory / PROBE, tensors, record=partial(stage.record, PROBE))
    # its code has just run, even if that could not be remembered
    with trusting_code(), passing_network(classifier.network):
        restored = restore_classifier(
            classifier.config,
            stage.directory / WEIGHTS,
            stage.inputs["classifier"],
            code=classifier.code,
        )
    restored.to(classifier.device).project(classifier.projections())
    check_probe(restored, tensors, library_versions())


def _check(
    columns: Mapping[str, Rows], classes: Sequence[str], classifier: Classifier
) -> list[Finding]:
    """Check what the classifier predicts on the ID training set.

    Args:
        columns: Columns of the index.
        classes: Class names by label; empty when unknown.
        classifier: The classifier of the index.
    """
    causes = "Check --weights, --mean, --std and --size."
    if _is_users_code(classifier.config):
        causes += " Unless its function loads weights, a network is random without --weights."
    return check_classification(
        columns["label"].read(),
        columns["prediction"].read(),
        classes,
        classifier.num_classes,
        causes=causes,
        unnormalized=_is_unnormalized(classifier.config),
    )


def _is_users_code(config: ClassifierConfig) -> bool:
    """Return whether the network is built by a function of the user."""
    return ":" in config.spec and not config.spec.startswith(("torchvision/", "timm/"))


def _is_unnormalized(config: ClassifierConfig) -> bool:
    """Return whether the network takes pixels in [0, 1], the default without a mean and std."""
    return set(config.mean) == {0.0} and set(config.std) == {1.0}
