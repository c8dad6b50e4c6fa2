"""The default score: what distances say of an image, and what the decoder has learned.

For an image, the terms are GEN, the logarithms of the kNN distance, of Mahalanobis++ and, if
several feature maps are cached, of Mahalanobis++ over all layers, and the image score of the
decoder. (GEN instead of the maximum logit of the plain sum of three: it tells auxiliary OOD images
from held-out ID images better.) Each is standardised on held-out ID images, and they are added::

    score = t1 + ... + tT + w * learned

A learned score can be far better than any distance, and far worse: it may have learned how the
auxiliary OOD images differ from the ID images in style, and then it misses everything that has the
style of ID images. Half-and-half mixtures of two held-out ID images have it, and are not ID. So the
weight ``w`` is the largest of ``WEIGHTS`` with which mixtures are told from held-out ID images
nearly as well as without the learned score. No OOD image, and no test image, is needed.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from ood_heatmap.distances import (
    SMALLEST,
    Mahalanobis,
    Standardization,
    join_layers,
    log_distance,
)
from ood_heatmap.scorer import Scorer

if TYPE_CHECKING:
    # only for annotations
    from ood_heatmap.classifier import Output

_Float32: TypeAlias = NDArray[np.float32]
_Float64: TypeAlias = NDArray[np.float64]

WEIGHTS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
# AUROC of mixtures that the learned score may cost, and held-out images that can tell
_MAX_LOSS, _MIN_HELD_OUT = 0.01, 20
# log-odds of the heatmap at two quantiles of what held-out ID images have: of their scores, and of
# the largest log-odds of their pixels, of which fewer may be mistaken as there is the score already
_LEVELS, _QUANTILES, _LOCAL_QUANTILES = (-3.0, 0.0), (0.5, 0.95), (0.5, 0.99)
# difference of two scores, sums of standardised terms, that is float32 rounding
_LEAST_SPREAD = 1e-5
# names of the scores that are added, as in ``baselines.METHODS``; those of distances count with
# their logarithm
_DISTANCES = ("knn", "mahalanobis_pp", "mahalanobis_pp_layers")
TERMS = ("gen", *_DISTANCES)
# tensor of a file with the combined score, see ``make_bank``
BANK = "bank"
# candidates on either side of the k-th: float32 similarities cannot order images near each other
_MARGIN = 8
# power and number of classes of GEN, as in its paper
_GEN_POWER, _GEN_CLASSES = 0.1, 100


@dataclass(frozen=True)
class Combination:
    """A fitted combination of scores.

    Args:
        names: Names of the added scores, some of ``TERMS``, and last of the learned score.
        standardization: Of each term over held-out ID images.
        weight: Weight of the learned score.
        anchors: Median and 95 % quantile of the score over held-out ID images.
        local_anchors: Median and 99 % quantile of the largest log-odds of their pixels; empty if
            the decoder has none.
        mixture_auroc: AUROC of mixtures against held-out ID images for each of ``WEIGHTS``; empty
            if there were none.
    """

    names: tuple[str, ...]
    standardization: Standardization
    weight: float
    anchors: tuple[float, ...]
    local_anchors: tuple[float, ...] = ()
    mixture_auroc: tuple[float, ...] = ()

    @staticmethod
    def fit(
        held_out: Mapping[str, _Float32],
        mixtures: Mapping[str, _Float32] | None,
        learned: str,
        max_place: _Float32 | None = None,
    ) -> "Combination":
        """Fit to held-out ID images, and choose the weight by mixtures of them.

        Args:
            held_out: Scores ``(n,)`` by name, of held-out ID images.
            mixtures: Scores of mixtures of two of them; None if there are none. Then, and with
                fewer than 20 held-out images, the weight is the smallest that is not 0.
            learned: Name of the learned score.
            max_place: ``(n,)`` largest log-odds of the pixels of each held-out image, if the
                decoder has them.
        """
        names = (*(name for name in TERMS if name in held_out), learned)
        standardization = Standardization.fit(_stack(held_out, names))
        terms = standardization(_stack(held_out, names))
        weight = WEIGHTS[1]
        auroc: tuple[float, ...] = ()
        if mixtures is not None:
            mixed = standardization(_stack(mixtures, names))
            auroc = tuple(_auroc(_add(terms, item), _add(mixed, item)) for item in WEIGHTS)
            weight = _largest_weight(auroc) if len(terms) >= _MIN_HELD_OUT else weight
        anchors = _quantiles(_add(terms, weight), _QUANTILES)
        local = () if max_place is None else _quantiles(max_place, _LOCAL_QUANTILES)
        # all held-out images alike: no scale is known
        local = local if local and local[1] - local[0] > _LEAST_SPREAD else ()
        return Combination(names, standardization, weight, anchors, local, auroc)

    def __call__(self, scores: Mapping[str, _Float32]) -> _Float32:
        """Return the score ``(B,)`` of images from their scores by name; larger is more OOD."""
        terms = self.standardization(_stack(scores, self.names))
        return np.asarray(_add(terms, self.weight), np.float32)

    def level(self, score: Tensor) -> Tensor:
        """Return the log-odds ``(B,)`` that images with these scores are OOD, for their heatmaps.

        Linear in the score: -3 (5 %) at the median of held-out ID images, and 0 (50 %) at the score
        that 5 % of them exceed.
        """
        return _to_log_odds(score, self.anchors)

    def local(self, places: Tensor) -> Tensor | None:
        """Return the log-odds of pixels whatever their image is, see ``Scorer.local``.

        Linear: -3 at the median of the largest pixels of held-out ID images, and 0 at what 1 % of
        them exceed.
        """
        return _to_log_odds(places, self.local_anchors) if self.local_anchors else None


def _pair(values: Sequence[float]) -> tuple[float, float]:
    """Return two numbers of a file.

    Raises:
        ValueError: There are not two.
    """
    first, second = map(float, values)
    return first, second


def _to_log_odds(values: Tensor, anchors: Sequence[float]) -> Tensor:
    """Map the anchors, a median and a high quantile, to their log-odds, and the rest linearly."""
    (median, high), (at_median, at_high) = anchors, _LEVELS
    # equal scores of all held-out images but for rounding: no scale is known
    known = high - median > _LEAST_SPREAD
    slope = (at_high - at_median) / (high - median) if known else 1.0
    return at_high + slope * (values - high)


def _stack(scores: Mapping[str, _Float32], names: Sequence[str]) -> _Float64:
    """Return the terms before standardisation, ``(B, T)``."""
    columns = [
        log_distance(scores[name]) if name in _DISTANCES else scores[name].astype(np.float64)
        for name in names
    ]
    return np.stack(columns, axis=1)


def _add(terms: _Float64, weight: float) -> _Float64:
    """Return the sum of standardised terms, ``(B,)``; the last has the weight."""
    return np.asarray(terms[:, :-1].sum(axis=1) + weight * terms[:, -1])


def _largest_weight(mixture_auroc: Sequence[float]) -> float:
    """Return the largest weight that costs mixtures little AUROC."""
    pairs = zip(WEIGHTS, mixture_auroc, strict=True)
    return max(weight for weight, auroc in pairs if auroc >= mixture_auroc[0] - _MAX_LOSS)


def _quantiles(values: _Float32 | _Float64, shares: Sequence[float]) -> tuple[float, ...]:
    """Return quantiles of values."""
    return tuple(map(float, np.quantile(values, shares)))


def _auroc(negative: _Float64, positive: _Float64) -> float:
    """Return the AUROC of two groups of scores."""
    # imported lazily: a detector needs no scikit-learn
    from sklearn.metrics import roc_auc_score

    label = np.repeat([0, 1], [len(negative), len(positive)])
    return float(roc_auc_score(label, np.concatenate([negative, positive])))


@dataclass(frozen=True)
class CombinedParts:
    """What the combined score of a run needs beside the outputs of classifier and decoder.

    Args:
        combination: The fitted combination.
        neighbours: k of the kNN distance.
        mahalanobis: Mahalanobis++ of the features.
        layers: Numbers of the feature maps that Mahalanobis++ over all layers takes.
        of_layers: That distance; None without.
    """

    combination: Combination
    neighbours: int
    mahalanobis: Mahalanobis
    layers: tuple[int, ...] = ()
    of_layers: Mahalanobis | None = None

    def to_tensors(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return tensors and metadata for a safetensors file."""
        tensors = {
            "mean": torch.from_numpy(self.combination.standardization.mean),
            "std": torch.from_numpy(self.combination.standardization.std),
            **_tensors("features", self.mahalanobis),
            **(_tensors("layers", self.of_layers) if self.of_layers else {}),
        }
        about = {
            "names": self.combination.names,
            "weight": self.combination.weight,
            "anchors": self.combination.anchors,
            "local_anchors": self.combination.local_anchors,
            "mixture_auroc": self.combination.mixture_auroc,
            "neighbours": self.neighbours,
            "layers": self.layers,
        }
        tensors = {name: item.cpu().contiguous() for name, item in tensors.items()}
        # one entry: the order of several would vary between files
        return tensors, {"ood_heatmap": json.dumps(about)}

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> "CombinedParts":
        """Read what ``to_tensors`` returned; other tensors are ignored.

        Raises:
            KeyError, ValueError, TypeError: Something is missing or has another form.
        """
        about = json.loads(metadata["ood_heatmap"])
        combination = Combination(
            tuple(map(str, about["names"])),
            Standardization(*(tensors[name].double().numpy() for name in ("mean", "std"))),
            float(about["weight"]),
            _pair(about["anchors"]),
            _pair(about["local_anchors"]) if about["local_anchors"] else (),
            tuple(map(float, about["mixture_auroc"])),
        )
        layers = tuple(map(int, about["layers"]))
        return CombinedParts(
            combination,
            int(about["neighbours"]),
            _mahalanobis("features", tensors),
            layers,
            _mahalanobis("layers", tensors) if layers else None,
        )


