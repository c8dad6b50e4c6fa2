"""Stage 4 of 4.

How well the heatmap detects, beside post-hoc baselines, in numbers and pictures.
"""

import io
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ood_heatmap import baselines, figures
from ood_heatmap.cache.files import locked, replacing, write_json
from ood_heatmap.cache.manifest import Manifest, Stage, fingerprint_of
from ood_heatmap.cache.neighbours import Bank, mean_distance_to_kth
from ood_heatmap.classifier import Output
from ood_heatmap.detector import HeatmapDetector, detector_of
from ood_heatmap.errors import UsageError
from ood_heatmap.figures import Example
from ood_heatmap.images import ImageSet
from ood_heatmap.metrics import METRICS, detection_metrics
from ood_heatmap.pipeline.config import EvaluateConfig
from ood_heatmap.pipeline.embed import Embedded, Meter, embed
from ood_heatmap.pipeline.index import Index, open_index
from ood_heatmap.pipeline.log import log_event
from ood_heatmap.pipeline.train import open_decoder

log = logging.getLogger(__name__)

ID = "id"

PIECE = 4096  # images whose heatmaps are in memory at once
Scores = dict[str, NDArray[Any]]


def evaluate(
    run: Path,
    id_images: ImageSet,
    ood_sets: Mapping[str, ImageSet],
    device: torch.device,
    config: EvaluateConfig,
) -> Manifest:
    """Score the ID test set and each OOD set, and write numbers and pictures.

    Args:
        run: A run directory with a trained decoder.
        id_images: The ID test set.
        ood_sets: OOD test sets by name.
        device: Where to compute.
        config: Settings of the stage.

    Returns:
        The manifest; ``metrics.json`` beside it holds the table.

    Raises:
        OodHeatmapError: See the design: stale or damaged caches, unreadable images and so on.
    """
    check_names(ood_sets, config)
    with locked(run):
        index = open_index(run)
        trained = open_decoder(run, index.manifest, device)
        sets = {ID: id_images, **ood_sets}
        inputs = {
            "decoder": trained.manifest.fingerprint,
            "images": {name: images.describe() for name, images in sets.items()},
            "options": {
                "near": list(config.near),
                "neighbours": config.neighbours,
                "examples": config.examples,
                "skip_unreadable": config.skip_unreadable,
            },
        }
        stage = Stage(run, "evaluation", inputs)
        finished = stage.begin(overwrite=config.overwrite)
        if finished is not None:
            log.info("%s is finished already", stage.directory)
            return finished
        detector = detector_of(run, index, device)
        id_bank = baselines.unit_length(index.columns["features"].read())
        scores = {
            name: score_set(stage, name, images, detector, id_bank, config)
            for name, images in sets.items()
        }
        table = metrics_table(scores, config)
        write_json(stage.directory / "metrics.json", report(table, scores, sets, index, config))
        pictures = draw(stage, scores, sets, detector, index, config)
        names = ["metrics.json", *(f"scores-{name}.npz" for name in sets), *pictures]
        content = fingerprint_of({name: str(values["content"]) for name, values in scores.items()})
        return stage.finish(content, {"sets": list(sets), "near": list(config.near)}, names)


def check_names(ood_sets: Mapping[str, ImageSet], config: EvaluateConfig) -> None:
    """Refuse set names that would collide or that nobody gave."""
    if not ood_sets:
        raise UsageError("there is no OOD set to evaluate on: add --ood NAME=SOURCE.")
    unknown = [name for name in config.near if name not in ood_sets]
    if unknown:
        raise UsageError(f"--near {unknown[0]} is none of the OOD sets ({', '.join(ood_sets)}).")
    bad = [
        name
        for name in ood_sets
        if name == ID or not name.replace("-", "").replace("_", "").isalnum()
    ]
    if bad:
        raise UsageError(
            f"an OOD set cannot be called {bad[0]!r}: use letters, digits, - and _, and not {ID!r}."
        )


