"""Stage 1 of 4: embed the ID training set with the classifier, and index it by predicted class."""

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import save_file

from ood_heatmap.cache.files import make_directory, replacing
from ood_heatmap.cache.manifest import (
    Manifest,
    Stage,
    read_manifest,
)
from ood_heatmap.cache.neighbours import (
    backend,
    check_faiss,
    sorted_order,
    write_index,
)
from ood_heatmap.cache.shards import Rows, open_rows
from ood_heatmap.classifier import Classifier
from ood_heatmap.distributed import barrier, is_main
from ood_heatmap.errors import OodHeatmapError
from ood_heatmap.images import ImageSet
from ood_heatmap.pipeline.audit import check_index
from ood_heatmap.pipeline.config import IndexConfig, result_options
from ood_heatmap.pipeline.embed import Embedded, embed
from ood_heatmap.pipeline.log import log_speed
from ood_heatmap.pipeline.meter import Meter, report
from ood_heatmap.pipeline.run import INDEX, WEIGHTS
from ood_heatmap.pipeline.shares import (
    Work,
    Writer,
    begin,
    content_of_stage,
    sole_writer,
    split_rows,
)
from ood_heatmap.sanity import to_results

log = logging.getLogger(__name__)


NOTES: dict[str, dict[str, str | float]] = {
    "images": {"about": "ID images at the classifier's input size, RGB, [n, C, H, W]"},
    "features": {"about": "input of the classifier's last linear layer, [n, D]"},
    "prediction": {"about": "predicted class, [n]"},
    "label": {"about": "class of the data set, -1 where unknown, [n]"},
    "row": {"about": "row of the ID data set, [n]"},
}


def build_index(
    run: Path, images: ImageSet, classifier: Classifier, config: IndexConfig
) -> Manifest:
    """Embed and index the ID training set.

    Finished shards are kept, so a stopped run goes on where it was.

    Args:
        run: The run directory; made when it is not there.
        images: The ID training set.
        classifier: The fixed classifier, on the device that shall compute.
        config: Settings of the stage.

    Returns:
        The manifest; ``results`` has the accuracy, the class counts, the range of the features and
        ``warnings``, of which ``suspicious`` say that going on is probably pointless.

    Raises:
        OodHeatmapError: See the design: stale or damaged caches, unreadable images, a full disk
            and so on.
    """
    check_faiss()
    check_classes(images, classifier, config)
    if config.ignore_labels:
        images = replace(images, labels=np.full(len(images), -1, np.int32), classes=())
    make_directory(run)
    inputs = {
        "classifier": classifier.fingerprint(),
        "images": images.describe(),
        "options": result_options(config),
    }
    stage = Stage(run, "index", inputs)
    with sole_writer(run):
        rows, row_bytes = np.arange(len(images)), bytes_per_row(classifier)
        shards = {"images": split_rows(rows, row_bytes, config.shard_mb, config.batch_size)}
        finished, todo = begin(stage, images, shards, row_bytes, overwrite=config.overwrite)
        if finished is not None:
            return finished
        meter = Meter(sum(len(rows) for _, rows in todo["images"]), "index")
        embed_all(stage, todo["images"], images, classifier, config, meter)
        with meter.waiting("finish"):
            barrier()
            if is_main():
                finish(stage, images, classifier)
        figures = report(meter)
        if is_main():
            log_speed(stage, "index", {**figures, "device": str(classifier.device)})
        return read_manifest(run, "index")


def embed_all(
    stage: Stage,
    todo: list[Work],
    images: ImageSet,
    classifier: Classifier,
    config: IndexConfig,
    meter: Meter,
) -> None:
    """Embed and write, shard by shard."""
    embedded = embed(
        images,
        [rows for _, rows in todo],
        classifier,
        meter,
        batch_size=config.batch_size,
        workers=config.workers,
        skip_unreadable=config.skip_unreadable,
    )
    with Writer(meter) as writer:
        for (path, _), shard in zip(todo, embedded, strict=True):
            attributes = {"fingerprint": stage.settings_fingerprint, "content": shard.content}
            writer.write(path, arrays_of(shard, images), attributes, notes_of(shard))


