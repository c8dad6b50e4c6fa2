"""Baselines: other OOD scores of the same classifier; larger is more OOD.

Most are post-hoc: they need only the classifier and ID images. The last two are controls: they are
trained on the auxiliary OOD images, as the decoder is. ``METHODS`` is the only list of them: every
method in it is computed, stored and shown. A fitted score is a ``partial`` of a function of this
module: rank 0 fits and sends it to the other ranks. The sum of three of them, in
``distances``, is standardised on held-out ID images once these are scored.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import logsumexp
from torch import Tensor, nn

from ood_heatmap.combined import generalized_entropy
from ood_heatmap.controls import logistic_regression, mlp
from ood_heatmap.distances import Mahalanobis, join_layers

log = logging.getLogger(__name__)
_Float32: TypeAlias = NDArray[np.float32]
# (B, D) to (B,)
_FeatureScore: TypeAlias = Callable[[_Float32], _Float32]

_REACT_PERCENTILE = 0.9
_ASH_PERCENTILE = 0.65
_MAX_NEIGHBOURS = 50


@dataclass(frozen=True)
class Outputs:
    """What the methods use of the classifier's outputs.

    Args:
        features: ``(B, D)``.
        prediction: ``(B,)`` predicted class.
        map_means: ``(B, C)`` spatial mean of each feature map, the deepest first.
        map_std: ``(B, C)`` spatial standard deviation of the deepest map; C is 0 if the decoder
            does without.
    """

    features: _Float32
    prediction: NDArray[np.integer[Any]]
    map_means: Sequence[_Float32]
    map_std: _Float32

    @property
    def decoder_inputs(self) -> _Float32:
        """What the decoder is given beside the class and the maps themselves, ``(B, K)``."""
        return np.concatenate([self.features, self.map_std], axis=1)


@dataclass(frozen=True)
class FitData:
    """Training data of the methods.

    Args:
        id: N ID training images.
        labels: ``(N,)`` their classes.
        ood: M auxiliary OOD images.
        head: The classifier's last linear layer, on the CPU.
        layers: Numbers of the feature maps whose spatial means are layers beside the features.
        noise: Standard deviation of the noise on the decoder's inputs in training.
        seed: Random seed.
    """

    id: Outputs
    labels: NDArray[np.integer[Any]]
    ood: Outputs
    head: nn.Linear
    layers: Sequence[int]
    noise: float
    seed: int


@dataclass(frozen=True)
class ScoreInputs:
    """Inputs of the methods for a batch of images.

    Args:
        outputs: Of the classifier.
        logits: ``(B, L)``.
        knn_distance: ``(B,)`` distance between the unit-length features and those of the k-th
            nearest ID training image.
    """

    outputs: Outputs
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
        fit: Fits the method and returns its score; None where it does not apply.
        sees_ood: Whether it is fitted on auxiliary OOD images.
    """

    name: str
    label: str
    fit: Callable[[FitData], Score | None]
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
    """Return values as float32; what overflows is the largest number."""
    largest = np.finfo(np.float32).max
    return np.asarray(np.clip(values, -largest, largest), dtype=np.float32)


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


def gen(logits: _Float32) -> _Float32:
    """Return GEN, ``(B,)``, see ``combined.generalized_entropy``."""
    return _score_arrays(generalized_entropy, logits)


def fdbd(features: _Float32, head: nn.Linear) -> Score:
    """Fit fDBD: minus the mean distance to the other classes' decision boundaries.

    Divided by the distance to the mean of the ID features. In memory of L x L, whereas pytorch-ood
    needs L x L x D.

    Args:
        features: ``(N, D)`` features of ID images.
        head: The classifier's last linear layer, on the CPU.

    Source: Liu and Qin, Fast Decision Boundary based Out-of-Distribution Detector, ICML 2024.
    """
    weight = head.weight.detach().double().numpy()
    squared = (weight**2).sum(axis=1)
    between = squared[:, None] + squared - 2 * weight @ weight.T
    # without a boundary there is no distance to it: of a class to itself, or to one like it
    apart = between > 1e-9 * squared.max()
    inverse = np.where(apart, 1 / np.sqrt(np.where(apart, between, 1)), 0)
    return partial(_fdbd_score, features.mean(axis=0, dtype=np.float64), _float32(inverse))


def _fdbd_score(mean: NDArray[np.float64], inverse: _Float32, inputs: ScoreInputs) -> _Float32:
    """Return the score of fDBD.

    Args:
        mean: ``(D,)`` mean of the ID features.
        inverse: ``(L, L)`` one over the distances between the rows of the head's weight.
        inputs: Inputs of the methods.
    """
    logits = inputs.logits
    lead = logits.max(axis=1, keepdims=True) - logits
    distance = (lead * inverse[logits.argmax(axis=1)]).sum(axis=1) / max(1, logits.shape[1] - 1)
    from_mean = np.linalg.norm(inputs.outputs.features - mean, axis=1)
    return _float32(-distance / np.maximum(from_mean, np.finfo(np.float32).tiny))


def multi_layer_mahalanobis(data: FitData) -> Score | None:
    """Fit Mahalanobis++ to the features and the spatial means of the feature maps, concatenated.

    Each is divided by its norm first. A map whose mean is the features, as often that of the
    deepest, is left out. None if there is only one map, or none is left.

    Source: after Mueller and Hein, Mahalanobis++, ICML 2025; several layers as in Lee et al.,
        NeurIPS 2018.
    """
    if len(data.id.map_means) < 2 or not data.layers:
        return None
    joined = _join_layers(data.id, data.layers)
    return partial(_multi_layer_score, Mahalanobis.fit_unit(joined, data.labels), data.layers)