def score_set(
    stage: Stage,
    name: str,
    images: ImageSet,
    detector: HeatmapDetector,
    id_bank: NDArray[np.float32],
    config: EvaluateConfig,
) -> Scores:
    """Return all scores of a set and write them.

    A set that a stopped run has finished is read back.
    """
    path = stage.directory / f"scores-{name}.npz"
    if path.is_file():
        with np.load(path, allow_pickle=False) as saved:
            if str(saved["fingerprint"]) == stage.settings_fingerprint:
                return dict(saved)
    meter = Meter(len(images), f"evaluate {name}")
    pieces = [
        np.arange(start, min(start + PIECE, len(images))) for start in range(0, len(images), PIECE)
    ]
    parts = [
        scores_of(piece, detector, id_bank, config)
        for piece in embed(
            images,
            pieces,
            detector.classifier,
            meter,
            batch_size=config.batch_size,
            workers=config.workers,
            skip_unreadable=config.skip_unreadable,
        )
    ]
    log_event(
        stage.run, "evaluate", set=name, **meter.close(), device=str(detector.classifier.device)
    )
    scores: Scores = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    scores["label"] = images.labels[scores["row"]]
    scores["content"] = np.array(fingerprint_of([str(item) for item in scores.pop("contents")]))
    scores["fingerprint"] = np.array(stage.settings_fingerprint)
    buffer = io.BytesIO()
    np.savez(buffer, **scores)  # type: ignore[arg-type]
    with replacing(path) as scratch:
        scratch.write_bytes(buffer.getbuffer())
    return scores


def scores_of(
    piece: Embedded, detector: HeatmapDetector, id_bank: NDArray[np.float32], config: EvaluateConfig
) -> Scores:
    """Return every method's score of some images, from one pass of the classifier."""
    heatmap = np.concatenate(
        [
            detector.decode(part).score
            for part in batches_of(piece, config.batch_size, detector.classifier.device)
        ]
    )
    features = baselines.unit_length(piece.features)
    return {
        "heatmap": heatmap,
        "msp": baselines.maximum_softmax(piece.logits),
        "max_logit": baselines.maximum_logit(piece.logits),
        "energy": baselines.energy(piece.logits),
        "knn": mean_distance_to_kth(features, id_bank, config.neighbours),
        "prediction": piece.prediction,
        "row": piece.rows,
        "contents": np.array([piece.content]),
    }


METHODS = ("heatmap", "msp", "max_logit", "energy", "knn")


def batches_of(piece: Embedded, batch_size: int, device: torch.device) -> list[Output]:
    """Return what the classifier said, batch by batch, on the device."""
    return [
        Output(
            torch.from_numpy(piece.features[start : start + batch_size]).to(device),
            torch.from_numpy(piece.logits[start : start + batch_size]).to(device),
            tuple(
                torch.from_numpy(item[start : start + batch_size]).to(device) for item in piece.maps
            ),
        )
        for start in range(0, len(piece.rows), batch_size)
    ]


@dataclass(frozen=True)
class Row:
    """One line of the table: a method on a set, or a mean over sets; shares in [0, 1]."""

    method: str
    set: str
    figures: Mapping[str, float]


def metrics_table(scores: Mapping[str, Scores], config: EvaluateConfig) -> list[Row]:
    """Return the metrics of every method on every OOD set, and their means over near, far and all
    sets."""
    ood = [name for name in scores if name != ID]
    far = [name for name in ood if name not in config.near]
    groups = {"near": list(config.near), "far": far, "all": ood}
    rows = []
    for method in METHODS:
        single = {
            name: asdict(detection_metrics(scores[ID][method], scores[name][method]))
            for name in ood
        }
        rows += [Row(method, name, values) for name, values in single.items()]
        rows += [
            Row(
                method,
                f"mean {group}",
                {key: float(np.mean([single[name][key] for name in names])) for key in METRICS},
            )
            for group, names in groups.items()
            if names and (group == "all" or config.near)
        ]
    return rows


