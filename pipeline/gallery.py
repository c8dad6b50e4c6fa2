"""The pictures of an evaluation: figures, and the report with its gallery."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ood_heatmap import figures
from ood_heatmap.cache.manifest import Stage
from ood_heatmap.cache.neighbours import Bank
from ood_heatmap.calibration import Calibration
from ood_heatmap.detector import HeatmapDetector
from ood_heatmap.figures import Card
from ood_heatmap.pipeline.config import EvaluateConfig
from ood_heatmap.pipeline.run import Index
from ood_heatmap.pipeline.scoring import HEATMAP, ID, ScoredSet, Subset
from ood_heatmap.report import write_report

HISTOGRAMS, ROC, EXAMPLES = (f"figures/{name}.png" for name in ("histograms", "roc", "examples"))
PICTURES, REPORT = (HISTOGRAMS, ROC, EXAMPLES), "report.html"
MAX_CARDS = 320  # of all sets together: the report stays under 10 MB


def draw(
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
        stage: Where to.
        metrics: Content of ``metrics.json``.
        subsets: The images of each set.
        scored: The scores of each set, ``id`` among them.
        detector: Of the run.
        index: Of the run.
        calibration: For p-values.
        config: Settings of the stage.
    """
    (stage.directory / "figures").mkdir(exist_ok=True)
    bank = index.bank(detector.classifier.device)
    each = min(config.gallery, max(1, MAX_CARDS // len(scored)))
    cards = {
        name: cards_of(name, subsets[name], item, detector, index, bank, calibration, each)
        for name, item in scored.items()
    }
    sheet = [
        of_set[step] for of_set in cards.values() for step in steps(len(of_set), config.examples)
    ]
    heatmap = {name: item.scores[HEATMAP] for name, item in scored.items()}
    ood = [name for name in scored if name != ID]
    id_scores = scored[ID].by_method
    by_method = {name: scored[name].by_method for name in ood}
    drawn = {
        HISTOGRAMS: figures.histograms(heatmap[ID], {name: heatmap[name] for name in ood}),
        ROC: figures.roc_curves(id_scores, by_method),
        EXAMPLES: figures.sheet(sheet, detector.color_max, len(scored)),
    }
    for name, figure in drawn.items():
        figures.save(figure, stage.directory / name)
    write_report(
        stage.directory / REPORT,
        title="Out-of-distribution detection with heatmaps",
        metrics=metrics,
        scores=heatmap,
        roc={
            name: {
                method: figures.roc_points(id_scores[method], values)
                for method, values in of_set.items()
            }
            for name, of_set in by_method.items()
        },
        cards=[card for of_set in cards.values() for card in of_set],
        color_max=detector.color_max,
        threshold=metrics.get("decisions", {}).get("threshold"),
        classes=detector.classes,
    )


def steps(num_items: int, count: int) -> NDArray[np.int64]:
    """Return ``count`` or fewer positions at even steps from the first to the last."""
    even: NDArray[np.int64] = (
        np.linspace(0, num_items - 1, min(count, num_items)).round().astype(np.int64)
    )
    return even


def cards_of(
    name: str,
    subset: Subset,
    scored: ScoredSet,
    detector: HeatmapDetector,
    index: Index,
    bank: Bank,
    calibration: Calibration | None,
    count: int,
) -> list[Card]:
    """Return images at even steps from the lowest to the highest score of a set.

    No pick of the best.
    """
    order = np.argsort(scored.scores[HEATMAP], kind="stable")
    chosen = order[steps(len(order), count)]
    rows, score = scored.row[chosen], scored.scores[HEATMAP][chosen]
    transform = detector.classifier.config.transform
    pixels = np.stack([transform(subset.images.read(int(row))[0]) for row in rows])
    result, output = detector.detect(pixels)
    found = bank.nearest(output.features.cpu().numpy(), result.prediction)
    nearest = index.columns["images"].take(index.positions(found.row))
    classes = detector.classes or [str(label) for label in range(detector.classifier.num_classes)]
    p_values = calibration.p_value(score) if calibration is not None else None
    return [
        Card(
            set_name=name,
            name=subset.images.names[row],
            image=pixels[i],
            strength=result.strength[i],
            nearest=nearest[i],
            score=float(score[i]),
            distance=float(found.distance[i]),
            prediction=classes[int(result.prediction[i])],
            p_value=None if p_values is None else float(p_values[i]),
        )
        for i, row in enumerate(rows)
    ]
