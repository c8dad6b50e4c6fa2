"""Baselines: other OOD scores of the same classifier; larger is more OOD.

Most are post-hoc: they need only the classifier and ID images. The last two are controls: they are
trained on the auxiliary OOD images, as the decoder is. ``METHODS`` is the only list of them: every
method in it is computed, stored and shown. A fitted score is a ``partial`` of a function of this
module: rank 0 fits and sends it to the other ranks.
"""

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from pytorch_ood.detector import ASH, ReAct, ViM
from scipy.special import logsumexp
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from ood_heatmap.distances import Mahalanobis

log = logging.getLogger(__name__)
_Float32: TypeAlias = NDArray[np.float32]
# (B, D) to (B,)
_FeatureScore: TypeAlias = Callable[[_Float32], _Float32]

_REACT_PERCENTILE = 0.9
_ASH_PERCENTILE = 0.65
_MLP_WIDTH, _MLP_EPOCHS = 256, 30
_MAX_NEIGHBOURS = 50


@dataclass(frozen=True)
class FitData:
    """Training data of the methods.

    Args:
        features: ``(N, D)`` features of ID training images.
        labels: ``(N,)`` their classes.
        ood_features: ``(M, D)`` features of auxiliary OOD images.
        head: The classifier's last linear layer, on the CPU.
        seed: Random seed.
    """

    features: _Float32
    labels: NDArray[np.integer[Any]]
    ood_features: _Float32
    head: nn.Linear
    seed: int


@dataclass(frozen=True)
class ScoreInputs:
    """Inputs of the methods for a batch of images.

    Args:
        features: ``(B, D)``.
        logits: ``(B, L)``.
        knn_distance: ``(B,)`` distance between the unit-length features and those of the k-th
            nearest ID training image.
    """

    features: _Float32
    logits: _Float32
    knn_distance: _Float32


# B images to (B,)
Score: TypeAlias = Callable[[ScoreInputs], _Float32]


@dataclass(frozen=True)
class Method:
    """A detection method.

    Args:
        name: Name in ``metrics.json`` and in the score files.
        label: Label in tables and figures.
        fit: Fits the method and returns its score.
        sees_ood: Whether it is fitted on auxiliary OOD images.
    """

    name: str
    label: str
    fit: Callable[[FitData], Score]
    sees_ood: bool = False


