"""How well scores tell ID from OOD: AUROC, AUPR and FPR@95TPR, each with its positive class named.

Scores: larger is more OOD. scikit-learn computes the figures; the bootstrap needs a thousand of
them, so it has the same formulas over tied groups, tested to be equal.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

Float64: TypeAlias = NDArray[np.float64]
Scores: TypeAlias = NDArray[np.floating[Any]]
METRICS = ("auroc", "aupr_in", "aupr_out", "fpr95_id_pos", "fpr95_ood_pos")
PIECE_BYTES = 32 << 20


@dataclass(frozen=True)
class DetectionMetrics:
    """The figures of one OOD set; shares in [0, 1].

    Args:
        auroc: Area under the ROC curve; the same whichever class is positive.
        aupr_in: Average precision, ID positive.
        aupr_out: Average precision, OOD positive.
        prevalence_ood: Share of OOD images, what ``aupr_out`` would be by chance.
        fpr95_id_pos: Share of OOD images accepted when at least 95 % of the ID images are (the
            paper's convention).
        fpr95_ood_pos: Share of ID images flagged when at least 95 % of the OOD images are
            (OpenOOD's convention).
        num_id, num_ood: Images of each.
    """

    auroc: float
    aupr_in: float
    aupr_out: float
    prevalence_ood: float
    fpr95_id_pos: float
    fpr95_ood_pos: float
    num_id: int
    num_ood: int


def detection_metrics(id_scores: Scores, ood_scores: Scores) -> DetectionMetrics:
    """Return all figures of a score.

    Args:
        id_scores: ``(N,)`` finite, larger is more OOD.
        ood_scores: ``(M,)`` finite.

    Raises:
        ValueError: A set is empty, or a score is not finite.
    """
    if not (len(id_scores) and len(ood_scores)):
        raise ValueError(f"both sets need images, got {len(id_scores)} ID, {len(ood_scores)} OOD")
    scores = np.concatenate([id_scores, ood_scores]).astype(np.float64)
    is_ood = np.repeat([0, 1], [len(id_scores), len(ood_scores)])
    return DetectionMetrics(
        auroc=float(roc_auc_score(is_ood, scores)),
        aupr_in=float(average_precision_score(1 - is_ood, -scores)),
        aupr_out=float(average_precision_score(is_ood, scores)),
        prevalence_ood=len(ood_scores) / len(scores),
        fpr95_id_pos=fpr95(1 - is_ood, -scores),
        fpr95_ood_pos=fpr95(is_ood, scores),
        num_id=len(id_scores),
        num_ood=len(ood_scores),
    )


def fpr95(is_positive: NDArray[np.integer[Any]], scores: Float64) -> float:
    """Return the false positive rate at the first threshold with a true positive rate of 95 %.

    No interpolation. ``drop_intermediate`` would leave out thresholds of tied scores and move the
    figure by some points.
    """
    fpr, tpr, _ = roc_curve(is_positive, scores, drop_intermediate=False)
    return float(fpr[np.argmax(tpr >= 0.95)])


def weighted_metrics(
    id_scores: Scores, ood_scores: Scores, id_weights: Float64, ood_weights: Float64
) -> dict[str, Float64]:
    """Return the figures of ``METRICS`` for R weightings of the same scores at once.

    Args:
        id_scores: ``(N,)``.
        ood_scores: ``(M,)``.
        id_weights: ``(R, N)``, how often each image counts; whole numbers.
        ood_weights: ``(R, M)``.

    Returns:
        ``(R,)`` for each metric; equal to ``detection_metrics`` of the repeated scores.
    """
    step = max(1, PIECE_BYTES // (8 * (len(id_scores) + len(ood_scores))))
    pieces = [
        grouped_metrics(
            *grouped(id_scores, id_weights[start : start + step]),
            *grouped(ood_scores, ood_weights[start : start + step]),
        )
        for start in range(0, len(id_weights), step)
    ]
    return {key: np.concatenate([piece[key] for piece in pieces]) for key in METRICS}


def grouped(scores: Scores, weights: Float64) -> tuple[Scores, Float64]:
    """Return the ``(G,)`` different scores, ascending, and the weight ``(G, R)`` of each."""
    order = np.argsort(scores, kind="stable")
    values, starts = np.unique(scores[order], return_index=True)
    summed = weights.T[order]
    if len(starts) < len(order):
        summed = np.add.reduceat(summed, starts, axis=0)
    return values, summed


def grouped_metrics(
    id_values: Scores, num_id: Float64, ood_values: Scores, num_ood: Float64
) -> dict[str, Float64]:
    """Return the figures from how often each score ``(G,)`` is there, ``(G, R)``.

    An image is looked at only among the images of the other set: that is what the figures need.
    """
    nobody = np.zeros((1, num_id.shape[1]))
    id_up = np.concatenate([nobody, num_id.cumsum(axis=0)])
    ood_up = np.concatenate([nobody, num_ood.cumsum(axis=0)])
    all_id, all_ood = id_up[-1], ood_up[-1]
    id_below = id_up[np.searchsorted(id_values, ood_values, side="left")]
    id_up_to = id_up[np.searchsorted(id_values, ood_values, side="right")]
    ood_up_to = ood_up[np.searchsorted(ood_values, id_values, side="right")]
    id_down, ood_down = all_id - id_below, all_ood - ood_up[:-1]  # at least as high as the score
    with np.errstate(invalid="ignore"):  # a score that nobody drew: 0 of 0, and weighted with 0
        precision_in = np.nan_to_num(id_up[1:] / (id_up[1:] + ood_up_to))
        precision_out = np.nan_to_num(ood_down / (ood_down + id_down))
    column = np.arange(len(all_id))
    accepts = np.argmax(id_up[1:] / all_id >= 0.95, axis=0)
    flags = len(ood_values) - 1 - np.argmax((ood_down / all_ood >= 0.95)[::-1], axis=0)
    return {
        "auroc": (num_ood * (id_below + id_up_to)).sum(axis=0) / (2 * all_id * all_ood),
        "aupr_in": (num_id * precision_in).sum(axis=0) / all_id,
        "aupr_out": (num_ood * precision_out).sum(axis=0) / all_ood,
        "fpr95_id_pos": ood_up_to[accepts, column] / all_ood,
        "fpr95_ood_pos": id_down[flags, column] / all_id,
    }


def bootstrap_weights(count: int, num_resamples: int, generator: np.random.Generator) -> Float64:
    """Return ``(R, count)``: how often each of ``count`` images is drawn, with replacement."""
    drawn = generator.multinomial(count, np.full(count, 1 / count), num_resamples)
    return drawn.astype(np.float64, order="F")  # read image by image: several times faster


def interval(resampled: Float64, level: float = 0.95) -> tuple[float, float]:
    """Return the percentile interval of resampled figures.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
    """
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def intervals(names: Sequence[str], resampled: Float64) -> dict[str, tuple[float, float]]:
    """Return the interval of each column of ``(R, len(names))`` resampled figures."""
    return {name: interval(column) for name, column in zip(names, resampled.T, strict=True)}