def report(
    table: list[Row],
    scores: Mapping[str, Scores],
    sets: Mapping[str, ImageSet],
    index: Index,
    config: EvaluateConfig,
) -> dict[str, Any]:
    """Return the content of ``metrics.json``."""
    label, prediction = scores[ID]["label"], scores[ID]["prediction"]
    known = bool((label >= 0).all()) and len(index.manifest.results["classes"]) > 0
    return {
        "about": "scores: larger is more OOD. fpr95_id_pos takes ID as the positive class (paper), "
        "fpr95_ood_pos takes OOD (OpenOOD). aupr_in and aupr_out are average precision. Shares in "
        "[0, 1].",
        "id_accuracy": float((label == prediction).mean()) if known else None,
        "near": list(config.near),
        "sets": {
            name: {
                "source": images.source,
                "num_images": len(scores[name]["row"]),
                "content": str(scores[name]["content"]),
            }
            for name, images in sets.items()
        },
        "table": [{"method": row.method, "set": row.set, **row.figures} for row in table],
    }


def draw(
    stage: Stage,
    scores: Mapping[str, Scores],
    sets: Mapping[str, ImageSet],
    detector: HeatmapDetector,
    index: Index,
    config: EvaluateConfig,
) -> list[str]:
    """Write the figures and return their names."""
    (stage.directory / "figures").mkdir(exist_ok=True)
    ood = [name for name in scores if name != ID]
    by_method = {name: {method: scores[name][method] for method in METHODS} for name in ood}
    bank = index.bank(detector.classifier.device)
    examples = [
        example
        for name, images in sets.items()
        for example in examples_of(
            name, images, scores[name], detector, index, bank, config.examples
        )
    ]
    pictures = {
        "figures/histograms.png": figures.histograms(
            scores[ID]["heatmap"], {name: scores[name]["heatmap"] for name in ood}
        ),
        "figures/roc.png": figures.roc_curves(scores[ID], by_method),
        "figures/examples.png": figures.sheet(examples, detector.color_max, len(sets)),
    }
    for name, figure in pictures.items():
        figures.save(figure, stage.directory / name)
    return list(pictures)


def examples_of(
    name: str,
    images: ImageSet,
    scores: Scores,
    detector: HeatmapDetector,
    index: Index,
    bank: Bank,
    count: int,
) -> list[Example]:
    """Return images at even steps from the lowest to the highest score of a set.

    No pick of the best.
    """
    order = np.argsort(scores["heatmap"], kind="stable")
    steps = np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(np.int64)
    rows = scores["row"][order[steps]]
    transform = detector.classifier.config.transform
    pixels = np.stack([transform(images.read(int(row))[0]) for row in rows])
    result, output = detector.detect(pixels)
    found = bank.nearest(output.features.cpu().numpy(), result.prediction)
    nearest = index.columns["images"].take(index.positions(found.row))
    classes = detector.classes or [str(label) for label in range(detector.classifier.num_classes)]
    return [
        Example(
            name,
            pixels[i],
            result.strength[i],
            nearest[i],
            float(result.score[i]),
            float(found.distance[i]),
            classes[int(result.prediction[i])],
        )
        for i in range(len(rows))
    ]


def format_table(content: Mapping[str, Any]) -> str:
    """Return ``metrics.json`` as the table that the terminal shows, in percent."""
    heads = (
        "method",
        "set",
        "AUROC",
        "AUPR-IN",
        "AUPR-OUT",
        "FPR95 ID+",
        "FPR95 OOD+",
        "OOD share",
    )
    lines = [heads]
    for row in content["table"]:
        numbers = [f"{100 * row[key]:.2f}" for key in METRICS]
        share = f"{100 * row['prevalence_ood']:.1f}" if "prevalence_ood" in row else ""
        lines.append((row["method"], row["set"], *numbers, share))
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    return "\n".join(
        "  ".join(
            text.ljust(width) if column < 2 else text.rjust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