def _tensors(prefix: str, mahalanobis: Mahalanobis) -> dict[str, Tensor]:
    """Return the tensors of a distance by name; they are exact in float32."""
    return {f"{prefix}.{name}": item.float() for name, item in mahalanobis.state_dict().items()}


def _mahalanobis(prefix: str, tensors: Mapping[str, Tensor]) -> Mahalanobis:
    """Return the distance that ``_tensors`` describes."""
    names = ("centre", "whiten", "white_means")
    return Mahalanobis(True, *(tensors[f"{prefix}.{name}"].double() for name in names))


def generalized_entropy(logits: Tensor) -> Tensor:
    """Return GEN, the generalized entropy of the most probable classes, ``(B,)`` float64.

    The sum of ``p^0.1 (1 - p)^0.1`` over at most 100 classes, as in the paper. In float64 from the
    logits, whereas pytorch-ood bounds probabilities at 1e-7 and so gives confident images the same
    score.

    Args:
        logits: ``(B, L)``.

    Source: Liu et al., GEN: Pushing the Limits of Softmax-Based Out-of-Distribution Detection, CVPR
        2023.
    """
    descending = logits.double().sort(dim=1, descending=True).values
    normalizer = descending.logsumexp(dim=1, keepdim=True)
    log_p = descending - normalizer
    # of the first, `1 - p` would round to 0; all others are at most 0.5
    first = descending[:, 1:].logsumexp(dim=1, keepdim=True) - normalizer
    log_rest = torch.cat([first, torch.log1p(-log_p[:, 1:].exp())], dim=1)
    return (_GEN_POWER * (log_p + log_rest)[:, :_GEN_CLASSES]).exp().sum(dim=1)