def check_classes(images: ImageSet, classifier: Classifier, config: IndexConfig) -> None:
    """Refuse labels that cannot be the classifier's classes."""
    if (
        images.classes
        and not config.ignore_labels
        and len(images.classes) != classifier.num_classes
    ):
        raise OodHeatmapError(
            f"{images.source} has {len(images.classes)} classes, the classifier "
            f"{classifier.num_classes}. "
            "Name the set it was trained on, or add --ignore-labels if the folders are no classes."
        )


def bytes_per_row(classifier: Classifier) -> int:
    """Return the bytes of one ID image in a shard."""
    maps = sum(math.prod(shape) * 2 for shape in classifier.map_shapes)
    pixels = 3 * classifier.config.transform.size * classifier.config.transform.size
    num_bytes: int = pixels + 4 * classifier.num_features + maps + 16
    return num_bytes


def map_arrays(shard: Embedded) -> dict[str, NDArray[Any]]:
    """Return the feature maps under the names they have in every cache."""
    return {f"feature_maps_{number}": item for number, item in enumerate(shard.maps, start=1)}


def notes_of(shard: Embedded) -> dict[str, Mapping[str, str | float]]:
    """Return what the datasets of a shard are, in words."""
    maps: dict[str, Mapping[str, str | float]] = {
        name: {"about": "feature map of the classifier, [n, c, h, w]"} for name in map_arrays(shard)
    }
    return {**NOTES, **maps}


def arrays_of(shard: Embedded, images: ImageSet) -> dict[str, NDArray[Any]]:
    """Return the datasets of one shard."""
    return {
        "images": shard.images,
        "features": shard.features,
        "prediction": shard.prediction,
        "label": images.labels[shard.rows],
        "row": shard.rows,
        **map_arrays(shard),
    }


def finish(stage: Stage, images: ImageSet, classifier: Classifier) -> Manifest:
    """Write what is derived from the shards, then the manifest."""
    paths = sorted(stage.directory.glob("images-*.h5"))
    columns = open_rows(paths)
    order = sorted_order(columns["prediction"].read(), columns["row"].read())
    write_index(stage.directory / INDEX, columns["features"], order)
    with replacing(stage.directory / WEIGHTS) as scratch:
        save_file(
            {
                name: value.cpu().contiguous().clone()
                for name, value in classifier.network.state_dict().items()
            },
            scratch,
        )
    results = {
        "source": images.source,
        "classes": list(images.classes) if len(images.classes) == classifier.num_classes else [],
        "classifier": classifier.config.to_json(),
        "head": classifier.head,
        "num_features": classifier.num_features,
        "num_classes": classifier.num_classes,
        "map_names": list(classifier.map_names),
        "map_shapes": [list(shape) for shape in classifier.map_shapes],
        "backend": backend(classifier.device),
        **statistics(columns, classifier.num_classes),
        **to_results(check_index(columns, images.classes, classifier)),
        "skipped": [images.names[row] for row in missing(columns["row"].read(), len(images))],
    }
    names = [*(path.name for path in paths), INDEX, WEIGHTS]
    return stage.finish(content_of_stage(paths), results, names)


def statistics(columns: Mapping[str, Rows], num_classes: int) -> dict[str, Any]:
    """Return accuracy of the labelled images, class counts and the range of the features."""
    prediction, label = columns["prediction"].read(), columns["label"].read()
    known = (label >= 0) & (label < num_classes)
    return {
        "num_images": len(prediction),
        "num_labelled": int(known.sum()),
        "accuracy": float((prediction == label)[known].mean()) if known.any() else None,
        "class_counts": np.bincount(prediction, minlength=num_classes).tolist(),
        "feature_min": min(float(part.min()) for part in columns["features"]),
        "feature_max": max(float(part.max()) for part in columns["features"]),
    }


def missing(rows: NDArray[np.int64], num_images: int) -> NDArray[np.int64]:
    """Return the rows of the set that were left out."""
    return np.setdiff1d(np.arange(num_images), rows)
