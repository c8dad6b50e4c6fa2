"""Distances of features to those of ID images, and the plain sum of three scores.

The sum needs no training. For an image with logits ``l``, the distance ``d`` between its
unit-length features and those of the k-th nearest ID training image, and the squared Mahalanobis
distance ``M`` of its unit-length features (Mahalanobis++), it is::

    sum = (-max(l) - m1) / s1 + (log(d) - m2) / s2 + (log(M) - m3) / s3

``m`` and ``s`` are mean and standard deviation of each term over held-out ID images, so each term
counts the same, and only ID images are needed. (The logarithm of the cosine distance
``1 - cos = d^2 / 2`` is ``2 log(d) - log(2)``, hence the same after standardisation.)

Everything is fitted from arrays, computed in float64, and stored as plain tensors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_Float32: TypeAlias = NDArray[np.float32]
_Float64: TypeAlias = NDArray[np.float64]
_Labels: TypeAlias = NDArray[np.integer[Any]]

# rows at once where a float64 copy of all of them would be large
_STEP = 1024
# smaller distances count as this: float32 search of unit-length features cannot tell them from 0
SMALLEST = 1e-3
# names of the three scores in ``baselines.METHODS``, as the arguments of ``three_terms``
TERMS = ("max_logit", "knn", "mahalanobis_pp")
_PREFIX = "sum_of_three."


@dataclass(frozen=True)
class Mahalanobis:
    """Squared Mahalanobis distance to the nearest class mean; one covariance for all classes.

    Args:
        unit: Whether features are divided by their norm first.
        centre: ``(D,)`` float64, subtracted next.
        whiten: ``(D, R)`` float64; times this, the covariance is the identity.
        white_means: ``(L, R)`` float64, the class means, treated likewise.
    """

    unit: bool
    centre: _Float64
    whiten: _Float64
    white_means: _Float64

    @staticmethod
    def fit(features: _Float32, labels: _Labels) -> "Mahalanobis":
        """Fit to ID images; directions in which they do not vary are dropped.

        In float64 and in one product for all classes, whereas pytorch-ood uses float32 and a
        product per class.

        Args:
            features: ``(N, D)``.
            labels: ``(N,)`` their classes.

        Source: Lee et al., A Simple Unified Framework for Detecting Out-of-Distribution Samples and
            Adversarial Attacks, NeurIPS 2018.
        """
        within = _WithinClasses.of(features, labels, unit=False)
        return within.to_mahalanobis(within.covariance)

    @staticmethod
    def fit_unit(features: _Float32, labels: _Labels) -> "Mahalanobis":
        """Fit Mahalanobis++: unit-length features, covariance shrunk as Ledoit and Wolf do.

        Args:
            features: ``(N, D)`` of ID images. Also ``D > N`` is possible.
            labels: ``(N,)`` their classes.

        Source: Mueller and Hein, Mahalanobis++: Improving OOD Detection via Feature Normalization,
            ICML 2025; Ledoit and Wolf, A Well-Conditioned Estimator for Large-Dimensional
            Covariance Matrices, Journal of Multivariate Analysis 2004.
        """
        within = _WithinClasses.of(features, labels, unit=True)
        return within.to_mahalanobis(within.shrunk_covariance())

    def __call__(self, features: _Float32) -> _Float32:
        """Return the squared distance to the nearest class mean, ``(B,)``.

        Args:
            features: ``(B, D)``.
        """
        wide = features.astype(np.float64)
        white = ((_unit_length(wide) if self.unit else wide) - self.centre) @ self.whiten
        squared = (self.white_means**2).sum(axis=1) - 2 * white @ self.white_means.T
        nearest = (white**2).sum(axis=1) + squared.min(axis=1)
        return np.asarray(np.maximum(nearest, 0), np.float32)


@dataclass(frozen=True)
class _WithinClasses:
    """Class means of features and their covariance within classes.

    Args:
        unit: Whether features were divided by their norm.
        means: ``(L, D)`` float64 class means.
        covariance: ``(D, D)`` float64 of the features less their class means; divided by N.
        mean_fourth: Mean of the fourth power of their norms.
        count: N.
    """

    unit: bool
    means: _Float64
    covariance: _Float64
    mean_fourth: float
    count: int

    @staticmethod
    def of(features: _Float32, labels: _Labels, *, unit: bool) -> "_WithinClasses":
        """Compute from ``(N, D)`` and ``(N,)``, without a float64 copy of all features."""
        classes, position = np.unique(labels, return_inverse=True)
        means = np.zeros((len(classes), features.shape[1]))
        for start in range(0, len(features), _STEP):
            np.add.at(means, position[start : start + _STEP], _widen(features, start, unit))
        means /= np.bincount(position)[:, None]
        covariance, mean_fourth = np.zeros((features.shape[1],) * 2), 0.0
        for start in range(0, len(features), _STEP):
            rows = _widen(features, start, unit) - means[position[start : start + _STEP]]
            covariance += rows.T @ rows / len(features)
            mean_fourth += float((rows**2).sum(axis=1) @ (rows**2).sum(axis=1)) / len(features)
        return _WithinClasses(unit, means, covariance, mean_fourth, len(features))

    def shrunk_covariance(self) -> _Float64:
        """Return the covariance shrunk towards a multiple of the identity.

        Equals ``sklearn.covariance.ledoit_wolf`` with ``assume_centered``, which needs two float64
        copies of all features.
        """
        width = len(self.covariance)
        variance = np.trace(self.covariance) / width
        if variance == 0:
            # one image per class: the Euclidean distance
            return np.eye(width)
        squared_norm = (self.covariance**2).sum()
        distance = squared_norm - variance**2 * width
        error = (self.mean_fourth - squared_norm) / self.count
        shrinkage = min(error / distance, 1.0) if distance > 0 else 1.0
        target = shrinkage * variance * np.eye(width)
        return np.asarray((1 - shrinkage) * self.covariance + target)

    def to_mahalanobis(self, covariance: _Float64) -> Mahalanobis:
        """Return the distance; its arrays are exact in float32, as which they are stored."""
        values, vectors = np.linalg.eigh(covariance)
        kept = values > values[-1] * len(values) * np.finfo(np.float32).eps
        centre = _rounded(self.means.mean(axis=0))
        whiten = _rounded(vectors[:, kept] / np.sqrt(values[kept]))
        return Mahalanobis(self.unit, centre, whiten, _rounded((self.means - centre) @ whiten))


def _widen(features: _Float32, start: int, unit: bool) -> _Float64:
    """Return ``_STEP`` rows in float64, of unit length if ``unit``."""
    rows = features[start : start + _STEP].astype(np.float64)
    return _unit_length(rows) if unit else rows


def _unit_length(rows: _Float64) -> _Float64:
    """Return rows divided by their norm; a zero row stays zero."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.maximum(norms, np.finfo(np.float32).tiny))


