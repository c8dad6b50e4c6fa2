"""What the methods of ``evaluate`` are fitted on: outputs of the classifier, from the caches."""

import copy
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from ood_heatmap.baselines import FitData, Outputs, choose_neighbours
from ood_heatmap.cache.shards import Rows
from ood_heatmap.classifier import Classifier
from ood_heatmap.pipeline.config import EvaluateConfig, TrainConfig
from ood_heatmap.pipeline.ranges import spatial_statistics
from ood_heatmap.pipeline.run import Index, Targets, map_column, read_manifest
from ood_heatmap.sanity import Finding, check_fits

_Float32 = NDArray[np.float32]
_Int64 = NDArray[np.int64]

# maximum number of ID images, and of OOD images, that methods are fitted on
_MAX_FIT = 50_000
# maximum number of ID images that the kNN score searches
_MAX_BANK = 50_000
# cached rows whose feature maps are in memory at once
_ROWS_PER_CHUNK = 256
# relative difference below which spatial means are the features
_SAME = 0.01


def bank_rows(index: Index, seed: int) -> _Int64:
    """Return the positions of the ID images that the kNN score searches, ascending.

    A sample tells OOD images as well as all images do, if k is in proportion.

    Source: Sun et al., Out-of-Distribution Detection with Deep Nearest Neighbors, ICML 2022.
    """
    return sample(np.arange(index.results.num_images), seed, _MAX_BANK)


def _bank_counts(index: Index, seed: int) -> list[int]:
    """Return the number of these images that are predicted as each class."""
    prediction = index.columns["prediction"].take(bank_rows(index, seed))
    counts: list[int] = np.bincount(prediction, minlength=index.results.num_classes).tolist()
    return counts


def num_neighbours(index: Index, config: EvaluateConfig) -> int:
    """Return k of the kNN score: the setting, or chosen from the class sizes in the bank."""
    if config.neighbours is None:
        return choose_neighbours(_bank_counts(index, config.seed))
    return min(config.neighbours, index.results.num_images, _MAX_BANK)


def fit_data(
    index: Index, targets: Targets, classifier: Classifier, num_maps: int, seed: int
) -> FitData:
    """Return the cached data that the methods are fitted on.

    Args:
        index: The ID training images.
        targets: The auxiliary OOD images.
        classifier: The classifier; returns all feature maps of the index.
        num_maps: Number of feature maps that the decoder uses.
        seed: Random seed.
    """
    rows = sample(np.arange(len(index.columns["row"])), seed)
    label = index.columns["label"].take(rows)
    # patched images are partly ID
    paired = np.flatnonzero(targets.columns["patched"].read() == 0)
    id_outputs, ood_outputs = (
        _read_outputs(stage.columns, chosen, index.results.map_shapes, num_maps)
        for stage, chosen in ((index, rows), (targets, sample(paired, seed)))
    )
    known = (label >= 0) & bool(index.results.classes)
    return FitData(
        id_outputs,
        np.where(known, label, id_outputs.prediction),
        ood_outputs,
        copy.deepcopy(classifier.last_layer()).cpu(),
        _layers(id_outputs, classifier),
        _training_noise(index),
        seed,
    )


def _training_noise(index: Index) -> float:
    """Return the noise on the inputs of the run's decoder in training."""
    options = read_manifest(index.run, "decoder").inputs["options"]
    return float(options.get("noise", TrainConfig.noise))


def _read_outputs(
    columns: Mapping[str, Rows], rows: _Int64, shapes: Sequence[Sequence[int]], num_maps: int
) -> Outputs:
    """Return cached outputs of the classifier, with the means of all cached feature maps.

    Args:
        columns: Of stage 1 or 2.
        rows: The rows.
        shapes: ``(C, h, w)`` of each cached feature map.
        num_maps: Number of feature maps that the decoder uses.
    """
    spatial = []
    for number, (width, _, _) in enumerate(shapes):
        column = columns[map_column(number)]
        statistics = np.empty((len(rows), 2, width), np.float32)
        for start in range(0, len(rows), _ROWS_PER_CHUNK):
            # PyTorch converts float16 in a tenth of NumPy's time
            maps = torch.from_numpy(column.take(rows[start : start + _ROWS_PER_CHUNK]))
            statistics[start : start + _ROWS_PER_CHUNK] = spatial_statistics(maps).numpy()
        spatial.append(statistics)
    features, prediction = (columns[name].take(rows) for name in ("features", "prediction"))
    return to_outputs(features, prediction, spatial, shapes, num_maps)


def to_outputs(
    features: _Float32,
    prediction: NDArray[np.int32],
    spatial: Sequence[_Float32],
    shapes: Sequence[Sequence[int]],
    num_maps: int,
) -> Outputs:
    """Return what the methods use.

    Args:
        features: ``(B, D)``.
        prediction: ``(B,)``.
        spatial: ``(B, 2, C)`` of each feature map, see ``ranges.spatial_statistics``.
        shapes: ``(C, h, w)`` of each feature map.
        num_maps: Number of feature maps that the decoder uses; without any it gets no deviations.
    """
    std = np.empty((len(features), 0), np.float32)
    if num_maps:
        _, height, width = shapes[0]
        std = np.sqrt(spatial[0][:, 1] / max(height * width - 1, 1))
    return Outputs(features, prediction, [item[:, 0] for item in spatial], std)


def _layers(outputs: Outputs, classifier: Classifier) -> list[int]:
    """Return the numbers of the feature maps whose spatial mean is a layer beside the features.

    Not a projected map: it is stored less its mean, and the direction of a vector, by which layers
    are compared, is another without it. On CIFAR-10 that costs 3 points of AUROC on far OOD.
    """
    return [
        number
        for number, (name, means) in enumerate(
            zip(classifier.map_names, outputs.map_means, strict=True)
        )
        if name not in classifier.projections() and not _is_same(means, outputs.features)
    ]


def _is_same(means: _Float32, features: _Float32) -> bool:
    """Return whether spatial means of a map are the features, but for its rounding to float16."""
    if means.shape != features.shape:
        return False
    return bool(np.linalg.norm(means - features) < _SAME * np.linalg.norm(features))


def check_methods(index: Index, targets: Targets, config: EvaluateConfig) -> list[Finding]:
    """Check that the cached data suit all methods."""
    num_images = index.results.num_images
    some = np.arange(0, num_images, -(-num_images // 1000))
    return check_fits(
        index.columns["features"].take(some),
        min(num_images, _MAX_FIT),
        targets.results.num_images,
        num_neighbours(index, config),
        _bank_counts(index, config.seed),
    )


def sample(rows: _Int64, seed: int, count: int = _MAX_FIT) -> _Int64:
    """Return at most ``count`` of the rows, ascending: all, or a seeded sample."""
    if len(rows) <= count:
        return rows
    return np.sort(np.random.default_rng(seed).choice(rows, count, replace=False))
