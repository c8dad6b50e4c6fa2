"""The default score: what distances say of an image, and what the decoder has learned.

For an image, the terms are those of the plain sum of three (see ``distances``), the logarithm of
Mahalanobis++ over all layers if several feature maps are cached, and the image score of the
decoder. Each is standardised on held-out ID images, and they are added::

    score = t1 + ... + tT + w * learned

A learned score can be far better than any distance, and far worse: it may have learned how the
auxiliary OOD images differ from the ID images in style, and then it misses everything that has the
style of ID images. Half-and-half mixtures of two held-out ID images have it, and are not ID. So the
weight ``w`` is the largest of ``WEIGHTS`` with which mixtures are told from held-out ID images
nearly as well as without the learned score. No OOD image, and no test image, is needed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from ood_heatmap.distances import Standardization

_Float32: TypeAlias = NDArray[np.float32]
_Float64: TypeAlias = NDArray[np.float64]

WEIGHTS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
# AUROC of mixtures that the learned score may cost
_MAX_LOSS = 0.01
# names of the scores that are added, as in ``baselines.METHODS``; those of distances count with
# their logarithm
_DISTANCES = ("knn", "mahalanobis_pp", "mahalanobis_pp_layers")
TERMS = ("max_logit", *_DISTANCES)
# smaller distances count as this: float32 search of unit-length features cannot tell them from 0
_SMALLEST = 1e-3


@dataclass(frozen=True)
class Combination:
    """A fitted combination of scores.

    Args:
        names: Names of the added scores, some of ``TERMS``, and last of the learned score.
        standardization: Of each term over held-out ID images.
        weight: Weight of the learned score.
        mixture_auroc: AUROC of mixtures against held-out ID images for each of ``WEIGHTS``; empty
            if there were none.
    """

    names: tuple[str, ...]
    standardization: Standardization
    weight: float
    mixture_auroc: tuple[float, ...] = ()

    @staticmethod
    def fit(
        held_out: Mapping[str, _Float32], mixtures: Mapping[str, _Float32] | None, learned: str
    ) -> "Combination":
        """Fit to held-out ID images, and choose the weight by mixtures of them.

        Args:
            held_out: Scores ``(n,)`` by name, of held-out ID images.
            mixtures: Scores of mixtures of two of them; None if there are none, which gives the
                smallest weight that is not 0.
            learned: Name of the learned score.
        """
        names = (*(name for name in TERMS if name in held_out), learned)
        standardization = Standardization.fit(_stack(held_out, names))
        if mixtures is None:
            return Combination(names, standardization, WEIGHTS[1])
        terms, mixed = (standardization(_stack(item, names)) for item in (held_out, mixtures))
        auroc = [_auroc(_add(terms, weight), _add(mixed, weight)) for weight in WEIGHTS]
        allowed = [
            weight
            for weight, found in zip(WEIGHTS, auroc, strict=True)
            if found >= auroc[0] - _MAX_LOSS
        ]
        return Combination(names, standardization, max(allowed), tuple(auroc))

    def __call__(self, scores: Mapping[str, _Float32]) -> _Float32:
        """Return the score ``(B,)`` of images from their scores by name; larger is more OOD."""
        terms = self.standardization(_stack(scores, self.names))
        return np.asarray(_add(terms, self.weight), np.float32)


def _stack(scores: Mapping[str, _Float32], names: Sequence[str]) -> _Float64:
    """Return the terms before standardisation, ``(B, T)``."""
    columns = []
    for name in names:
        values = scores[name].astype(np.float64)
        columns.append(np.log(np.maximum(values, _SMALLEST)) if name in _DISTANCES else values)
    return np.stack(columns, axis=1)


def _add(terms: _Float64, weight: float) -> _Float64:
    """Return the sum of standardised terms, ``(B,)``; the last has the weight."""
    return np.asarray(terms[:, :-1].sum(axis=1) + weight * terms[:, -1])


def _auroc(negative: _Float64, positive: _Float64) -> float:
    """Return the AUROC of two groups of scores."""
    label = np.repeat([0, 1], [len(negative), len(positive)])
    return float(roc_auc_score(label, np.concatenate([negative, positive])))
