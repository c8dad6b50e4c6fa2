"""Scores, decisions and heatmaps of a user's own images: a table, overlays and raw arrays.

Images stream: threads decode ahead of the device, threads draw and write behind it, and no more
than a few batches are in memory.
"""

import csv
import hashlib
import json
import logging
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
from numpy.typing import NDArray

from ood_heatmap.cache.files import locked, make_directory, replacing
from ood_heatmap.classifier import Output
from ood_heatmap.detector import HeatmapDetector, Result
from ood_heatmap.errors import OodHeatmapError
from ood_heatmap.figures import add_legend, overlay
from ood_heatmap.images import Batch, Unreadable, iter_batches, prefetch
from ood_heatmap.pipeline.config import PredictConfig
from ood_heatmap.pipeline.embed import iter_outputs
from ood_heatmap.pipeline.forward import BatchedClassifier
from ood_heatmap.pipeline.meter import Meter
from ood_heatmap.sources import find_images, from_paths

log = logging.getLogger(__name__)

_STANDARD_INPUT = Path("-")
# bytes of a file's name without its suffix; some encrypted file systems allow 143 in all
_MAX_NAME_BYTES = 120
# what a spreadsheet takes for the start of a formula
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n")


@dataclass(frozen=True)
class _TableLine:
    """One line of the table; the fields are its columns.

    Args:
        image: Path of the file, as it was named.
        score: In [0, 1], larger is more OOD.
        p_value: Share of held-out ID images that score at least as high; None without a
            calibration.
        is_ood: The decision; None where there is none, see ``Result``.
        prediction: Name of the predicted class.
        overlay: Name of the picture in the output folder.
        heatmap: Name of the raw array in the output folder.
    """

    image: str
    score: float
    p_value: float | None
    is_ood: bool | None
    prediction: str
    overlay: str | None = None
    heatmap: str | None = None


@dataclass
class PredictResults:
    """What ``predict`` did.

    Args:
        table: The file with a line for each scored image.
        num_images: Number of lines.
        skipped: Images without a line: they cannot be read, or have no finite score.
        not_drawn: Images with a line whose overlay or heatmap could not be written.
    """

    table: Path
    num_images: int = 0
    skipped: list[Unreadable] = field(default_factory=list)
    not_drawn: list[Unreadable] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        """What was left out, in a few words for each kind."""
        kinds = {"a score": self.skipped, "an overlay and heatmap": self.not_drawn}
        return [
            f"images without {what}: {len(images)}, {images[0].name} first ({images[0].reason})"
            for what, images in kinds.items()
            if images
        ]


def list_images(places: Sequence[Path], out: Path) -> list[Path]:
    """Return the image files named, and those inside the folders named.

    Args:
        places: Files and folders; ``-`` stands for those listed on standard input, one a line.
        out: The output folder. If it lies inside a folder named, what an earlier call has written
            there is left out.

    Raises:
        OodHeatmapError: A file or folder is missing, or a folder has no images.
    """
    paths: list[Path] = []
    for place in places:
        if place == _STANDARD_INPUT:
            paths += _read_list(out)
        elif place.is_dir():
            paths += find_images(place, skip=out)
        elif place.is_file():
            paths.append(place)
        else:
            raise OodHeatmapError(f"there is no image or folder {place}.")
    return paths


def _read_list(out: Path) -> Iterator[Path]:
    """Yield the paths listed on standard input; missing ones are found when they are read."""
    lines = [line.rstrip("\r") for line in os.fsdecode(sys.stdin.buffer.read()).split("\n")]
    if not any(lines):
        raise OodHeatmapError("standard input lists no images: write one path a line.")
    for path in map(Path, filter(None, lines)):
        if path.is_dir():
            yield from find_images(path, skip=out)
        else:
            yield path