class KnnDistance(nn.Module):
    """Distance of unit-length features to the k-th nearest of a bank, for ``evaluate`` as well.

    Args:
        bank: ``(N, D)`` float16, see ``make_bank``.
    """

    bank: Tensor
    offset: Tensor

    def __init__(self, bank: Tensor) -> None:
        super().__init__()
        self.register_buffer("bank", bank.float())
        # rounded rows are not exactly of unit length
        self.register_buffer("offset", self.bank.square().sum(dim=1) / -2, persistent=False)

    def forward(self, features: Tensor, neighbours: int) -> Tensor:
        """Return the distance ``(B,)`` float32.

        Args:
            features: ``(B, D)``.
            neighbours: k; at most N counts.
        """
        unit = functional.normalize(features.float())
        # descending as distances ascend
        similarity = torch.addmm(self.offset, unit, self.bank.T)
        count = min(neighbours, len(self.bank))
        first, last = max(count - _MARGIN, 0), min(count + _MARGIN, len(self.bank))
        candidates = similarity.topk(last, dim=1).indices[:, first:]
        # the root of 2 - 2 * similarity would lose the digits of a small distance
        distance = torch.linalg.vector_norm(unit[:, None] - self.bank[candidates], dim=2)
        nearest: Tensor = distance.topk(count - first, dim=1, largest=False).values[:, -1]
        return nearest


def make_bank(features: Tensor) -> Tensor:
    """Return ``(N, D)`` features as the kNN distance searches them: unit length, in float16."""
    return functional.normalize(features.float()).half()


class CombinedScorer(Scorer):
    """The combined score of images, in PyTorch: on any device, and it can be exported.

    Args:
        parts: What was fitted.
        bank: ``(N, D)`` float16 features of ID training images, see ``make_bank``.
    """

    kind = "combined"
    mean: Tensor
    std: Tensor

    def __init__(self, parts: CombinedParts, bank: Tensor) -> None:
        super().__init__()
        self.parts = parts
        self.layers, self.weight = parts.layers, parts.combination.weight
        self.knn_distance = KnnDistance(bank)
        self.register_buffer("mean", torch.from_numpy(parts.combination.standardization.mean))
        self.register_buffer("std", torch.from_numpy(parts.combination.standardization.std))
        self.mahalanobis, self.of_layers = parts.mahalanobis, parts.of_layers

    def forward(self, output: "Output", learned: Tensor) -> Tensor:
        """Return the score ``(B,)`` float32."""
        features = output.features
        knn_distance = self.knn_distance(features, self.parts.neighbours)
        distances = [knn_distance, self.mahalanobis(features)]
        if self.of_layers is not None:
            # rounded to float16, like the cached feature maps that it is fitted on
            maps = [output.maps[number].half().double() for number in self.layers]
            means = [item.mean(dim=(2, 3)) for item in maps]
            distances.append(self.of_layers(join_layers(features, means)))
        logs = [item.double().clamp(min=SMALLEST).log() for item in distances]
        terms = torch.stack([generalized_entropy(output.logits), *logs, learned.double()], dim=1)
        terms = (terms - self.mean) / self.std
        total: Tensor = terms[:, :-1].sum(dim=1) + self.weight * terms[:, -1]
        return total.float()

    def level(self, score: Tensor) -> Tensor:
        """Return the level of heatmaps, ``(B,)``: see ``Combination.level``."""
        return self.parts.combination.level(score)

    def local(self, places: Tensor) -> Tensor | None:
        """Return the log-odds of pixels whatever their image is: see ``Combination.local``."""
        return self.parts.combination.local(places)
