"""Predict on a user's images: a table of scores and decisions, overlays and raw heatmaps.

Images are streamed: threads decode ahead of the device and write behind it, so that only a few
batches are in memory.
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
from ood_heatmap.decoding import Batch, Unreadable, iter_batches, prefetch
from ood_heatmap.detector import HeatmapDetector, Result
from ood_heatmap.errors import OodHeatmapError
from ood_heatmap.figures import add_legend, overlay
from ood_heatmap.images import ImageSet
from ood_heatmap.listing import Names
from ood_heatmap.pipeline.config import PredictConfig
from ood_heatmap.pipeline.embed import iter_outputs
from ood_heatmap.pipeline.forward import BatchedClassifier
from ood_heatmap.pipeline.meter import Meter
from ood_heatmap.source_folder import find_images, from_paths
from ood_heatmap.sources import is_image_set, open_images
from ood_heatmap.union import unite

log = logging.getLogger(__name__)

_STANDARD_INPUT = Path("-")
# maximum bytes of a file name without suffix; some encrypted file systems allow 143 in total
_MAX_NAME_BYTES = 120
# characters that a spreadsheet interprets as the start of a formula
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n")


@dataclass(frozen=True)
class _TableLine:
    """One line of the table; the fields are its columns.

    Args:
        image: Path of the file, as given by the user.
        score: Score in [0, 1]; larger is more OOD.
        p_value: Share of held-out ID images that score at least as high; None without a
            calibration.
        is_ood: The decision; None without one, see ``Result``.
        prediction: Name of the predicted class.
        overlay: Filename of the overlay in the output folder.
        heatmap: Filename of the raw heatmap in the output folder.
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
    """Results of ``predict``.

    Args:
        table: Path of the table, one line per scored image.
        num_images: Number of lines.
        skipped: Images without a line: unreadable, or without a finite score.
        not_drawn: Images with a line, but without overlay or heatmap after a write error.
    """

    table: Path
    num_images: int = 0
    skipped: list[Unreadable] = field(default_factory=list)
    not_drawn: list[Unreadable] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        """One line for each kind of problem."""
        kinds = {"a score": self.skipped, "an overlay and heatmap": self.not_drawn}
        return [
            f"images without {what}: {len(images)}, {images[0].name} first ({images[0].reason})"
            for what, images in kinds.items()
            if images
        ]


def list_images(inputs: Sequence[Path], out: Path) -> list[Path]:
    """List the given image files and all images below the given folders.

    Args:
        inputs: Files and folders; ``-`` reads further ones from standard input, one per line.
        out: The output folder; skipped if it lies below one of the folders.

    Raises:
        OodHeatmapError: A file or folder is missing, or a folder has no images.
    """
    paths: list[Path] = []
    for path in inputs:
        if path == _STANDARD_INPUT:
            paths += _read_list(out)
        elif path.is_dir():
            paths += find_images(path, skip=out)
        elif path.is_file():
            paths.append(path)
        else:
            raise OodHeatmapError(f"there is no image or folder {path}.")
    return paths


def open_inputs(inputs: Sequence[Path], out: Path) -> tuple[list[Path], ImageSet]:
    """Open image files, folders of them, and image sets of any other kind.

    Args:
        inputs: Files, folders, ``-`` and image sets, such as tar files.
        out: The output folder; skipped if it lies below one of the folders.

    Returns:
        The path of each image, where it has one, and the images.

    Raises:
        OodHeatmapError: An input is missing or cannot be read, or a folder has no images.
    """
    if not any(is_image_set(str(path)) for path in inputs):
        paths = list_images(inputs, out)
        return paths, from_paths(paths)
    paths, sets = [], []
    for path in inputs:
        if is_image_set(str(path)):
            images = open_images(str(path))
            found = list(map(Path, images.names))
        else:
            found = list_images([path], out)
            images = from_paths(found)
        paths += found
        sets.append(images)
    union = unite(sets, need_labels=False)
    return paths, replace(union, names=Names(map(str, paths)))


def _read_list(out: Path) -> Iterator[Path]:
    """Yield the paths listed on standard input; missing files raise only when they are read."""
    lines = [line.rstrip("\r") for line in os.fsdecode(sys.stdin.buffer.read()).split("\n")]
    if not any(lines):
        raise OodHeatmapError("standard input lists no images: write one path per line.")
    for path in map(Path, filter(None, lines)):
        if path.is_dir():
            yield from find_images(path, skip=out)
        else:
            yield path


def predict(
    detector: HeatmapDetector,
    paths: Sequence[Path],
    out: Path,
    config: PredictConfig,
    images: ImageSet | None = None,
) -> PredictResults:
    """Write ``scores.csv`` or ``scores.jsonl``, and overlay and raw heatmap of each image.

    Every file is written atomically, the table last. An error of one image, or of writing its
    overlay, does not affect the others.

    Args:
        detector: A trained detector.
        paths: Image files, or what ``images`` are called in the table.
        out: The output folder; created if missing, and locked while writing.
        config: Settings of the command.
        images: The images, if they are not in files of their own.

    Raises:
        OodHeatmapError: Another process writes to the folder, or the table cannot be written.
    """
    make_directory(out)
    results = PredictResults(out / f"scores.{config.format}")
    images = from_paths(paths) if images is None else images
    names = _make_output_names(paths)
    meter = Meter(len(paths), "predict")
    chunks = (
        np.arange(start, min(start + config.batch_size, len(paths)))
        for start in range(0, len(paths), config.batch_size)
    )
    batches = iter_batches(
        images,
        chunks,
        detector.classifier.config.transform,
        workers=config.num_workers,
        skip_unreadable=True,
    )
    forward = BatchedClassifier(detector.classifier, config.batch_size)

    def iter_scored() -> Iterator[_Scored]:
        for batch, outputs in iter_outputs(batches, forward, meter, None):
            _skip(batch.skipped, results)
            for scored in _decode_outputs(detector, batch, outputs, heatmaps=config.pictures):
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
        for lines in prefetch(make_lines, iter_scored(), workers=config.num_workers):
            for line in lines:
                write_line(line)
            results.num_images += len(lines)
    meter.close()
    # threads finish in arbitrary order
    results.not_drawn.sort(key=lambda image: image.row)
    return results


