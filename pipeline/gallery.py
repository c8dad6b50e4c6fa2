"""Write the figures of an evaluation and the content of its report, with their example images."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ood_heatmap import figures
from ood_heatmap.cache.files import to_json
from ood_heatmap.cache.neighbours import Bank
from ood_heatmap.calibration import Calibration
from ood_heatmap.detector import HeatmapDetector
from ood_heatmap.figures import Card
from ood_heatmap.images import Decoded, Transform, to_rgb
from ood_heatmap.pictures import Box, ColorScale, draw_overlay
from ood_heatmap.pipeline.config import EvaluateConfig
from ood_heatmap.pipeline.forward import BatchedClassifier
from ood_heatmap.pipeline.page import CONTENT, collect_warnings
from ood_heatmap.pipeline.run import Index
from ood_heatmap.pipeline.scoring import ID, ScoredSet, Subset
from ood_heatmap.pipeline.stage import Stage
from ood_heatmap.report import GalleryImage, report_content
from ood_heatmap.report_tables import method_label
from ood_heatmap.verdict import default_method

_HISTOGRAMS, _ROC, _EXAMPLES = (f"figures/{name}.png" for name in ("histograms", "roc", "examples"))
FIGURES = (_HISTOGRAMS, _ROC, _EXAMPLES)
# maximum over all sets: keeps the report under 10 MB
_MAX_CARDS = 320
# longer side of photos in pixels
_PHOTO_SIDE = 256


def write_figures(
    stage: Stage,
    metrics: Mapping[str, Any],
    subsets: Mapping[str, Subset],
    scored: Mapping[str, ScoredSet],
    detector: HeatmapDetector,
    index: Index,
    calibration: Calibration | None,
    config: EvaluateConfig,
) -> None:
    """Write the figures, and the content of the report.

    Args:
        stage: The evaluation stage.
        metrics: Content of ``metrics.json``.
        subsets: Images of each set.
        scored: Scores of each set, including ``id``.
        detector: The detector of the run.
        index: The index of the run.
        calibration: Calibration for p-values.
        config: Settings of the stage.
    """
    # on the CPU: a few images, and only the classes that are predicted for them
    bank = index.bank(torch.device("cpu"))
    num_cards = min(config.gallery, max(1, _MAX_CARDS // len(scored)))
    decided = metrics.get("decisions", {})
    pixel_threshold = decided.get("pixel_threshold")
    scale = ColorScale(
        detector.color_max, math.nan if pixel_threshold is None else float(pixel_threshold)
    )
    forward = BatchedClassifier(detector.classifier, config.batch_size)
    maker = _Maker(detector, forward, index, bank, calibration, scale, default_method(metrics))
    images = {name: maker.make(name, subsets[name], scored[name], num_cards) for name in scored}
    examples = [
        images[name][step].card
        for name in images
        for step in _steps(len(images[name]), config.examples)
    ]
    default = {name: scored[name].scores[maker.method] for name in scored}
    ood = [name for name in scored if name != ID]
    by_method = {
        name: {method_label(key, metrics): values for key, values in item.by_method.items()}
        for name, item in scored.items()
    }
    id_curves, curves = by_method[ID], {name: by_method[name] for name in ood}
    label, threshold = method_label(maker.method, metrics), decided.get("threshold")
    id_scores, ood_scores = default[ID], {name: default[name] for name in ood}
    for name, figure in (
        (_HISTOGRAMS, figures.score_histograms(id_scores, ood_scores, label, threshold)),
        (_ROC, figures.roc_curves(id_curves, curves, label)),
        (_EXAMPLES, figures.example_grid(examples, detector.color_max, len(scored))),
    ):
        _write(stage, name, figures.to_png(figure))
    content = report_content(
        scores=default,
        roc={
            name: {
                method: figures.roc_points(by_method[ID][method], values)
                for method, values in by_method[name].items()
            }
            for name in ood
        },
        # what a reader looks for comes first: OOD images, the highest scores of each set
        images=[image for name in [*ood, ID] for image in reversed(images[name])],
        scale=scale,
        threshold=threshold,
        classes=detector.classes,
        warnings=collect_warnings(stage.run, metrics["warnings"]),
    )
    _write(stage, CONTENT, to_json(content))


def _write(stage: Stage, name: str, content: bytes) -> None:
    """Write one file of the stage."""
    with stage.writing(name) as scratch:
        scratch.write_bytes(content)


def _steps(num_items: int, count: int) -> NDArray[np.int64]:
    """Return at most ``count`` evenly spaced positions from the first to the last."""
    steps = np.linspace(0, num_items - 1, min(count, num_items))
    positions: NDArray[np.int64] = steps.round().astype(np.int64)
    return positions


@dataclass(frozen=True)
class _Maker:
    """Makes gallery images.

    Args:
        detector: The detector of the run.
        forward: Its classifier in batches: 40 images of 224 px take 0.5 GB in one.
        index: The index of the run.
        bank: The ID training features.
        calibration: Calibration for p-values.
        scale: Colour scale of the overlays.
        method: Name of the default score.
    """

    detector: HeatmapDetector
    forward: BatchedClassifier
    index: Index
    bank: Bank
    calibration: Calibration | None
    scale: ColorScale
    method: str

    def make(self, name: str, subset: Subset, scored: ScoredSet, count: int) -> list[GalleryImage]:
        """Make images evenly spaced from the lowest to the highest score of a set."""
        scores = scored.scores[self.method]
        order = np.argsort(scores, kind="stable")
        chosen = order[_steps(len(order), count)]
        rows, score = scored.row[chosen], scores[chosen]
        transform = self.detector.classifier.config.transform
        # one by one: decoded photos are large
        shrunk = [_shrink(subset.images.read(int(row))[0], transform) for row in rows]
        pixels = np.stack([seen for seen, _, _ in shrunk])
        output = self.forward(pixels)
        result = self.detector.decode(output.to(self.detector.device))
        found = self.bank.nearest(output.features.numpy(), result.prediction)
        nearest = self.index.columns["images"].take(self.index.positions(found.row))
        p_values = self.calibration.p_value(score) if self.calibration is not None else None
        cards = [
            Card(
                set_name=name,
                name=subset.images.names[row],
                image=pixels[i],
                pixel_score=figures.resize_scores(result.pixel_score[i], pixels.shape[-1]),
                nearest=nearest[i],
                score=float(score[i]),
                distance=float(found.distance[i]),
                prediction=self.detector.class_name(int(result.prediction[i])),
                p_value=None if p_values is None else float(p_values[i]),
            )
            for i, row in enumerate(rows)
        ]
        return [
            GalleryImage(
                card,
                photo,
                draw_overlay(photo, card.pixel_score, box, self.scale),
                self.detector.class_name(int(label)) if label >= 0 else "",
            )
            for card, (_, photo, box), label in zip(
                cards, shrunk, scored.label[chosen], strict=True
            )
        ]


def _shrink(image: Decoded, transform: Transform) -> tuple[NDArray[np.uint8], Image.Image, Box]:
    """Return what the classifier sees of an image, the photo on the page, and the part seen."""
    photo = to_rgb(image).copy()
    photo.thumbnail((_PHOTO_SIDE, _PHOTO_SIDE), Image.Resampling.LANCZOS)
    return transform(image), photo, transform.seen_box(*photo.size)
