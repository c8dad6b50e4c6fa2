"""How well scores tell ID from OOD: AUROC, AUPR and FPR@95TPR, each with its positive class named.

Scores: larger is more OOD. scikit-learn computes the figures; the bootstrap needs a thousand of
them, so it has the same formulas over tied groups, tested to be equal.
"""

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
    values, group = np.unique(np.concatenate([id_scores, ood_scores]), return_inverse=True)
    step = max(1, PIECE_BYTES // (8 * len(values)))
    pieces = [
        grouped_metrics(
            grouped(id_weights[start : start + step], group[: len(id_scores)], len(values)),
            grouped(ood_weights[start : start + step], group[len(id_scores) :], len(values)),
        )
        for start in range(0, len(id_weights), step)
    ]
    return {key: np.concatenate([piece[key] for piece in pieces]) for key in METRICS}


def grouped(weights: Float64, group: NDArray[np.int64], num_groups: int) -> Float64:
    """Return ``(R, G)``: the weight in each group of equal scores, lowest score first."""
    order = np.argsort(group, kind="stable")
    present, starts = np.unique(group[order], return_index=True)
    summed = np.zeros((len(weights), num_groups))
    summed[:, present] = np.add.reduceat(weights[:, order], starts, axis=1)
    return summed


def grouped_metrics(num_id: Float64, num_ood: Float64) -> dict[str, Float64]:
    """Return the figures from the counts ``(R, G)`` in each group, lowest score first."""
    id_up, ood_up = num_id.cumsum(axis=1), num_ood.cumsum(axis=1)
    all_id, all_ood = id_up[:, -1:], ood_up[:, -1:]
    # at least as high as the group's score
    id_down, ood_down = all_id - id_up + num_id, all_ood - ood_up + num_ood
    pairs = (num_ood * (id_up - num_id / 2)).sum(axis=1)
    with np.errstate(invalid="ignore"):  # a group that nobody drew: 0 of 0, and weighted with 0
        precision_in = np.nan_to_num(id_up / (id_up + ood_up))
        precision_out = np.nan_to_num(ood_down / (ood_down + id_down))
    rows = np.arange(len(num_id))
    accepts = np.argmax(id_up / all_id >= 0.95, axis=1)
    last = num_id.shape[1] - 1
    flags = last - np.argmax((ood_down / all_ood >= 0.95)[:, ::-1], axis=1)
    return {
        "auroc": pairs / (all_id * all_ood)[:, 0],
        "aupr_in": (num_id * precision_in).sum(axis=1) / all_id[:, 0],
        "aupr_out": (num_ood * precision_out).sum(axis=1) / all_ood[:, 0],
        "fpr95_id_pos": ood_up[rows, accepts] / all_ood[:, 0],
        "fpr95_ood_pos": id_down[rows, flags] / all_id[:, 0],
    }


def bootstrap_weights(count: int, num_resamples: int, generator: np.random.Generator) -> Float64:
    """Return ``(R, count)``: how often each of ``count`` images is drawn, with replacement."""
    return generator.multinomial(count, np.full(count, 1 / count), num_resamples).astype(np.float64)


def interval(resampled: Float64, level: float = 0.95) -> tuple[float, float]:
    """Return the percentile interval of resampled figures.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
    """
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
