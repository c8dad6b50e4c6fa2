"""Finished runs of any size as sparse files: real headers, rows and manifests, otherwise zeros.

The stages' own code makes the shards' names, boundaries, attributes, checksum journal and manifest.
There is no classifier and no search; images, features and heatmaps are zeros and take no space.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial, reduce
from hashlib import sha256
from pathlib import Path
from typing import Any
from unittest.mock import patch

import h5py
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from ood_heatmap.cache import manifest as manifests
from ood_heatmap.cache import shards, stamps
from ood_heatmap.cache.files import hash_file, replacing
from ood_heatmap.cache.shards import Column, Header, bytes_per_row
from ood_heatmap.checks import library_versions
from ood_heatmap.classifier import ClassifierConfig
from ood_heatmap.images import Decoded, ImageSet, Transform
from ood_heatmap.pipeline import schedule
from ood_heatmap.pipeline.config import IndexConfig, TargetsConfig, result_options
from ood_heatmap.pipeline.meter import Meter
from ood_heatmap.pipeline.ranges import STATISTICS, shard_moments
from ood_heatmap.pipeline.results import IndexResults, TargetsResults
from ood_heatmap.pipeline.run import (
    INDEX,
    Index,
    draw_rows,
    index_columns,
    make_paste_plan,
    map_index,
    read_manifest,
)
from ood_heatmap.pipeline.schedule import BackgroundWriter, content_hash, schedule_shards
from ood_heatmap.pipeline.stage import Stage
from ood_heatmap.pipeline.targets import columns_from_index, describe_inputs, heatmap_size

# ImageNet-1k as ResNet-50 sees it
NUM_ID, NUM_CLASSES, NUM_FEATURES, SIZE = 1_281_167, 1_000, 2_048, 224
# of 2,048 and 1,024 channels, as they are cached
MAP_SHAPES = ((128, 7, 7), (32, 14, 14))
# columns that are written in full: without them a run is not valid
_KEPT = {"row", "prediction", "nearest", "same_class", "patched"}
# number of distinct image files, and their size, the mean of ImageNet
_NUM_FILES, _FILE_BYTES = 1_000, 110_000
_UNREAD = "0" * 64


def hash_small(path: Path) -> str:
    """Stand in for ``hash_file``: sparse files have no checksum."""
    is_sparse = ".h5" in path.name or INDEX in path.name
    return _UNREAD if is_sparse else hash_file(path)


@dataclass(frozen=True)
class _Names(Sequence[str]):
    """A sequence of names that are made on access."""

    num_rows: int

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, row: Any) -> Any:
        if not 0 <= row < self.num_rows:
            raise IndexError(row)
        return f"{row % NUM_CLASSES:04d}/{row:08d}.jpg"


@dataclass(frozen=True)
class _CyclicReader:
    """Reads any number of rows from a few real files, cyclically."""

    paths: Sequence[Path]

    def read(self, row: int) -> tuple[Decoded, bytes]:
        return np.zeros((3, SIZE, SIZE), np.uint8), self.digest(row)

    def digest(self, row: int) -> bytes:
        return sha256(self.paths[row % len(self.paths)].read_bytes()).digest()


def image_set(folder: Path, num_images: int) -> ImageSet:
    """Return a set of ``num_images`` images from a few real files, which are made if missing."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:04d}.jpg" for number in range(_NUM_FILES)]
    generator = np.random.default_rng(0)
    for path in paths:
        if not path.exists():
            path.write_bytes(generator.bytes(_FILE_BYTES))
    status = [path.stat() for path in paths]
    files = np.array([(item.st_size, item.st_mtime_ns) for item in status], np.int64)
    return ImageSet(
        source=str(folder),
        names=_Names(num_images),
        labels=np.full(num_images, -1, np.int32),
        classes=(),
        reader=_CyclicReader(paths),
        listing=sha256(str(num_images).encode()).hexdigest(),
        stamps=files[np.arange(num_images) % _NUM_FILES],
    )


def make_folder(folder: Path, files: Path, num_images: int) -> Path:
    """Make a folder of ``num_images`` images in class folders, hard links to a few files."""
    image_set(files, num_images)
    paths = sorted(files.iterdir())
    for number in range(NUM_CLASSES):
        (folder / f"{number:04d}").mkdir(parents=True)
    for row, name in enumerate(_Names(num_images)):
        os.link(paths[row % len(paths)], folder / name)
    return folder