def _skip(images: Iterable[Unreadable], results: PredictResults) -> None:
    """Record and log images that get no line."""
    for image in images:
        log.warning("skipped %s: %s", image.name, image.reason)
        results.skipped.append(image)


@dataclass(frozen=True)
class _Scored:
    """A batch of images and the detector's result.

    Args:
        rows: ``(B,)`` positions in the list of images.
        pixels: ``(B, 3, H, W)`` uint8.
        result: Result of the detector.
        is_finite: ``(B,)`` bool, False where the classifier returned NaN or infinity.
    """

    rows: NDArray[np.int64]
    pixels: NDArray[np.uint8]
    result: Result
    is_finite: NDArray[np.bool_]


def _decode_outputs(
    detector: HeatmapDetector, batch: Batch, outputs: Sequence[Output], *, heatmaps: bool
) -> Iterator[_Scored]:
    """Decode the heatmaps of a batch, in the chunks processed by the classifier."""
    device = detector.classifier.device
    start = 0
    for output in outputs:
        chunk = slice(start, start + len(output.features))
        result = detector.decode(_to_device(output, device), heatmaps=heatmaps)
        is_finite = np.isfinite(result.score)
        for values in (output.features, output.logits):
            is_finite &= values.isfinite().all(dim=1).cpu().numpy()
        yield _Scored(batch.rows[chunk], batch.pixels[chunk], result, is_finite)
        start = chunk.stop


def _to_device(output: Output, device: torch.device) -> Output:
    """Move the classifier's output to a device."""
    maps = tuple(feature_map.to(device) for feature_map in output.maps)
    return Output(output.features.to(device), output.logits.to(device), maps)


def _make_line(detector: HeatmapDetector, result: Result, i: int, path: Path) -> _TableLine:
    """Make the table line of an image, without pictures."""
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
    """Write the overlay and raw heatmap of an image, and return its line with their filenames.

    Args:
        detector: The detector; provides the colour scale.
        scored: The batch.
        i: Position of the image in the batch.
        line: Table line of the image.
        path: Path of the files, without suffix.

    Raises:
        OodHeatmapError: A file cannot be written.
    """
    heatmap, pixel_score = scored.result.heatmap[i], scored.result.pixel_score[i]
    picture = overlay(scored.pixels[i], pixel_score, detector.color_max)
    picture = add_legend(picture, _format_legend(line), detector.color_max)
    overlay_path, heatmap_path = (path.with_name(path.name + suffix) for suffix in (".png", ".npy"))
    with replacing(overlay_path) as scratch:
        picture.save(scratch, "png", compress_level=1)
    with replacing(heatmap_path) as scratch, scratch.open("wb") as file:
        # a strided array would be written value by value
        np.save(file, np.ascontiguousarray(heatmap))
    return replace(line, overlay=overlay_path.name, heatmap=heatmap_path.name)


def _format_legend(line: _TableLine) -> list[str]:
    """Format the lines of text below an overlay."""
    numbers = [f"score {line.score:.4f}"]
    if line.p_value is not None:
        numbers.append(f"p {line.p_value:.3g}")
    if line.is_ood is not None:
        numbers.append("OOD" if line.is_ood else "ID")
    return [line.prediction, "   ".join(numbers)]


def _open_table(path: Path) -> TextIO:
    """Open a table for writing; file names that are not UTF-8 are written as raw bytes."""
    return path.open("w", encoding="utf-8", errors="surrogateescape", newline="")


def _line_writer(file: TextIO, kind: str) -> Callable[[_TableLine], object]:
    """Make a function that writes one line of a table, ``csv`` or ``jsonl``."""
    if kind == "jsonl":
        return lambda line: file.write(json.dumps(asdict(line)) + "\n")
    table = csv.DictWriter(file, [column.name for column in fields(_TableLine)])
    table.writeheader()
    return lambda line: table.writerow(
        {name: _to_cell(value) for name, value in asdict(line).items()}
    )


def _to_cell(value: str | float | bool | None) -> str | float | None:
    """Format a value for CSV.

    Booleans become ``true`` and ``false``, None becomes empty. Text that a spreadsheet would run as
    a formula gets a leading apostrophe: names of files and classes are untrusted.
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str) and value.startswith(_FORMULA_STARTS):
        return f"'{value}"
    return value


def _make_output_names(paths: Sequence[Path]) -> list[str]:
    """Make a unique output filename for each image, without suffix.

    Names are derived from the image's filename: characters that some file system or spreadsheet
    does not support become ``_``, long names are truncated and end in a hash, and duplicates get a
    number.
    """
    taken: set[str] = set()
    counts = Counter[str]()
    names = []
    for path in paths:
        name = stem = _portable_name(path.name)
        # some file systems are case-insensitive
        while name.casefold() in taken:
            counts[stem] += 1
            name = f"{stem}-{counts[stem] + 1}"
        taken.add(name.casefold())
        names.append(name)
    return names


def _portable_name(name: str) -> str:
    """Make a filename that is valid on every file system, without dots."""
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