def predict(
    detector: HeatmapDetector, paths: Sequence[Path], out: Path, config: PredictConfig
) -> PredictResults:
    """Write ``scores.csv`` or ``scores.jsonl``, and overlay and raw heatmap of each image.

    Every file is atomic, and the table comes last. Whatever is wrong with one image, or with
    writing its overlay, the others get their lines.

    Args:
        detector: A trained detector.
        paths: Image files.
        out: The output folder, made when it is not there; locked meanwhile.
        config: Settings.

    Raises:
        OodHeatmapError: Another process writes there, or the table cannot be written.
    """
    make_directory(out)
    results = PredictResults(out / f"scores.{config.format}")
    images, names = from_paths(paths), make_output_names(paths)
    meter = Meter(len(paths), "predict")
    chunks = (
        np.arange(start, min(start + config.batch_size, len(paths)))
        for start in range(0, len(paths), config.batch_size)
    )
    batches = iter_batches(
        images,
        chunks,
        detector.classifier.config.transform,
        workers=config.workers,
        skip_unreadable=True,
    )
    forward = BatchedClassifier(detector.classifier, config.batch_size)

    def iter_scored() -> Iterator[_Scored]:
        for batch, outputs in iter_outputs(batches, forward, meter, None):
            _skip(batch.skipped, results)
            for scored in _decode_outputs(detector, batch, outputs):
                rows = scored.rows[~scored.is_finite].tolist()
                reason = "the classifier returns NaN or infinity"
                _skip([Unreadable(row, images.names[row], reason) for row in rows], results)
                yield scored

    def make_lines(scored: _Scored) -> list[_TableLine]:
        lines = []
        for i in np.flatnonzero(scored.is_finite).tolist():
            row = int(scored.rows[i])
            line = _make_line(detector, scored.result, i, paths[row])
            if config.pictures:
                try:
                    line = _write_pictures(detector, scored, i, line, out / names[row])
                except (OodHeatmapError, OSError) as error:
                    results.not_drawn.append(Unreadable(row, images.names[row], str(error)))
            lines.append(line)
        return lines

    with locked(out), replacing(results.table) as scratch, _open_table(scratch) as file:
        write_line = _line_writer(file, config.format)
        for lines in prefetch(make_lines, iter_scored(), workers=config.workers):
            for line in lines:
                write_line(line)
            results.num_images += len(lines)
    meter.close()
    # threads finish in any order
    results.not_drawn.sort(key=lambda image: image.row)
    return results


def _skip(images: Iterable[Unreadable], results: PredictResults) -> None:
    """Log images that get no line, and why."""
    for image in images:
        log.warning("skipped %s: %s", image.name, image.reason)
        results.skipped.append(image)


@dataclass(frozen=True)
class _Scored:
    """Some images, and what the detector returned for them.

    Args:
        rows: ``(B,)`` positions in the list of images.
        pixels: ``(B, 3, H, W)`` uint8.
        result: Of the detector.
        is_finite: ``(B,)`` bool, False where the classifier returned NaN or infinity.
    """

    rows: NDArray[np.int64]
    pixels: NDArray[np.uint8]
    result: Result
    is_finite: NDArray[np.bool_]


def _decode_outputs(
    detector: HeatmapDetector, batch: Batch, outputs: Sequence[Output]
) -> Iterator[_Scored]:
    """Yield the heatmaps of a batch, in the chunks in which the classifier took it."""
    start = 0
    for output in outputs:
        chunk = slice(start, start + len(output.features))
        result = detector.decode(_to_device(output, detector.classifier.device))
        is_finite = np.isfinite(result.score)
        for values in (output.features, output.logits):
            is_finite &= values.isfinite().all(dim=1).cpu().numpy()
        yield _Scored(batch.rows[chunk], batch.pixels[chunk], result, is_finite)
        start = chunk.stop


def _to_device(output: Output, device: torch.device) -> Output:
    """Return the classifier's output on a device."""
    maps = tuple(feature_map.to(device) for feature_map in output.maps)
    return Output(output.features.to(device), output.logits.to(device), maps)