def make_run(run: Path, folder: Path, num_ood: int) -> None:
    """Lay out finished stages 1 and 2: ID images, and OOD images as paired and patched rows.

    Args:
        run: The run directory to make.
        folder: Folder of the image files.
        num_ood: Number of OOD images; there are as many ID images, at most those of ImageNet.
    """
    with ExitStack() as patches:
        # nothing here must survive a power cut, and zeros need no checksum
        patches.enter_context(patch("os.fsync", lambda descriptor: None))
        patches.enter_context(patch.object(manifests, "hash_file", hash_small))
        patches.enter_context(patch.object(schedule, "require_space", lambda *_: None))
        patches.enter_context(patch.object(stamps, "_TICK_NS", -1))
        patches.enter_context(patch.object(schedule, "_MAX_WRITERS", 1))
        writer = _SparseWriter()
        patches.enter_context(patch.object(schedule, "write_shard", writer.write))
        patches.enter_context(patch.object(stamps, "read_header", writer.read_header))
        _make_index(run, image_set(folder, min(num_ood, NUM_ID)))
        _make_targets(run, image_set(folder, num_ood))


def _make_index(run: Path, images: ImageSet) -> None:
    """Lay out stage 1."""
    run.mkdir(parents=True)
    count, config = len(images), IndexConfig()
    classifier = ClassifierConfig(
        "torchvision/resnet50", NUM_CLASSES, Transform(SIZE), (0.5,) * 3, (0.25,) * 3, num_maps=1
    )
    inputs = {
        "classifier": {"weights": _UNREAD},
        "images": images.describe(),
        "options": result_options(config),
    }
    columns = index_columns(SIZE, NUM_FEATURES, MAP_SHAPES)
    stage = Stage(run, "index", inputs)
    names = _write_shards(
        stage,
        images,
        {"images": (np.arange(count), {"prediction": np.arange(count) % NUM_CLASSES})},
        columns,
        config,
    )
    with stage.writing(INDEX) as scratch, scratch.open("wb") as file:
        file.truncate(count * NUM_FEATURES * 4)
    generator = np.random.default_rng(0)
    features = generator.random((2, NUM_FEATURES), np.float32)
    spatial = [generator.random((2, 2, shape[0]), np.float32) for shape in MAP_SHAPES]
    with stage.writing(STATISTICS) as scratch:
        scratch.write_bytes(save(shard_moments(features, spatial, MAP_SHAPES)))
    results = IndexResults(
        source=images.source,
        classes=(),
        classifier=classifier.to_json(),
        head="fc",
        num_features=NUM_FEATURES,
        num_classes=NUM_CLASSES,
        map_names=("layer4", "layer3"),
        map_shapes=MAP_SHAPES,
        backend="none",
        num_images=count,
        num_labelled=0,
        accuracy=None,
        class_counts=tuple(np.bincount(np.arange(count) % NUM_CLASSES).tolist()),
        feature_min=0.0,
        feature_max=1.0,
        skipped=(),
        versions=library_versions(),
    )
    stage.commit(results, [*names, INDEX, STATISTICS], content=_UNREAD)


def targets_stage(run: Path, index: Index, images: ImageSet, config: TargetsConfig) -> Stage:
    """Return stage 2 as ``build_targets`` makes it."""
    return Stage(run, "targets", describe_inputs(index, images, config))


def _make_targets(run: Path, images: ImageSet) -> None:
    """Lay out stage 2."""
    config, index = TargetsConfig(patched=2.0), map_index(run, read_manifest(run, "index"))
    rows = draw_rows(len(images), config.limit, config.seed)
    paste_plan = make_paste_plan(index, rows, 2.0, config.seed, squares=False)
    stage = targets_stage(run, index, images, config)
    columns = columns_from_index(index, heatmap_size(index, config))

    ones = np.ones(max(len(rows), len(paste_plan)), np.uint8)
    classes = rows % NUM_CLASSES
    prefixes: dict[str, tuple[NDArray[np.int64], dict[str, NDArray[Any]]]] = {
        # the ID images of a class are all the same: the nearest is the first of them
        "targets": (rows, {"prediction": classes, "nearest": classes, "same_class": ones}),
        "targets-patched": (
            paste_plan.row,
            {"nearest": index.row[paste_plan.position], "same_class": ones, "patched": ones},
        ),
    }
    names = _write_shards(stage, images, prefixes, columns, config)
    results = TargetsResults(
        source=images.source,
        num_images=len(rows),
        num_patched=len(paste_plan),
        pairing=config.pairing,
        backend="none",
        num_without_class=0,
        median_distance=0.0,
        skipped=(),
    )
    stage.commit(results, names, content=_UNREAD)