def choose_neighbours(class_sizes: Sequence[int]) -> int:
    """Choose k of the kNN score from the class sizes of the ID training set.

    A quarter of the size of a small class (the first decile of the sizes), at most 50 as in
    OpenOOD. The k-th neighbour must be of the same class: if k is as large as a class, it is as far
    away for ID images of that class as for OOD images. On CIFAR-10 against CIFAR-100 with 20 images
    per class, AUROC is 85.6 for k = 5, 62.9 for k = 20 and 19.9 for k = 50; with 5,000 per class,
    88.0 for k = 50.

    Args:
        class_sizes: Number of ID images predicted as each class.
    """
    sizes = [size for size in class_sizes if size]
    return int(np.clip(np.quantile(sizes, 0.1) // 4, 1, _MAX_NEIGHBOURS))


def _float32(values: NDArray[Any]) -> _Float32:
    """Return values as float32."""
    return np.asarray(values, dtype=np.float32)


def maximum_softmax(logits: _Float32) -> _Float32:
    """Return one minus the largest softmax probability, ``(B,)``.

    Source: Hendrycks and Gimpel, A Baseline for Detecting Misclassified and OOD Examples, ICLR
        2017.
    """
    # sum of the others: `1 - p` would round to exactly 0 for every confident image
    ascending = np.sort(logits.astype(np.float64), axis=1)
    others = logsumexp(ascending[:, :-1], axis=1) - logsumexp(ascending, axis=1)
    return _float32(np.exp(others))


def maximum_logit(logits: _Float32) -> _Float32:
    """Return the negative largest logit, ``(B,)``.

    Source: Hendrycks et al., Scaling Out-of-Distribution Detection for Real-World Settings, ICML
        2022.
    """
    return _float32(-logits.max(axis=1))


def energy(logits: _Float32) -> _Float32:
    """Return the free energy ``-logsumexp(logits)``, ``(B,)``.

    Source: Liu et al., Energy-based Out-of-distribution Detection, NeurIPS 2020.
    """
    return _float32(-logsumexp(logits.astype(np.float64), axis=1))


def vim(features: _Float32, head: nn.Linear) -> _FeatureScore:
    """Fit ViM: the virtual logit plus the free energy of the logits.

    Args:
        features: ``(N, D)`` features of ID images.
        head: The classifier's last linear layer, on the CPU.

    Source: Wang et al., ViM: Out-of-Distribution with Virtual-logit Matching, CVPR 2022; the
        dimension of the principal space follows the authors' code, and is D / 2 where that has no
        rule.
    """
    width = features.shape[1]
    size = 1000 if width >= 2048 else 512 if width > 512 else width // 2
    detector = ViM(None, size, head.weight, _head_bias(head))
    detector.fit_features(torch.from_numpy(features), torch.zeros(len(features)))
    return partial(_score_arrays, detector.predict_features)


def react(features: _Float32, head: nn.Linear) -> _FeatureScore:
    """Fit ReAct: the energy of the logits of features clipped at a percentile of ID features.

    Source: Sun et al., ReAct: Out-of-distribution Detection With Rectified Activations, NeurIPS
        2021.
    """
    detector = ReAct(None, head, percentile=_REACT_PERCENTILE)
    detector.fit_feature_maps(torch.from_numpy(features), torch.zeros(len(features)))
    return partial(_score_arrays, detector.predict_feature_maps)


def ash(head: nn.Linear) -> _FeatureScore:
    """Return ASH-S: the energy of the logits of pruned and rescaled features.

    Source: Djurisic et al., Extremely Simple Activation Shaping for Out-of-Distribution Detection,
        ICLR 2023.
    """
    return partial(_ash_score, head)


def _ash_score(head: nn.Linear, features: _Float32) -> _Float32:
    """Return the energy of the logits of pruned and sharpened features."""
    detector = ASH(None, lambda maps: head(maps.flatten(1)), "ash-s", _ASH_PERCENTILE)
    scores = _score_arrays(detector.predict_feature_maps, features[:, :, None, None])
    # all features 0: the scale is 0 / 0
    energy_of_zero = -float(torch.logsumexp(_head_bias(head), 0))
    # negative features can make the scale infinite
    largest = np.finfo(np.float32).max
    return np.nan_to_num(scores, True, energy_of_zero, largest, -largest)


def _head_bias(head: nn.Linear) -> Tensor:
    """Return the bias ``(L,)`` of a linear layer; zeros if it has none."""
    bias: Tensor | None = head.bias
    return torch.zeros(head.out_features) if bias is None else bias.detach()


def _score_arrays(predict: Callable[[Tensor], Tensor], features: _Float32) -> _Float32:
    """Call a score of tensors with an array."""
    with torch.inference_mode():
        return predict(torch.from_numpy(features)).numpy()


def logistic_regression(id_features: _Float32, ood_features: _Float32) -> _FeatureScore:
    """Fit a linear classifier of ID against auxiliary OOD features; the score is its log-odds.

    Args:
        id_features: ``(N, D)``.
        ood_features: ``(M, D)``.
    """
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    _fit_quietly(model, id_features, ood_features)
    return partial(_decide, model)


def _decide(model: Any, features: _Float32) -> _Float32:
    """Return the log-odds of a linear classifier of scikit-learn."""
    return _float32(model.decision_function(features))


def _small_mlp(id_features: _Float32, ood_features: _Float32, seed: int) -> _FeatureScore:
    """Fit an MLP of ID against auxiliary OOD features; the score is its log-odds.

    Args:
        id_features: ``(N, D)``.
        ood_features: ``(M, D)``.
        seed: Random seed of its weights and of the order of images.
    """
    network = MLPClassifier(_MLP_WIDTH, max_iter=_MLP_EPOCHS, random_state=seed)
    scaler = StandardScaler()
    _fit_quietly(make_pipeline(scaler, network), id_features, ood_features)
    return partial(_mlp_log_odds, scaler, network.coefs_, network.intercepts_)


def _mlp_log_odds(
    scaler: StandardScaler,
    weights: Sequence[_Float32],
    biases: Sequence[_Float32],
    features: _Float32,
) -> _Float32:
    """Return the log-odds of a network with one hidden layer.

    From the weights: ``predict_proba`` would round to exactly 1 for every clear OOD image.
    """
    hidden = np.maximum(scaler.transform(features) @ weights[0] + biases[0], 0)
    return _float32((hidden @ weights[1] + biases[1])[:, 0])


def _fit_quietly(model: Any, id_features: _Float32, ood_features: _Float32) -> None:
    """Fit a scikit-learn model to ID (0) and OOD (1), without convergence warnings."""
    both = np.concatenate([id_features, ood_features])
    is_ood = np.repeat([0, 1], [len(id_features), len(ood_features)])
    with warnings.catch_warnings():
        # the limited number of steps is intended
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(both, is_ood)


def _of_logits(score: Callable[[_Float32], _Float32]) -> Callable[[FitData], Score]:
    """Wrap a score of logits, which needs no fit, for ``Method.fit``."""
    return lambda data: partial(_score_logits, score)


def _score_logits(score: Callable[[_Float32], _Float32], inputs: ScoreInputs) -> _Float32:
    """Score the logits."""
    return score(inputs.logits)


def _of_features(fit: Callable[[FitData], _FeatureScore]) -> Callable[[FitData], Score]:
    """Wrap the fit of a score of features for ``Method.fit``."""
    return lambda data: partial(_score_features, fit(data))


def _score_features(score: _FeatureScore, inputs: ScoreInputs) -> _Float32:
    """Score the features."""
    return score(inputs.features)


def _knn_distance(inputs: ScoreInputs) -> _Float32:
    """Return the distance to the k-th nearest ID image, computed for all methods at once."""
    return inputs.knn_distance


METHODS = (
    Method("msp", "MSP", _of_logits(maximum_softmax)),
    Method("max_logit", "max logit", _of_logits(maximum_logit)),
    Method("energy", "energy", _of_logits(energy)),
    # Source: Sun et al., Out-of-Distribution Detection with Deep Nearest Neighbors, ICML 2022
    Method("knn", "kNN", lambda data: _knn_distance),
    Method(
        "mahalanobis",
        "Mahalanobis",
        _of_features(lambda data: Mahalanobis.fit(data.features, data.labels)),
    ),
    Method(
        "mahalanobis_pp",
        "Mahalanobis++",
        _of_features(lambda data: Mahalanobis.fit_unit(data.features, data.labels)),
    ),
    Method("vim", "ViM", _of_features(lambda data: vim(data.features, data.head))),
    Method("react", "ReAct", _of_features(lambda data: react(data.features, data.head))),
    Method("ash", "ASH", _of_features(lambda data: ash(data.head))),
    Method(
        "logistic_regression",
        "logistic regression",
        _of_features(lambda data: logistic_regression(data.features, data.ood_features)),
        sees_ood=True,
    ),
    Method(
        "mlp",
        "MLP",
        _of_features(lambda data: _small_mlp(data.features, data.ood_features, data.seed)),
        sees_ood=True,
    ),
)


def fit_methods(data: FitData) -> dict[str, Score]:
    """Fit every method of ``METHODS``; return the scores, which can be pickled, by name."""
    log.info(
        "fitting %d baselines on %d ID and %d auxiliary OOD images",
        *(len(METHODS), len(data.features), len(data.ood_features)),
    )
    return {method.name: method.fit(data) for method in METHODS}
