"""Scores, decisions and heatmaps of a user's own images: a table, overlays and raw arrays.

Images stream: threads decode ahead of the device, threads draw and write behind it, and no more
than a few batches are in memory.
"""

import csv
import json
import logging
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
from numpy.typing import NDArray

from ood_heatmap.cache.files import make_directory, replacing
from ood_heatmap.classifier import Output
from ood_heatmap.detector import HeatmapDetector, Result
from ood_heatmap.errors import OodHeatmapError
from ood_heatmap.figures import add_legend, overlay
from ood_heatmap.images import Batch, iter_batches, prefetch
from ood_heatmap.pipeline.config import PredictConfig
from ood_heatmap.pipeline.embed import classified
from ood_heatmap.pipeline.forward import Forward
from ood_heatmap.pipeline.meter import Meter
from ood_heatmap.sources import find_images, from_paths, image_suffixes

log = logging.getLogger(__name__)

STANDARD_INPUT = Path("-")
COLUMNS = ("image", "score", "p_value", "is_ood", "prediction", "overlay", "heatmap")
Record = dict[str, str | float | bool | None]


def list_images(places: Sequence[Path], out: Path) -> list[Path]:
    """Return the image files named, and those inside the folders named.

    Args:
        places: Files and folders; ``-`` stands for those that standard input lists, one a line.
        out: Where results go. What an earlier call has written there is no image to predict, if it
            lies inside a folder named.

    Raises:
        OodHeatmapError: A place is missing, or a folder has no images.
    """
    found: list[Path] = []
    for place in places:
        if place == STANDARD_INPUT:
            found += listed(out)
        elif place.is_dir():
            found += images_in(place, out)
        elif place.is_file():
            found.append(place)
        else:
            raise OodHeatmapError(f"there is no image or folder {place}.")
    return found


def images_in(folder: Path, out: Path) -> list[Path]:
    """Return the image files anywhere below a folder."""
    whole, whole_out = folder.resolve(), out.resolve()
    own = folder / whole_out.relative_to(whole) if whole in whole_out.parents else None
    images, _ = find_images(folder)
    found = [path for path in images if own not in path.parents]
    if not found:
        raise OodHeatmapError(
            f"{folder} holds no images (looked for {', '.join(sorted(image_suffixes()))})."
        )
    return found


def listed(out: Path) -> Iterator[Path]:
    """Yield the paths on standard input; one that is missing is found out when it is read."""
    lines = [line.rstrip("\r") for line in os.fsdecode(sys.stdin.buffer.read()).split("\n")]
    if not any(lines):
        raise OodHeatmapError("standard input lists no images: write one path a line.")
    for path in map(Path, filter(None, lines)):
        if path.is_dir():
            yield from images_in(path, out)
        else:
            yield path


def predict(
    detector: HeatmapDetector, paths: Sequence[Path], out: Path, config: PredictConfig
) -> tuple[int, list[Path]]:
    """Write ``scores.csv`` or ``scores.jsonl``, and the overlay and raw heatmap of each image.

    Every file is whole or absent; the table, which comes last, too.

    Args:
        detector: A trained detector.
        paths: Image files.
        out: Made when it is not there.
        config: Settings.

    Returns:
        How many images were done, and the files that could not be read; those have no line in the
        table.
    """
    names = names_for(paths)
    make_directory(out)
    meter = Meter(len(paths), "predict")
    transform = detector.classifier.config.transform
    pieces = (
        np.arange(start, min(start + config.batch_size, len(paths)))
        for start in range(0, len(paths), config.batch_size)
    )
    images = from_paths(paths)
    batches = log_skipped(
        iter_batches(images, pieces, transform, workers=config.workers, skip_unreadable=True)
    )
    forward = Forward(detector.classifier, config.batch_size)
    results = (
        found
        for batch, outputs in classified(batches, forward, meter, images.names)
        for found in decoded(detector, batch, outputs)
    )
    table = out / f"scores.{config.format}"
    with replacing(table) as scratch, open_table(scratch) as file:
        write = writer_of(file, config.format)
        for records in prefetch(
            lambda found: write_batch(detector, found, paths, names, out, config),
            results,
            workers=config.workers,
        ):
            for record in records:
                write(record)
    meter.close()
    unreadable = [paths[image.row] for image in meter.skipped]
    return len(paths) - len(unreadable), unreadable