def _make_line(detector: HeatmapDetector, result: Result, i: int, path: Path) -> _TableLine:
    """Return an image's line of the table, without pictures."""
    p_value = float(result.p_value[i])
    return _TableLine(
        image=str(path),
        score=round(float(result.score[i]), 6),
        p_value=None if math.isnan(p_value) else round(p_value, 6),
        is_ood=None if result.is_ood is None else bool(result.is_ood[i]),
        prediction=detector.class_name(int(result.prediction[i])),
    )


def _write_pictures(
    detector: HeatmapDetector, scored: _Scored, i: int, line: _TableLine, path: Path
) -> _TableLine:
    """Write an image's overlay and its raw heatmap, and return its line with their names.

    Args:
        detector: For its colour scale.
        scored: The batch.
        i: Position of the image in it.
        line: Of the image.
        path: Of the pictures, without suffix.

    Raises:
        OodHeatmapError: One of them cannot be written.
    """
    heatmap, pixel_score = scored.result.heatmap[i], scored.result.pixel_score[i]
    picture = overlay(scored.pixels[i], pixel_score, detector.color_max)
    picture = add_legend(picture, _format_legend(line), detector.color_max)
    overlay_path, heatmap_path = (path.with_name(path.name + suffix) for suffix in (".png", ".npy"))
    with replacing(overlay_path) as scratch:
        picture.save(scratch, "png", compress_level=1)
    with replacing(heatmap_path) as scratch, scratch.open("wb") as file:
        np.save(file, heatmap)
    return replace(line, overlay=overlay_path.name, heatmap=heatmap_path.name)


def _format_legend(line: _TableLine) -> list[str]:
    """Return the lines of text under an overlay."""
    numbers = [f"score {line.score:.4f}"]
    if line.p_value is not None:
        numbers.append(f"p {line.p_value:.3g}")
    if line.is_ood is not None:
        numbers.append("OOD" if line.is_ood else "ID")
    return [line.prediction, "   ".join(numbers)]


def _open_table(path: Path) -> TextIO:
    """Open a table; bytes of file names that are not UTF-8 are written as they are."""
    return path.open("w", encoding="utf-8", errors="surrogateescape", newline="")


def _line_writer(file: TextIO, kind: str) -> Callable[[_TableLine], object]:
    """Return a function that writes a line of a table, ``csv`` or ``jsonl``."""
    if kind == "jsonl":
        return lambda line: file.write(json.dumps(asdict(line)) + "\n")
    table = csv.DictWriter(file, [column.name for column in fields(_TableLine)])
    table.writeheader()
    return lambda line: table.writerow(
        {name: _to_cell(value) for name, value in asdict(line).items()}
    )


def _to_cell(value: str | float | bool | None) -> str | float | None:
    """Return a value for CSV.

    Booleans are ``true`` and ``false``, None is empty, and text that a spreadsheet would run as a
    formula gets an apostrophe in front: names of files and classes may come from anybody.
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str) and value.startswith(_FORMULA_STARTS):
        return f"'{value}"
    return value


def make_output_names(paths: Sequence[Path]) -> list[str]:
    """Return a name for the pictures of each image, without suffix; no two are the same.

    Made from the image's file name. What some file system or spreadsheet cannot take is replaced by
    ``_``, a long name is cut and ends in a hash, and of equal names the later ones get a number.
    """
    taken: set[str] = set()
    counts = Counter[str]()
    names = []
    for path in paths:
        name = stem = _portable_name(path.name)
        # some file systems do not tell capital letters
        while name.casefold() in taken:
            counts[stem] += 1
            name = f"{stem}-{counts[stem] + 1}"
        taken.add(name.casefold())
        names.append(name)
    return names


def _portable_name(name: str) -> str:
    """Return a file name that every file system takes, without dots."""
    portable = "".join(
        character if character.isprintable() and character not in './\\:*?"<>|' else "_"
        for character in name
    )
    if portable.startswith(_FORMULA_STARTS):
        portable = f"_{portable[1:]}"
    encoded = portable.encode()
    if len(encoded) <= _MAX_NAME_BYTES:
        return portable
    digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
    return f"{encoded[: _MAX_NAME_BYTES - 17].decode(errors='ignore')}-{digest}"
