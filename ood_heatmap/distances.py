"""Distances of features to those of ID images, and the plain sum of three scores.

The sum needs no training. For an image with logits ``l``, the distance ``d`` between its
unit-length features and those of the k-th nearest ID training image, and the squared Mahalanobis
distance ``M`` of its unit-length features (Mahalanobis++), it is::

    sum = (-max(l) - m1) / s1 + (log(d) - m2) / s2 + (log(M) - m3) / s3

``m`` and ``s`` are mean and standard deviation of each term over held-out ID images, so each term
counts the same, and only ID images are needed. (The logarithm of the cosine distance
``1 - cos = d^2 / 2`` is ``2 log(d) - log(2)``, hence the same after standardisation.)

Everything is fitted from arrays and computed in float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

_Float32: TypeAlias = NDArray[np.float32]
_Float64: TypeAlias = NDArray[np.float64]
_Labels: TypeAlias = NDArray[np.integer[Any]]

# rows at once where a float64 copy of all of them would be large
_STEP = 1024
# smaller distances count as this: float32 search of unit-length features cannot tell them from 0
SMALLEST = 1e-3
# deviation of a term, relative to its size, below which it is float32 rounding
_LEAST_VARIATION = 1e-6
# names of the three scores in ``baselines.METHODS``, as the arguments of ``three_terms``
TERMS = ("max_logit", "knn", "mahalanobis_pp")


class Mahalanobis(nn.Module):
    """Squared Mahalanobis distance to the nearest class mean; one covariance for all classes.

    Args:
        unit: Whether features are divided by their norm first.
        centre: ``(D,)`` float64, subtracted next.
        whiten: ``(D, R)`` float64; times this, the covariance is the identity.
        white_means: ``(L, R)`` float64, the class means, treated likewise.
    """

    centre: Tensor
    whiten: Tensor
    white_means: Tensor

    def __init__(self, unit: bool, centre: Tensor, whiten: Tensor, white_means: Tensor) -> None:
        super().__init__()
        self.unit = unit
        self.register_buffer("centre", centre)
        self.register_buffer("whiten", whiten)
        self.register_buffer("white_means", white_means)

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

    def forward(self, features: Tensor) -> Tensor:
        """Return the squared distance to the nearest class mean, ``(B,)`` float64.

        Args:
            features: ``(B, D)``.
        """
        rows = functional.normalize(features.double()) if self.unit else features.double()
        white = (rows - self.centre) @ self.whiten
        squared = self.white_means.square().sum(dim=1) - 2 * white @ self.white_means.T
        return (white.square().sum(dim=1) + squared.amin(dim=1)).clamp(min=0)


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
        # rows are of length 1
        if variance * width <= np.finfo(np.float32).eps ** 2:
            # one image per class, or copies of it: the Euclidean distance
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
        arrays = centre, whiten, _rounded((self.means - centre) @ whiten)
        return Mahalanobis(self.unit, *map(torch.from_numpy, arrays))


def _widen(features: _Float32, start: int, unit: bool) -> _Float64:
    """Return ``_STEP`` rows in float64, of unit length if ``unit``."""
    rows = features[start : start + _STEP].astype(np.float64)
    return functional.normalize(torch.from_numpy(rows)).numpy() if unit else rows


def join_layers(features: Tensor, map_means: Sequence[Tensor]) -> Tensor:
    """Concatenate features and means of feature maps, ``(B, C)`` each, all of unit length."""
    return torch.cat([functional.normalize(item.double()) for item in (features, *map_means)], 1)


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
        # equal for all images but for rounding, by which nothing may be divided: divided by 1
        varies = std > _LEAST_VARIATION * np.abs(terms).max(axis=0)
        return Standardization(terms.mean(axis=0), np.where(varies, std, 1.0))

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