def log_skipped(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Yield the batches, and log which images of each cannot be read, and why."""
    for batch in batches:
        for image in batch.skipped:
            log.warning("skipped %s: %s", image.name, image.reason)
        yield batch


@dataclass(frozen=True)
class Found:
    """Some decoded images, and what the detector says of them.

    Args:
        rows: ``(B,)`` their places in the list of images.
        pixels: ``(B, 3, H, W)`` uint8.
        result: Of the detector.
    """

    rows: NDArray[np.int64]
    pixels: NDArray[np.uint8]
    result: Result


def decoded(detector: HeatmapDetector, batch: Batch, outputs: Sequence[Output]) -> Iterator[Found]:
    """Yield the heatmaps of a batch, in as many pieces as the classifier took it."""
    start = 0
    for output in outputs:
        here = slice(start, start + len(output.features))
        result = detector.decode(on_device(output, detector.classifier.device))
        yield Found(batch.rows[here], batch.pixels[here], result)
        start = here.stop


def on_device(output: Output, device: torch.device) -> Output:
    """Return what the classifier said, on a device."""
    maps = tuple(item.to(device) for item in output.maps)
    return Output(output.features.to(device), output.logits.to(device), maps)


def write_batch(
    detector: HeatmapDetector,
    found: Found,
    paths: Sequence[Path],
    names: Sequence[str],
    out: Path,
    config: PredictConfig,
) -> list[Record]:
    """Write the pictures of one batch, and return its lines of the table."""
    records = []
    for i, row in enumerate(found.rows):
        record = record_of(detector, found.result, i, paths[row])
        if config.pictures:
            record |= {"overlay": f"{names[row]}.png", "heatmap": f"{names[row]}.npy"}
            write_pictures(detector, found, i, record, out)
        records.append(record)
    return records


def record_of(detector: HeatmapDetector, result: Result, i: int, path: Path) -> Record:
    """Return an image's line of the table."""
    label, p_value = int(result.prediction[i]), float(result.p_value[i])
    return {
        "image": str(path),
        "score": round(float(result.score[i]), 6),
        "p_value": None if math.isnan(p_value) else round(p_value, 6),
        "is_ood": None if result.is_ood is None else bool(result.is_ood[i]),
        "prediction": detector.classes[label] if detector.classes else str(label),
        "overlay": None,
        "heatmap": None,
    }


def write_pictures(
    detector: HeatmapDetector, found: Found, i: int, record: Record, out: Path
) -> None:
    """Write an image's overlay with its legend, and its raw heatmap."""
    heatmap = found.result.heatmap[i]
    picture = overlay(found.pixels[i], np.abs(heatmap).max(axis=0), detector.color_max)
    picture = add_legend(picture, legend(record), detector.color_max)
    with replacing(out / str(record["overlay"])) as scratch:
        picture.save(scratch, "png", compress_level=1)
    with replacing(out / str(record["heatmap"])) as scratch, scratch.open("wb") as file:
        np.save(file, heatmap)


def legend(record: Record) -> list[str]:
    """Return the lines of text under an overlay."""
    numbers = f"score {record['score']:.4f}"
    if record["p_value"] is not None:
        numbers += f"   p {record['p_value']:.3g}   {'OOD' if record['is_ood'] else 'ID'}"
    return [str(record["prediction"]), numbers]


def open_table(path: Path) -> TextIO:
    """Open a table; file names that are no UTF-8 are written as they are."""
    return path.open("w", encoding="utf-8", errors="surrogateescape", newline="")


def writer_of(file: TextIO, kind: str) -> Callable[[Record], object]:
    """Return what writes a line of a table, ``csv`` or ``jsonl``."""
    if kind == "jsonl":
        return lambda record: file.write(json.dumps(record) + "\n")
    table = csv.DictWriter(file, COLUMNS)
    table.writeheader()
    return lambda record: table.writerow({key: cell(value) for key, value in record.items()})


def cell(value: str | float | bool | None) -> str | float | None:
    """Return a value as CSV has it: ``true``, ``false``, and nothing for None."""
    return str(value).lower() if isinstance(value, bool) else value


def names_for(paths: Sequence[Path]) -> list[str]:
    """Return a file name for each image, told apart by a number where two are called the same."""
    taken: set[str] = set()
    counts = Counter[str]()
    names = []
    for path in paths:
        name = stem = path.name.replace(".", "_")
        while name in taken:
            counts[stem] += 1
            name = f"{stem}-{counts[stem] + 1}"
        taken.add(name)
        names.append(name)
    return names
