"""Post-hoc scores of the same classifier, the yardstick of every table.

Larger is more OOD, everywhere.
"""

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

Float32: TypeAlias = NDArray[np.float32]


def float32(values: NDArray[Any]) -> Float32:
    """Return values as float32."""
    return np.asarray(values, dtype=np.float32)


def maximum_softmax(logits: Float32) -> Float32:
    """Return one minus the largest softmax probability, ``(B,)``.

    Source: Hendrycks and Gimpel, A Baseline for Detecting Misclassified and OOD Examples, ICLR
        2017.
    """
    # the sum of the others: `1 - p` would round to one and the same 0 for every confident image
    ascending = np.sort(logits.astype(np.float64), axis=1)
    others = logsumexp(ascending[:, :-1], axis=1) - logsumexp(ascending, axis=1)
    return float32(np.exp(others))


def maximum_logit(logits: Float32) -> Float32:
    """Return the negative largest logit, ``(B,)``.

    Source: Hendrycks et al., Scaling Out-of-Distribution Detection for Real-World Settings, ICML
        2022.
    """
    return float32(-logits.max(axis=1))


def energy(logits: Float32) -> Float32:
    """Return the free energy ``-logsumexp(logits)``, ``(B,)``.

    Source: Liu et al., Energy-based Out-of-distribution Detection, NeurIPS 2020.
    """
    return float32(-logsumexp(logits.astype(np.float64), axis=1))


def unit_length(features: Float32) -> Float32:
    """Return features divided by their norm; a zero row stays zero."""
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.maximum(norms, np.finfo(np.float32).tiny)
