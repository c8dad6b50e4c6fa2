"""Predict on a user's images: a table of scores and decisions, pictures and raw heatmaps.

Images are streamed: threads decode ahead of the device and write behind it, so that only a few
batches are in memory.
"""

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from ood_heatmap.cache.files import replacing
from ood_heatmap.classifier import Output
from ood_heatmap.decoding import Batch, Unreadable, iter_batches, prefetch
from ood_heatmap.detector import HeatmapDetector, Result
from ood_heatmap.errors import OodHeatmapError, UsageError
from ood_heatmap.images import ImageSet
from ood_heatmap.pictures import Neighbour
from ood_heatmap.pipeline.config import PredictConfig
from ood_heatmap.pipeline.embed import iter_outputs
from ood_heatmap.pipeline.forward import BatchedClassifier
from ood_heatmap.pipeline.meter import Meter
from ood_heatmap.pipeline.picture_writer import PictureWriter, Scored
from ood_heatmap.pipeline.result_folder import (
    PICTURES,
    common_folder,
    mirrored_names,
    replacing_results,
)
from ood_heatmap.pipeline.score_table import TableLine, line_writer, open_table
from ood_heatmap.source_folder import from_paths

log = logging.getLogger(__name__)


@dataclass
class PredictResults:
    """Results of ``predict``.

    Args:
        table: Path of the table, one line per scored image.
        num_images: Number of lines.
        num_ood: Number of them called OOD.
        pictures: Folder of the pictures; None without any.
        skipped: Images without a line: unreadable, or without a finite score.
        not_drawn: Images with a line, but without picture or heatmap after an error.
    """

    table: Path
    num_images: int = 0
    num_ood: int = 0
    pictures: Path | None = None
    skipped: list[Unreadable] = field(default_factory=list)
    not_drawn: list[Unreadable] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        """One line for each kind of problem."""
        kinds = {"a score": self.skipped, "a picture and heatmap": self.not_drawn}
        return [
            f"images without {what}: {len(images)}, {images[0].name} first ({images[0].reason})"
            for what, images in kinds.items()
            if images
        ]


def predict(
    detector: HeatmapDetector,
    paths: Sequence[Path],
    out: Path,
    config: PredictConfig,
    images: ImageSet | None = None,
    *,
    root: Path | None = None,
) -> PredictResults:
    """Write ``scores.csv`` or ``scores.jsonl``, and a picture and raw heatmap of each image.

    The results appear in the output folder when they are complete. An error of one image, or of
    its picture, does not affect the others.

    Args:
        detector: A trained detector.
        paths: Image files, or what ``images`` are called in the table.
        out: The output folder; created if missing, and locked while writing.
        config: Settings of the command.
        images: The images, if they are not in files of their own.
        root: Folder whose tree the pictures mirror; the one that all images are in if None.

    Raises:
        UsageError: Nearest ID images are asked for, but no panels, or the detector has none.
        OodHeatmapError: The output folder has other results or is being written by another process,
            or the table cannot be written.
    """
    if config.nearest and config.pictures != "panel":
        raise UsageError("nearest ID images are drawn in panels only: leave out --nearest.")
    if config.nearest and detector.id_images is None:
        raise UsageError("this detector has no ID images: leave out --nearest, or name its run.")
    images = from_paths(paths) if images is None else images
    results = PredictResults(out / f"scores.{config.format}")
    scored = _iter_scored(detector, images, config, results)
    with (
        replacing_results(out, overwrite=config.overwrite) as folder,
        replacing(folder / results.table.name) as scratch,
        open_table(scratch) as file,
    ):
        writer = None
        if config.pictures != "none":
            names = mirrored_names(paths, root or common_folder((), paths))
            is_panel = config.pictures == "panel"
            writer = PictureWriter(detector, images, folder, names, is_panel=is_panel)
        make_lines = partial(_make_lines, detector, paths, images.names, writer, results)
        write_line = line_writer(file, config.format)
        for lines in prefetch(make_lines, scored, workers=config.num_workers):
            for line in lines:
                write_line(line)
            results.num_images += len(lines)
            results.num_ood += sum(line.is_ood is True for line in lines)
    if writer is not None and len(results.not_drawn) < results.num_images:
        results.pictures = out / PICTURES
    # threads finish in arbitrary order
    results.not_drawn.sort(key=lambda image: image.row)
    return results


