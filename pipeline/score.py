"""Every method's score of an image set, from one pass of the classifier."""

import copy
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ood_heatmap import baselines
from ood_heatmap.baselines import FeatureScore
from ood_heatmap.cache.files import replacing
from ood_heatmap.cache.manifest import Stage, fingerprint_of
from ood_heatmap.cache.neighbours import mean_distance_to_kth
from ood_heatmap.classifier import Classifier, Output
from ood_heatmap.detector import HeatmapDetector
from ood_heatmap.distributed import gather, is_main, rank, world_size
from ood_heatmap.images import ImageSet
from ood_heatmap.pipeline.config import EvaluateConfig
from ood_heatmap.pipeline.embed import Embedded, Meter, embed
from ood_heatmap.pipeline.log import log_event
from ood_heatmap.pipeline.run import Index, make_detector, open_decoder, open_targets
from ood_heatmap.pipeline.shares import whole_batches
from ood_heatmap.pipeline.table import Scores, name_of_run

PIECE = 1024  # images whose heatmaps are in memory at once, about; and what processes are dealt
MAX_FIT = 50_000  # images of each kind that a baseline is fitted on, at most


@dataclass(frozen=True)
class Part:
    """The images of a set that are looked at: ``rows`` of it, ascending."""

    images: ImageSet
    rows: NDArray[np.int64]


@dataclass(frozen=True)
class Scorers:
    """All that gives a score.

    Args:
        detectors: Of the run, then of the runs with other seeds; one classifier for all.
        id_features: ``(N, D)`` of all ID training images, of unit length.
        by_features: Scores of features, by method.
    """

    detectors: Sequence[HeatmapDetector]
    id_features: NDArray[np.float32]
    by_features: Mapping[str, FeatureScore]

    def __call__(self, piece: Embedded, config: EvaluateConfig) -> Scores:
        """Return every method's score of some images, ``(B,)`` each.

        ``peak`` is the strongest pixel of the heatmap.
        """
        scores: Scores = {}
        batches = batches_of(piece, config.batch_size, self.detectors[0].classifier.device)
        for number, detector in enumerate(self.detectors):
            results = [detector.decode(batch) for batch in batches]
            scores[name_of_run(number)] = np.concatenate([result.score for result in results])
            if number == 0:
                peaks = [result.strength.max(axis=(1, 2)) for result in results]
                scores["peak"] = np.concatenate(peaks)
        lengths = baselines.unit_length(piece.features)
        return {
            **scores,
            "msp": baselines.maximum_softmax(piece.logits),
            "max_logit": baselines.maximum_logit(piece.logits),
            "energy": baselines.energy(piece.logits),
            "knn": mean_distance_to_kth(lengths, self.id_features, config.neighbours),
            **{name: score(piece.features) for name, score in self.by_features.items()},
            "prediction": piece.prediction,
            "row": piece.rows,
            "contents": np.array([piece.content]),
        }


def open_detectors(
    runs: Sequence[Path], index: Index, device: torch.device
) -> list[HeatmapDetector]:
    """Return the detector of each run; one classifier for all."""
    own, *others = (open_decoder(run, index.manifest, device) for run in runs)
    first = make_detector(index, own, device)
    return [first, *(HeatmapDetector(first.classifier, other.decoder) for other in others)]


def make_scorers(
    index: Index, detectors: Sequence[HeatmapDetector], config: EvaluateConfig
) -> Scorers:
    """Fit the baselines."""
    return Scorers(
        detectors,
        baselines.unit_length(index.columns["features"].read()),
        fit_baselines(index, detectors[0].classifier, config.seed),
    )


def fit_baselines(index: Index, classifier: Classifier, seed: int) -> dict[str, FeatureScore]:
    """Return the baselines that look at features, by name, fitted on what the caches hold."""
    columns, manifest = index.columns, index.manifest
    rows = sample(np.arange(len(columns["row"])), seed)
    features, prediction, label = (
        columns[name].take(rows) for name in ("features", "prediction", "label")
    )
    known = bool(manifest.results["classes"]) and bool((label >= 0).all())
    auxiliary = open_targets(index.run, index).columns
    paired = np.flatnonzero(auxiliary["patched"].read() == 0)  # the others are ID images in part
    ood_features = auxiliary["features"].take(sample(paired, seed))
    head = copy.deepcopy(classifier.network.get_submodule(classifier.head)).cpu()
    assert isinstance(head, nn.Linear), "what find_head looks for"
    return {
        "mahalanobis": baselines.mahalanobis(features, label if known else prediction),
        "vim": baselines.vim(features, head),
        "react": baselines.react(features, head),
        "ash": baselines.ash(head),
        "logistic_regression": baselines.logistic_regression(features, ood_features),
        "mlp": baselines.small_mlp(features, ood_features, seed),
    }


def sample(rows: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """Return the rows to fit on, ascending: all if they are few, or a seeded draw."""
    if len(rows) <= MAX_FIT:
        return rows
    return np.sort(np.random.default_rng(seed).choice(rows, MAX_FIT, replace=False))


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


def scores_path(stage: Stage, name: str) -> Path:
    """Return where the scores of a set are."""
    return stage.directory / f"scores-{name}.npz"


def finished_scores(stage: Stage, name: str) -> Scores | None:
    """Return the scores of a set that a stopped run has finished."""
    path = scores_path(stage, name)
    if path.is_file():
        with np.load(path, allow_pickle=False) as saved:
            if str(saved["fingerprint"]) == stage.settings_fingerprint:
                return dict(saved)
    return None


def score_set(
    stage: Stage, name: str, part: Part, scorers: Scorers, config: EvaluateConfig
) -> Scores:
    """Return all scores of a set and write them; every process scores a share of the images."""
    pieces = dict(enumerate(whole_batches(part.rows, PIECE, config.batch_size)))
    mine = list(pieces)[rank() :: world_size()]
    meter = Meter(sum(len(pieces[number]) for number in mine), f"evaluate {name}")
    classifier = scorers.detectors[0].classifier
    embedded = embed(
        part.images,
        [pieces[number] for number in mine],
        classifier,
        meter,
        batch_size=config.batch_size,
        workers=config.workers,
        skip_unreadable=config.skip_unreadable,
    )
    own = {number: scorers(piece, config) for number, piece in zip(mine, embedded, strict=True)}
    figures = meter.close()
    done = {number: piece for share in gather(own) for number, piece in share.items()}
    parts = [done[number] for number in pieces]  # as one process has them
    scores: Scores = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    scores["label"] = part.images.labels[scores["row"]]
    scores["content"] = np.array(fingerprint_of([str(item) for item in scores.pop("contents")]))
    scores["fingerprint"] = np.array(stage.settings_fingerprint)
    if is_main():
        log_event(stage.run, "evaluate", set=name, **figures, device=str(classifier.device))
        buffer = io.BytesIO()
        np.savez(buffer, **scores)  # type: ignore[arg-type]
        with replacing(scores_path(stage, name)) as scratch:
            scratch.write_bytes(buffer.getbuffer())
    return scores