def join_layers(features: _Float32, map_means: Sequence[_Float32]) -> _Float32:
    """Concatenate features and means of feature maps, ``(B, C)`` each, all of unit length."""
    items = [_unit_length(item.astype(np.float64)) for item in (features, *map_means)]
    return np.concatenate(items, axis=1).astype(np.float32)


def _rounded(values: _Float64) -> _Float64:
    """Round to float32, kept as float64."""
    return values.astype(np.float32).astype(np.float64)


@dataclass(frozen=True)
class Standardization:
    """Mean and standard deviation of some terms over held-out ID images.

    Args:
        mean: ``(T,)`` float64.
        std: ``(T,)`` float64, positive.
    """

    mean: _Float64
    std: _Float64

    @staticmethod
    def fit(terms: _Float64) -> "Standardization":
        """Fit to the terms ``(n, T)`` of held-out ID images, n at least 1."""
        std = terms.std(axis=0)
        # equal for all images: divided by 1
        return Standardization(terms.mean(axis=0), np.where(std > 0, std, 1.0))

    def __call__(self, terms: _Float64) -> _Float64:
        """Return ``(B, T)`` terms less their mean, divided by their standard deviation."""
        return (terms - self.mean) / self.std


def log_distance(distance: _Float32) -> _Float64:
    """Return the natural logarithm of distances ``(B,)``, of a smallest one where they are less."""
    return np.asarray(np.log(np.maximum(distance, SMALLEST, dtype=np.float64)))


