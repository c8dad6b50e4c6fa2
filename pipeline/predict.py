"""Heatmaps of a user's own images: overlays, raw arrays and a table of scores."""

import csv
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ood_heatmap.cache.files import make_directory, replacing
from ood_heatmap.detector import HeatmapDetector
from ood_heatmap.errors import OodHeatmapError
from ood_heatmap.figures import overlay
from ood_heatmap.images import EXTENSIONS, UnreadableImageError, is_image, read_file
from ood_heatmap.pipeline.embed import Meter

log = logging.getLogger(__name__)


def list_images(places: Sequence[Path]) -> list[Path]:
    """Return the image files named, and those inside the folders named.

    Raises:
        OodHeatmapError: A place is missing, or a folder has no images.
    """
    found: list[Path] = []
    for place in places:
        if place.is_dir():
            inside = sorted(path for path in place.rglob("*") if path.is_file() and is_image(path))
            if not inside:
                raise OodHeatmapError(
                    f"{place} holds no images (looked for {', '.join(sorted(EXTENSIONS))})."
                )
            found += inside
        elif place.is_file():
            found.append(place)
        else:
            raise OodHeatmapError(f"there is no image or folder {place}.")
    return found


def predict(
    detector: HeatmapDetector, places: Sequence[Path], out: Path, *, batch_size: int = 64
) -> tuple[int, list[Path]]:
    """Write an overlay (PNG) and the raw heatmap (``.npy``) of each image, and ``scores.csv``.

    Args:
        detector: A trained detector.
        places: Image files and folders.
        out: Made when it is not there.
        batch_size: Images the classifier takes at once.

    Returns:
        How many images were done, and the files that could not be read; those have no line in the
        table.
    """
    paths = list_images(places)
    names = names_for(paths)
    make_directory(out)
    unreadable: list[Path] = []
    meter = Meter(len(paths), "predict")
    with replacing(out / "scores.csv") as scratch, scratch.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "score", "prediction", "overlay", "heatmap"])
        for start in range(0, len(paths), batch_size):
            part = paths[start : start + batch_size]
            lines, bad = predict_batch(detector, part, names[start : start + batch_size], out)
            table.writerows(lines)
            unreadable += bad
            meter.advance(len(part))
    meter.close()
    return len(paths) - len(unreadable), unreadable


def predict_batch(
    detector: HeatmapDetector, paths: Sequence[Path], names: Sequence[str], out: Path
) -> tuple[list[list[str]], list[Path]]:
    """Write the pictures of one batch; return its lines of the table and the unreadable files."""
    pixels, kept, unreadable = [], [], []
    for path, name in zip(paths, names, strict=True):
        try:
            image = read_file(path)[0]
            pixels.append(detector.classifier.config.transform(image))
            kept.append((path, name))
        except (UnreadableImageError, ValueError) as error:
            log.warning("%s", error)
            unreadable.append(path)
    if not kept:
        return [], unreadable
    result = detector.detect(np.stack(pixels))[0]
    strength = result.strength
    lines = []
    for i, (path, name) in enumerate(kept):
        picture = overlay(pixels[i], strength[i], detector.color_max)
        with replacing(out / f"{name}.png") as scratch:
            picture.save(scratch, "png")
        with replacing(out / f"{name}.npy") as scratch, scratch.open("wb") as file:
            np.save(file, result.heatmap[i])
        label = int(result.prediction[i])
        prediction = detector.classes[label] if detector.classes else str(label)
        score = f"{result.score[i]:.6f}"
        lines.append([str(path), score, prediction, f"{name}.png", f"{name}.npy"])
    return lines, unreadable


def names_for(paths: Sequence[Path]) -> list[str]:
    """Return a file name for each image, told apart by a number where two are called the same."""
    seen: dict[str, int] = {}
    names = []
    for path in paths:
        stem = path.name.replace(".", "_")
        seen[stem] = seen.get(stem, 0) + 1
        names.append(stem if seen[stem] == 1 else f"{stem}-{seen[stem]}")
    return names
