"""Write the figures and the report of an evaluation, with their example images."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ood_heatmap import figures
from ood_heatmap.cache.neighbours import Bank
from ood_heatmap.calibration import Calibration
from ood_heatmap.detector import HeatmapDetector
from ood_heatmap.figures import Card
from ood_heatmap.pipeline.config import EvaluateConfig
from ood_heatmap.pipeline.results import Results
from ood_heatmap.pipeline.run import Index, read_manifest
from ood_heatmap.pipeline.scoring import HEATMAP, ID, ScoredSet, Subset
from ood_heatmap.pipeline.stage import Stage
from ood_heatmap.pipeline.tables import format_label
from ood_heatmap.report import render_report

_HISTOGRAMS, _ROC, _EXAMPLES = (f"figures/{name}.png" for name in ("histograms", "roc", "examples"))
FIGURES, REPORT = (_HISTOGRAMS, _ROC, _EXAMPLES), "report.html"
# maximum over all sets: keeps the report under 10 MB
_MAX_CARDS = 320


def write_report(
    stage: Stage,
    metrics: Mapping[str, Any],
    subsets: Mapping[str, Subset],
    scored: Mapping[str, ScoredSet],
    detector: HeatmapDetector,
    index: Index,
    calibration: Calibration | None,
    config: EvaluateConfig,
) -> None:
    """Write the figures and the report.

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
    cards = {
        name: _make_cards(
            name, subsets[name], scored[name], num_cards, detector, index, bank, calibration
        )
        for name in scored
    }
    examples = [
        cards[name][step] for name in cards for step in _steps(len(cards[name]), config.examples)
    ]
    heatmap = {name: scored[name].scores[HEATMAP] for name in scored}
    ood = [name for name in scored if name != ID]
    by_method = {
        name: {format_label(key, metrics): values for key, values in item.by_method.items()}
        for name, item in scored.items()
    }
    labelled = [{**row, "method": format_label(row["method"], metrics)} for row in metrics["table"]]
    for name, figure in (
        (_HISTOGRAMS, figures.score_histograms(heatmap[ID], {key: heatmap[key] for key in ood})),
        (_ROC, figures.roc_curves(by_method[ID], {key: by_method[key] for key in ood})),
        (_EXAMPLES, figures.example_grid(examples, detector.color_max, len(scored))),
    ):
        _write(stage, name, figures.to_png(figure))
    page = render_report(
        title="Out-of-distribution detection with heatmaps",
        metrics={**metrics, "table": labelled},
        scores=heatmap,
        roc={
            name: {
                method: figures.roc_points(by_method[ID][method], values)
                for method, values in by_method[name].items()
            }
            for name in ood
        },
        cards=[card for name in cards for card in cards[name]],
        color_max=detector.color_max,
        threshold=metrics.get("decisions", {}).get("threshold"),
        classes=detector.classes,
        warnings=_collect_warnings(stage, metrics),
    )
    _write(stage, REPORT, page.encode())


def _write(stage: Stage, name: str, content: bytes) -> None:
    """Write one file of the stage."""
    with stage.writing(name) as scratch:
        scratch.write_bytes(content)


def _collect_warnings(stage: Stage, metrics: Mapping[str, Any]) -> list[str]:
    """Return the deduplicated warnings of this stage and the stages before it."""
    manifests = [read_manifest(stage.run, name) for name in ("index", "targets", "decoder")]
    results = [Results.from_manifest(manifest) for manifest in manifests]
    before = [text for result in results for text in result.warnings]
    return list(dict.fromkeys([*before, *metrics["warnings"]]))


def _steps(num_items: int, count: int) -> NDArray[np.int64]:
    """Return at most ``count`` evenly spaced positions from the first to the last."""
    steps = np.linspace(0, num_items - 1, min(count, num_items))
    positions: NDArray[np.int64] = steps.round().astype(np.int64)
    return positions


def _make_cards(
    set_name: str,
    subset: Subset,
    scored: ScoredSet,
    count: int,
    detector: HeatmapDetector,
    index: Index,
    bank: Bank,
    calibration: Calibration | None,
) -> list[Card]:
    """Make cards of images evenly spaced from the lowest to the highest score of a set."""
    order = np.argsort(scored.scores[HEATMAP], kind="stable")
    chosen = order[_steps(len(order), count)]
    rows, score = scored.row[chosen], scored.scores[HEATMAP][chosen]
    transform = detector.classifier.config.transform
    pixels = np.stack([transform(subset.images.read(int(row))[0]) for row in rows])
    result, output = detector.detect(pixels)
    found = bank.nearest(output.features.cpu().numpy(), result.prediction)
    nearest = index.columns["images"].take(index.positions(found.row))
    p_values = calibration.p_value(score) if calibration is not None else None
    return [
        Card(
            set_name=set_name,
            name=subset.images.names[row],
            image=pixels[i],
            pixel_score=figures.resize_scores(result.pixel_score[i], pixels.shape[-1]),
            nearest=nearest[i],
            score=float(score[i]),
            distance=float(found.distance[i]),
            prediction=detector.class_name(int(result.prediction[i])),
            p_value=None if p_values is None else float(p_values[i]),
        )
        for i, row in enumerate(rows)
    ]
