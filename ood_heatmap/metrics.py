"""Detection metrics: AUROC, AUPR and FPR@95TPR, each with its positive class named.

Scores: larger is more OOD. scikit-learn computes the metrics; the bootstrap needs thousands of
them, so it uses vectorized formulas over groups of ties, which tests compare to scikit-learn.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

_Float64: TypeAlias = NDArray[np.float64]
_Scores: TypeAlias = NDArray[np.floating[Any]]
METRICS = ("auroc", "aupr_in", "aupr_out", "fpr95_id_pos", "fpr95_ood_pos")
_CHUNK_BYTES = 32 << 20


@dataclass(frozen=True)
class DetectionMetrics:
    """Detection metrics of one OOD set, in [0, 1].

    Args:
        auroc: Area under the ROC curve; the same whichever class is positive.
        aupr_in: Average precision, ID positive.
        aupr_out: Average precision, OOD positive.
        prevalence_ood: Share of OOD images: ``aupr_out`` by chance.
        fpr95_id_pos: Share of OOD images accepted when at least 95 % of the ID images are (the
            paper's convention).
        fpr95_ood_pos: Share of ID images flagged when at least 95 % of the OOD images are
            (OpenOOD's convention).
        num_id: Number of ID images.
        num_ood: Number of OOD images.
    """

    auroc: float
    aupr_in: float
    aupr_out: float
    prevalence_ood: float
    fpr95_id_pos: float
    fpr95_ood_pos: float
    num_id: int
    num_ood: int


def detection_metrics(id_scores: _Scores, ood_scores: _Scores) -> DetectionMetrics:
    """Compute all metrics of a score.

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
        fpr95_id_pos=_fpr95(1 - is_ood, -scores),
        fpr95_ood_pos=_fpr95(is_ood, scores),
        num_id=len(id_scores),
        num_ood=len(ood_scores),
    )


def _fpr95(is_positive: NDArray[np.integer[Any]], scores: _Float64) -> float:
    """Return the false positive rate at the first threshold with a true positive rate of 95 %.

    No interpolation. ``drop_intermediate`` would drop thresholds of tied scores and shift the
    result by some percentage points.
    """
    fpr, tpr, _ = roc_curve(is_positive, scores, drop_intermediate=False)
    return float(fpr[np.argmax(tpr >= 0.95)])


def weighted_metrics(
    id_scores: _Scores, ood_scores: _Scores, id_weights: _Float64, ood_weights: _Float64
) -> dict[str, _Float64]:
    """Compute the ``METRICS`` for R weightings of the same scores, vectorized.

    Args:
        id_scores: ``(N,)``.
        ood_scores: ``(M,)``.
        id_weights: ``(R, N)`` integer-valued, how often each image counts.
        ood_weights: ``(R, M)``, likewise.

    Returns:
        ``(R,)`` for each metric; equal to ``detection_metrics`` of the repeated scores.
    """
    step = max(1, _CHUNK_BYTES // (8 * (len(id_scores) + len(ood_scores))))
    chunks = [
        _group_metrics(
            *_group_ties(id_scores, id_weights[start : start + step]),
            *_group_ties(ood_scores, ood_weights[start : start + step]),
        )
        for start in range(0, len(id_weights), step)
    ]
    return {key: np.concatenate([chunk[key] for chunk in chunks]) for key in METRICS}


def _group_ties(scores: _Scores, weights: _Float64) -> tuple[_Scores, _Float64]:
    """Return the ``(G,)`` distinct scores, ascending, and the total weight ``(G, R)`` of each."""
    order = np.argsort(scores, kind="stable")
    values, starts = np.unique(scores[order], return_index=True)
    summed = weights.T[order]
    if len(starts) < len(order):
        summed = np.add.reduceat(summed, starts, axis=0)
    return values, summed


def _group_metrics(
    id_values: _Scores, num_id: _Float64, ood_values: _Scores, num_ood: _Float64
) -> dict[str, _Float64]:
    """Compute the metrics from the distinct scores ``(G,)`` and their counts ``(G, R)``.

    ``*_up`` are cumulative counts from the lowest score, ``*_down`` from the highest.
    """
    zero = np.zeros((1, num_id.shape[1]))
    id_up = np.concatenate([zero, num_id.cumsum(axis=0)])
    ood_up = np.concatenate([zero, num_ood.cumsum(axis=0)])
    all_id, all_ood = id_up[-1], ood_up[-1]
    id_below = id_up[np.searchsorted(id_values, ood_values, side="left")]
    id_up_to = id_up[np.searchsorted(id_values, ood_values, side="right")]
    ood_up_to = ood_up[np.searchsorted(ood_values, id_values, side="right")]
    # counts of scores at least as high as each OOD score
    id_down, ood_down = all_id - id_below, all_ood - ood_up[:-1]
    # a score that was not drawn has precision 0 / 0, and weight 0
    with np.errstate(invalid="ignore"):
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


def bootstrap_weights(count: int, num_resamples: int, generator: np.random.Generator) -> _Float64:
    """Draw ``(R, count)`` bootstrap counts: how often each of ``count`` images is drawn."""
    drawn = generator.multinomial(count, np.full(count, 1 / count), num_resamples)
    # column-major, as it is read image by image: several times faster
    return drawn.astype(np.float64, order="F")


def interval(resampled: _Float64, level: float = 0.95) -> tuple[float, float]:
    """Return the bootstrap percentile interval of a resampled metric.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
    """
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def intervals(names: Sequence[str], resampled: _Float64) -> dict[str, tuple[float, float]]:
    """Return the interval of each column of ``(R, len(names))`` resampled metrics."""
    return {name: interval(column) for name, column in zip(names, resampled.T, strict=True)}