def _iter_scored(
    detector: HeatmapDetector,
    images: ImageSet,
    config: PredictConfig,
    results: PredictResults,
) -> Iterator[Scored]:
    """Score the images in order; those without a score are added to ``results.skipped``."""
    meter = Meter(len(images), "predict")
    chunks = (
        np.arange(start, min(start + config.batch_size, len(images)))
        for start in range(0, len(images), config.batch_size)
    )
    batches = iter_batches(
        images,
        chunks,
        detector.classifier.config.transform,
        workers=config.num_workers,
        skip_unreadable=True,
    )
    forward = BatchedClassifier(detector.classifier, config.batch_size)
    for batch, outputs in iter_outputs(batches, forward, meter, None):
        _skip(batch.skipped, results)
        for scored in _decode_outputs(detector, batch, outputs, config):
            rows = scored.rows[~scored.is_finite].tolist()
            reason = "the classifier returns NaN or infinity"
            _skip([Unreadable(row, images.names[row], reason) for row in rows], results)
            yield scored
    meter.close()


def _make_lines(
    detector: HeatmapDetector,
    paths: Sequence[Path],
    names: Sequence[str],
    writer: PictureWriter | None,
    results: PredictResults,
    scored: Scored,
) -> list[TableLine]:
    """Write the pictures of a batch, and return its lines of the table."""
    lines = []
    for i in np.flatnonzero(scored.is_finite).tolist():
        row = int(scored.rows[i])
        line = _make_line(detector, scored.result, i, paths[row])
        if writer is not None:
            try:
                picture, heatmap = writer.write(scored, i)
                line = replace(line, picture=picture, heatmap=heatmap)
            except (OodHeatmapError, OSError) as error:
                results.not_drawn.append(Unreadable(row, names[row], str(error)))
        lines.append(line)
    return lines


def _skip(images: Iterable[Unreadable], results: PredictResults) -> None:
    """Record and log images that get no line."""
    for image in images:
        log.warning("skipped %s: %s", image.name, image.reason)
        results.skipped.append(image)


def _decode_outputs(
    detector: HeatmapDetector,
    batch: Batch,
    outputs: Sequence[Output],
    config: PredictConfig,
) -> Iterator[Scored]:
    """Decode the heatmaps of a batch, in the chunks processed by the classifier."""
    device = detector.classifier.device
    start = 0
    for output in outputs:
        stop = start + len(output.features)
        heatmaps = config.pictures != "none"
        result = detector.decode(output.to(device), heatmaps=heatmaps)
        is_finite = np.isfinite(result.score)
        for values in (output.features, output.logits):
            is_finite &= values.isfinite().all(dim=1).cpu().numpy()
        neighbours: Sequence[Sequence[Neighbour]] = [()] * len(is_finite)
        if config.nearest and detector.id_images is not None:
            features = output.features.cpu().numpy()
            nearest = detector.id_images.search(features, result.prediction, config.nearest)
            neighbours = [nearest.neighbours(row) for row in range(len(is_finite))]
        digests = [batch.digests[32 * row : 32 * row + 32] for row in range(start, stop)]
        yield Scored(batch.rows[start:stop], digests, result, is_finite, neighbours)
        start = stop


def _make_line(detector: HeatmapDetector, result: Result, i: int, path: Path) -> TableLine:
    """Make the table line of an image, without pictures."""
    p_value = float(result.p_value[i])
    return TableLine(
        image=str(path),
        score=round(float(result.score[i]), 6),
        p_value=None if math.isnan(p_value) else round(p_value, 6),
        is_ood=None if result.is_ood is None else bool(result.is_ood[i]),
        prediction=detector.class_name(int(result.prediction[i])),
        confidence=round(float(result.confidence[i]), 6),
    )
