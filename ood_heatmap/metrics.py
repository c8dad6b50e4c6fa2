"""Detection metrics: AUROC, AUPR and FPR@95TPR, each with its positive class named.

Scores: larger is more OOD. scikit-learn computes the metrics; the bootstrap needs thousands of
them, so it uses vectorized formulas over groups of ties, which tests compare to scikit-learn.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

_Float64: TypeAlias = NDArray[np.float64]
_Int32: TypeAlias = NDArray[np.int32]
_Int64: TypeAlias = NDArray[np.int64]
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
    # here: most of a second, and `localize` needs only the bootstrap
    from sklearn.metrics import average_precision_score, roc_auc_score

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
    from sklearn.metrics import roc_curve

    fpr, tpr, _ = roc_curve(is_positive, scores, drop_intermediate=False)
    return float(fpr[np.argmax(tpr >= 0.95)])


@dataclass(frozen=True)
class RankedScores:
    """The scores of a set of images, sorted once for all weightings.

    Args:
        values: ``(G,)`` distinct scores, ascending.
        order: ``(N,)`` positions of the images, by score.
        starts: ``(G + 1,)`` number of images with a score below each, and of all images.
    """

    values: _Scores
    order: _Int64
    starts: _Int64

    @staticmethod
    def rank(scores: _Scores) -> "RankedScores":
        """Rank scores ``(N,)``."""
        order = np.argsort(scores, kind="stable")
        values, starts = np.unique(scores[order], return_index=True)
        return RankedScores(values, order, np.append(starts, len(order)))

    def count(self, weights: _Int32) -> "_Counts":
        """Count the images of each score for weights ``(R, N)``."""
        up = np.zeros((len(self.order) + 1, len(weights)), np.int32)
        # integers: a cumulative sum of floats waits for each addition
        np.cumsum(weights.T.take(self.order, axis=0), axis=0, dtype=np.int32, out=up[1:])
        return _Counts(self.values, up.take(self.starts, axis=0))


@dataclass(frozen=True)
class _Counts:
    """How often the images of each score count, for R weightings.

    Args:
        values: ``(G,)`` distinct scores, ascending.
        up: ``(G + 1, R)`` cumulative counts from the lowest score: 0 first, all last.
    """

    values: _Scores
    up: _Int32

    @property
    def total(self) -> _Int32:
        """Number of images, ``(R,)``."""
        total: _Int32 = self.up[-1]
        return total

    @cached_property
    def num(self) -> _Int32:
        """Number of images of each score, ``(G, R)``."""
        num: _Int32 = np.diff(self.up, axis=0)
        return num

    @cached_property
    def accepts(self) -> _Int64:
        """Position of the lowest score up to which 95 % of the images are, ``(R,)``."""
        accepts: _Int64 = np.argmax(self.up[1:] / self.total >= 0.95, axis=0)
        return accepts


def weighted_metrics(
    id_scores: RankedScores,
    ood_scores: Sequence[RankedScores],
    id_weights: _Int32,
    ood_weights: Sequence[_Int32],
) -> _Float64:
    """Compute the ``METRICS`` of a score for R weightings of the images, vectorized.

    Args:
        id_scores: Of N images.
        ood_scores: Of each OOD set, M images.
        id_weights: ``(R, N)`` how often each image counts.
        ood_weights: ``(R, M)`` of each OOD set, likewise.

    Returns:
        ``(R, OOD sets, METRICS)``; equal to ``detection_metrics`` of the repeated scores.
    """
    largest = len(id_scores.order) + max(len(scores.order) for scores in ood_scores)
    step = max(1, _CHUNK_BYTES // (8 * largest))
    chunks = []
    for start in range(0, len(id_weights), step):
        chunk = slice(start, start + step)
        id_counts = id_scores.count(id_weights[chunk])
        metrics = [
            _count_metrics(id_counts, scores.count(weights[chunk]))
            for scores, weights in zip(ood_scores, ood_weights, strict=True)
        ]
        chunks.append(np.stack(metrics, axis=1))
    return np.concatenate(chunks)


def _count_metrics(id_set: _Counts, ood_set: _Counts) -> _Float64:
    """Compute the metrics ``(R, METRICS)`` of counted scores.

    ``*_up_to`` are cumulative counts from the lowest score, ``*_down`` from the highest.
    """
    all_id, all_ood = id_set.total, ood_set.total
    # counts of ID images below each OOD score, and up to it
    below = np.searchsorted(id_set.values, ood_set.values, side="left")
    id_below = id_set.up.take(below, axis=0)
    id_up_to = id_set.up.take(np.searchsorted(id_set.values, ood_set.values, side="right"), axis=0)
    # counts of OOD images up to each ID score
    steps = np.diff(below, prepend=0, append=len(id_set.values))
    ood_up_to = np.repeat(ood_set.up, steps, axis=0)
    # counts of scores at least as high as each OOD score
    id_down, ood_down = all_id - id_below, all_ood - ood_set.up[:-1]
    # a score that was not drawn has precision 0 / 0, and weight 0
    precision_in = id_set.up[1:] / np.maximum(id_set.up[1:] + ood_up_to, 1)
    precision_out = ood_down / np.maximum(ood_down + id_down, 1)
    flags = len(ood_down) - 1 - np.argmax((ood_down / all_ood >= 0.95)[::-1], axis=0)
    column = np.arange(len(all_id))
    metrics = {
        "auroc": _sum_products(ood_set.num, id_below + id_up_to) / (2.0 * all_id * all_ood),
        "aupr_in": _sum_products(id_set.num, precision_in) / all_id,
        "aupr_out": _sum_products(ood_set.num, precision_out) / all_ood,
        "fpr95_id_pos": ood_up_to[id_set.accepts, column] / all_ood,
        "fpr95_ood_pos": id_down[flags, column] / all_id,
    }
    return np.stack([metrics[key] for key in METRICS], axis=1)


def _sum_products(counts: _Int32, values: NDArray[Any]) -> _Float64:
    """Return the sum of products over all scores, ``(R,)``, of two ``(G, R)``."""
    products: _Float64 = np.einsum("gr,gr->r", counts, values, dtype=np.float64)
    return products


def bootstrap_weights(count: int, num_resamples: int, generator: np.random.Generator) -> _Int32:
    """Draw ``(R, count)`` bootstrap counts: how often each of ``count`` images is drawn."""
    drawn = generator.multinomial(count, np.full(count, 1 / count), num_resamples)
    # column-major, as it is read image by image: several times faster
    return drawn.astype(np.int32, order="F")


def interval(resampled: _Float64, level: float = 0.95) -> tuple[float, float]:
    """Return the bootstrap percentile interval of a resampled metric.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
    """
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def intervals(names: Sequence[str], resampled: _Float64) -> dict[str, tuple[float, float]]:
    """Return the interval of each column of ``(R, len(names))`` resampled metrics."""
    return {name: interval(column) for name, column in zip(names, resampled.T, strict=True)}