def _multi_layer_score(
    mahalanobis: Mahalanobis, layers: Sequence[int], inputs: ScoreInputs
) -> _Float32:
    """Score features and spatial means of some feature maps."""
    return _score_arrays(mahalanobis, _join_layers(inputs.outputs, layers))


def _join_layers(outputs: Outputs, layers: Sequence[int]) -> _Float32:
    """Return features and spatial means of some feature maps side by side."""
    means = [torch.from_numpy(outputs.map_means[number]) for number in layers]
    return join_layers(torch.from_numpy(outputs.features), means).float().numpy()


def _mahalanobis_score(mahalanobis: Mahalanobis, inputs: ScoreInputs) -> _Float32:
    """Score the features."""
    return _score_arrays(mahalanobis, inputs.outputs.features)


def vim(features: _Float32, head: nn.Linear) -> _FeatureScore:
    """Fit ViM: the virtual logit plus the free energy of the logits.

    Args:
        features: ``(N, D)`` features of ID images.
        head: The classifier's last linear layer, on the CPU.

    Source: Wang et al., ViM: Out-of-Distribution with Virtual-logit Matching, CVPR 2022; the
        dimension of the principal space follows the authors' code, and is D / 2 where that has no
        rule.
    """
    # here: with torchvision it takes more than a second, and only fitting and scoring need it
    from pytorch_ood.detector import ViM

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
    from pytorch_ood.detector import ReAct

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
    from pytorch_ood.detector import ASH

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
        return _float32(predict(torch.from_numpy(features)).numpy())


def _of_logits(score: Callable[[_Float32], _Float32]) -> Callable[[FitData], Score]:
    """Wrap a score of logits, which needs no fit, for ``Method.fit``."""
    return lambda data: partial(_score_logits, score)


def _score_logits(score: Callable[[_Float32], _Float32], inputs: ScoreInputs) -> _Float32:
    """Score the logits."""
    return score(inputs.logits)


def _fit_mlp(data: FitData) -> Score:
    """Fit the MLP to the decoder's inputs."""
    id_inputs, ood_inputs = (
        (outputs.decoder_inputs, outputs.prediction) for outputs in (data.id, data.ood)
    )
    num_classes = data.head.out_features
    fitted = mlp(id_inputs, ood_inputs, num_classes, noise=data.noise, seed=data.seed)
    return partial(_mlp_score, fitted)


def _mlp_score(
    fitted: Callable[[_Float32, NDArray[np.integer[Any]]], _Float32], inputs: ScoreInputs
) -> _Float32:
    """Score the decoder's inputs."""
    return fitted(inputs.outputs.decoder_inputs, inputs.outputs.prediction)


def _of_features(fit: Callable[[FitData], _FeatureScore]) -> Callable[[FitData], Score]:
    """Wrap the fit of a score of features for ``Method.fit``."""
    return lambda data: partial(_score_features, fit(data))


def _score_features(score: _FeatureScore, inputs: ScoreInputs) -> _Float32:
    """Score the features."""
    return score(inputs.outputs.features)


def _knn_distance(inputs: ScoreInputs) -> _Float32:
    """Return the distance to the k-th nearest ID image, computed for all methods at once."""
    return inputs.knn_distance


METHODS = (
    Method("msp", "MSP", _of_logits(maximum_softmax)),
    Method("max_logit", "max logit", _of_logits(maximum_logit)),
    Method("energy", "energy", _of_logits(energy)),
    Method("gen", "GEN", _of_logits(gen)),
    # Source: Sun et al., Out-of-Distribution Detection with Deep Nearest Neighbors, ICML 2022
    Method("knn", "kNN", lambda data: _knn_distance),
    Method(
        "mahalanobis",
        "Mahalanobis",
        lambda data: partial(_mahalanobis_score, Mahalanobis.fit(data.id.features, data.labels)),
    ),
    Method(
        "mahalanobis_pp",
        "Mahalanobis++",
        lambda data: partial(
            _mahalanobis_score, Mahalanobis.fit_unit(data.id.features, data.labels)
        ),
    ),
    Method("mahalanobis_pp_layers", "Maha++ all layers", multi_layer_mahalanobis),
    Method("fdbd", "fDBD", lambda data: fdbd(data.id.features, data.head)),
    Method("vim", "ViM", _of_features(lambda data: vim(data.id.features, data.head))),
    Method("react", "ReAct", _of_features(lambda data: react(data.id.features, data.head))),
    Method("ash", "ASH", _of_features(lambda data: ash(data.head))),
    Method(
        "logistic_regression",
        "logistic regression",
        _of_features(lambda data: logistic_regression(data.id.features, data.ood.features)),
        sees_ood=True,
    ),
    Method("mlp", "MLP", _fit_mlp, sees_ood=True),
)


def fit_methods(data: FitData) -> dict[str, Score]:
    """Fit every method of ``METHODS`` that applies; return the scores by name, for a pickle."""
    log.info(
        "fitting %d baselines on %d ID and %d auxiliary OOD images",
        *(len(METHODS), len(data.labels), len(data.ood.features)),
    )
    fitted = {method.name: method.fit(data) for method in METHODS}
    return {name: score for name, score in fitted.items() if score is not None}
