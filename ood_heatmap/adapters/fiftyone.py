"""Export scores, decisions and heatmaps of photographs as a dataset of FiftyOne.

Writes its ``FiftyOneDataset`` format, so FiftyOne itself is only needed to open it.
"""

import logging
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ood_heatmap.cache.files import make_directory, replacing, write_json
from ood_heatmap.detector import HeatmapDetector, Result
from ood_heatmap.errors import UsageError, printable
from ood_heatmap.images import UnreadableImageError, exif_orientation
from ood_heatmap.pictures import Box, ColorScale
from ood_heatmap.source_folder import read_file

log = logging.getLogger(__name__)

# FiftyOne takes the folders below fields/ as those of paths in samples
_HEATMAPS = Path("fields", "heatmap")
# EXIF orientations whose width is the upright photo's height
_TURNED = range(5, 9)
# the App stretches a heatmap to its photo
_MAX_SIDE = 1024


def export_fiftyone(
    detector: HeatmapDetector,
    paths: Iterable[str | Path],
    out: str | Path,
    *,
    batch_size: int = 64,
) -> int:
    """Write a dataset that ``fiftyone.Dataset.from_dir`` opens; the photos stay where they are.

    Each sample has ``ood_score``, ``p_value``, ``ood`` (a classification, ``OOD`` or ``ID``),
    ``prediction`` and ``heatmap``, whose values 0 to 255 are pixel scores from 0 to the dataset's
    ``info["heatmap_max"]``. Without a calibration there is neither ``p_value`` nor ``ood``.

    Args:
        detector: A trained detector.
        paths: Image files. Unreadable ones are logged and skipped.
        out: Folder to write; must be new or empty.
        batch_size: Images at once.

    Returns:
        Number of samples.

    Raises:
        UsageError: The folder has files, or no image can be read.
        OodHeatmapError: The folder cannot be written.

    Source: FiftyOne's documentation, "FiftyOneDataset", and its importer of this format.
    """
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise UsageError(f"{out} has files: name a new folder.")
    make_directory(out / _HEATMAPS)
    scale = ColorScale(detector.color_max, detector.pixel_threshold)
    samples: list[dict[str, Any]] = []
    photos = _read(paths)
    while batch := list(islice(photos, batch_size)):
        result = detector([photo for _, photo in batch])
        for i, (path, photo) in enumerate(batch):
            name = _HEATMAPS / f"{len(samples):06d}.png"
            size = photo.size[::-1] if exif_orientation(photo) in _TURNED else photo.size
            box = detector.classifier.config.transform.seen_box(*size)
            picture = _place(result.pixel_score[i] / scale.top, box, size)
            with replacing(out / name) as scratch:
                picture.save(scratch, format="PNG")
            samples.append(_make_sample(detector, result, i, path, name))
    if not samples:
        raise UsageError("there is no image that can be read.")
    info = {"run": detector.fingerprint, "heatmap_max": scale.top}
    if detector.decides:
        info |= {"threshold": detector.threshold, "false_alarm": detector.false_alarm}
    metadata = {"name": out.name, "media_type": "image", "info": info}
    write_json(out / "metadata.json", metadata)
    # the last file: without it FiftyOne finds no dataset
    write_json(out / "samples.json", {"samples": samples})
    return len(samples)


def _read(paths: Iterable[str | Path]) -> Iterator[tuple[str, Image.Image]]:
    """Yield absolute path and photo of the images that can be read."""
    for path in paths:
        name = str(Path(path).absolute())
        try:
            # FiftyOne's database takes no other names
            name.encode()
            yield name, read_file(Path(path))[0]
        except UnicodeEncodeError:
            log.warning("skipped %s: its name is not UTF-8", printable(name))
        except UnreadableImageError as error:
            log.warning("skipped %s: %s", printable(name), error.reason)


def _place(share: NDArray[np.float32], box: Box, size: tuple[int, int]) -> Image.Image:
    """Return a heatmap as a greyscale picture of a whole photo, 0 outside the box.

    Args:
        share: ``(H, W)`` position of each pixel score on the colour scale, in [0, 1] or above.
        box: Part of the photo that the heatmap covers.
        size: Width and height of the upright photo.
    """
    height, width = share.shape
    left, top, right, bottom = box
    x, y = width / (right - left), height / (bottom - top)
    # the photo in pixels of the heatmap
    extent = (-left * x, -top * y, (size[0] - left) * x, (size[1] - top) * y)
    factor = min(1.0, _MAX_SIDE / max(size))
    shape = (max(1, round(factor * size[0])), max(1, round(factor * size[1])))
    heatmap = Image.fromarray(share.clip(0, 1).astype(np.float32))
    placed = heatmap.transform(shape, Image.Transform.EXTENT, extent, Image.Resampling.BILINEAR)
    return Image.fromarray((255 * np.asarray(placed)).round().astype(np.uint8))


def _make_sample(
    detector: HeatmapDetector, result: Result, i: int, path: str, heatmap: Path
) -> dict[str, Any]:
    """Return the JSON of one sample."""
    sample: dict[str, Any] = {
        "filepath": path,
        "tags": [],
        "ood_score": float(result.score[i]),
        "prediction": {
            **_classification(detector.class_name(int(result.prediction[i]))),
            "confidence": float(result.confidence[i]),
        },
        "heatmap": {"_cls": "Heatmap", "tags": [], "map_path": heatmap.as_posix()},
    }
    if detector.calibration is not None:
        sample["p_value"] = float(result.p_value[i])
    if result.is_ood is not None:
        sample["ood"] = _classification("OOD" if result.is_ood[i] else "ID")
    return sample


def _classification(label: str) -> dict[str, Any]:
    return {"_cls": "Classification", "tags": [], "label": label}