def _write_shards(
    stage: Stage,
    images: ImageSet,
    prefixes: Mapping[str, tuple[NDArray[np.int64], Mapping[str, NDArray[Any]]]],
    columns: Mapping[str, Column],
    config: IndexConfig | TargetsConfig,
) -> list[str]:
    """Write the shards of a stage as the stage does, without bytes; return their names.

    Args:
        stage: The stage.
        images: The set.
        prefixes: Rows of the set, and the columns that are not 0, by prefix of the files.
        columns: Of the stage.
        config: Settings of the stage.
    """
    schedule = schedule_shards(
        stage,
        images,
        {prefix: rows for prefix, (rows, _) in prefixes.items()},
        bytes_per_row(columns),
        shard_mb=config.shard_mb,
        overwrite=False,
        computed_bytes=3 * SIZE**2,
    )
    digests = np.array([list(images.digest(row)) for row in range(_NUM_FILES)], np.uint8)
    with BackgroundWriter(stage, Meter(0, stage.name)) as writer:
        for prefix, tasks in schedule.own.items():
            _, nonzero = prefixes[prefix]
            for task in tasks:
                kept = {"row": task.source_rows}
                kept |= {name: values[task.positions] for name, values in nonzero.items()}
                content = content_hash(digests[task.source_rows % _NUM_FILES].tobytes())
                writer.write(task, partial(_fill, kept, columns), columns, content=content)
    return schedule.names


def _fill(
    kept: Mapping[str, NDArray[Any]], columns: Mapping[str, Column]
) -> dict[str, NDArray[Any]]:
    """Return the datasets of a shard: what is kept, and zeros that take no memory."""
    arrays: dict[str, NDArray[Any]] = {
        name: np.broadcast_to(np.zeros((), column.dtype), (len(kept["row"]), *column.shape))
        for name, column in columns.items()
    }
    return arrays | {name: item.astype(columns[name].dtype) for name, item in kept.items()}


@dataclass(frozen=True)
class _Template:
    """A sparse shard, from which others with as many rows are made.

    Args:
        size: Bytes of the file.
        extents: Offset and content of what is not a hole.
        offsets: Byte offset of each dataset.
        header: As it is read.
    """

    size: int
    extents: Sequence[tuple[int, bytes]]
    offsets: Mapping[str, int | None]
    header: Header


class _SparseWriter:
    """Writes shards as ``write_shard`` does, but of most columns only the header.

    HDF5 takes milliseconds for a file: it makes one for each number of rows, and only the hashes
    among the attributes differ in the others.
    """

    def __init__(self) -> None:
        self.templates: dict[tuple[str | int, int], _Template] = {}
        self.header = Header({}, {})

    def write(
        self,
        path: Path,
        arrays: Mapping[str, NDArray[Any]],
        *,
        attributes: Mapping[str, str | int],
        columns: Mapping[str, Column],
        record: Callable[[Path], None],
    ) -> None:
        """Stand in for ``write_shard``."""
        kind = attributes["fingerprint"], len(arrays["row"])
        with replacing(path, record=record) as scratch:
            if kind not in self.templates:
                self.templates[kind] = _make_template(scratch, arrays, attributes, columns)
            template = self.templates[kind]
            hashes = [
                (str(before).encode(), str(attributes[name]).encode())
                for name, before in template.header.attributes.items()
                if name in ("content", "rows")
            ]
            with scratch.open("wb") as file:
                file.truncate(template.size)
                for offset, content in template.extents:
                    file.seek(offset)
                    file.write(reduce(lambda text, hash_: text.replace(*hash_), hashes, content))
                for name in _KEPT & arrays.keys():
                    file.seek(template.offsets[name] or 0)
                    file.write(arrays[name].tobytes())
            self.header = replace(
                template.header, attributes={**template.header.attributes, **attributes}
            )

    def read_header(self, _: Path) -> Header:
        """Stand in for ``read_header`` of the shard that was just written."""
        return self.header


def _make_template(
    path: Path,
    arrays: Mapping[str, NDArray[Any]],
    attributes: Mapping[str, str | int],
    columns: Mapping[str, Column],
) -> _Template:
    """Let HDF5 write a shard without rows, and read what is not a hole."""
    with h5py.File(path, "w") as file:
        file.attrs["format"] = shards.FORMAT
        for key, value in attributes.items():
            file.attrs[key] = value
        offsets = {
            name: shards._reserve_dataset(file, name, array, columns[name])
            for name, array in arrays.items()
        }
    return _Template(
        path.stat().st_size, list(_iter_extents(path)), offsets, shards.read_header(path)
    )


def _iter_extents(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield offset and content of each part of a file that is not a hole."""
    with path.open("rb") as file:
        end, size = 0, path.stat().st_size
        while end < size:
            try:
                start = os.lseek(file.fileno(), end, os.SEEK_DATA)
            except OSError:
                # only a hole is left
                return
            end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            yield start, os.pread(file.fileno(), end - start, start)