def three_terms(
    max_logit: _Float32, knn_distance: _Float32, mahalanobis: _Float32
) -> NDArray[np.float64]:
    """Return the terms of the sum before standardisation, ``(B, 3)``.

    Args:
        max_logit: ``(B,)`` the negative largest logit.
        knn_distance: ``(B,)`` distance between the unit-length features and those of the k-th
            nearest ID training image.
        mahalanobis: ``(B,)`` squared distance of ``Mahalanobis.fit_unit``.
    """
    logs = [log_distance(item) for item in (knn_distance, mahalanobis)]
    return np.stack([max_logit.astype(np.float64), *logs], axis=1)


@dataclass(frozen=True)
class SumOfThree:
    """The plain sum of three scores, see the top of this module.

    Args:
        mahalanobis: Of ``Mahalanobis.fit_unit``.
        standardization: Of its three terms.
        neighbours: k of the kNN distance that it was fitted with and must be called with.
    """

    mahalanobis: Mahalanobis
    standardization: Standardization
    neighbours: int

    @staticmethod
    def fit(
        mahalanobis: Mahalanobis,
        features: _Float32,
        logits: _Float32,
        knn_distance: _Float32,
        neighbours: int,
    ) -> "SumOfThree":
        """Fit the standardisation on n held-out ID images.

        Args:
            mahalanobis: ``Mahalanobis.fit_unit`` of the ID training images.
            features: ``(n, D)`` of the held-out images.
            logits: ``(n, L)``.
            knn_distance: ``(n,)``, see ``three_terms``.
            neighbours: k of that distance.
        """
        terms = three_terms(-logits.max(axis=1), knn_distance, mahalanobis(features))
        return SumOfThree(mahalanobis, Standardization.fit(terms), neighbours)

    def terms(
        self, features: _Float32, logits: _Float32, knn_distance: _Float32
    ) -> NDArray[np.float64]:
        """Return the three standardised terms of B images, ``(B, 3)``: their sum is the score."""
        terms = three_terms(-logits.max(axis=1), knn_distance, self.mahalanobis(features))
        return self.standardization(terms)

    def __call__(self, features: _Float32, logits: _Float32, knn_distance: _Float32) -> _Float32:
        """Return the score of B images, ``(B,)``; larger is more OOD.

        Args:
            features: ``(B, D)``.
            logits: ``(B, L)``.
            knn_distance: ``(B,)``, see ``three_terms``.
        """
        return np.asarray(self.terms(features, logits, knn_distance).sum(axis=1), np.float32)

    def to_tensors(self) -> dict[str, Tensor]:
        """Return everything as tensors for a safetensors file; ``from_tensors`` is exact."""
        float32 = {
            name: getattr(self.mahalanobis, name).astype(np.float32)
            for name in ("centre", "whiten", "white_means")
        }
        float64 = {"mean": self.standardization.mean, "std": self.standardization.std}
        arrays = {**float32, **float64, "neighbours": np.array(self.neighbours)}
        return {
            _PREFIX + name: torch.from_numpy(array).contiguous() for name, array in arrays.items()
        }

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor]) -> "SumOfThree":
        """Read what ``to_tensors`` returned; other tensors are ignored.

        Raises:
            KeyError: A tensor is missing.
        """
        centre, whiten, white_means, mean, std = (
            tensors[_PREFIX + name].double().numpy()
            for name in ("centre", "whiten", "white_means", "mean", "std")
        )
        return SumOfThree(
            Mahalanobis(True, centre, whiten, white_means),
            Standardization(mean, std),
            int(tensors[_PREFIX + "neighbours"]),
        )
