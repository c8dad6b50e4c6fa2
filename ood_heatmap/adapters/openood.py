"""The detector as a postprocessor of OpenOOD, for its ``Evaluator``."""

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from ood_heatmap.detector import HeatmapDetector
from ood_heatmap.images import Transform

try:
    from openood.postprocessors import BasePostprocessor
except ImportError:
    # OpenOOD is on no package index; without it the class has the same interface
    BasePostprocessor = object

_Arrays: TypeAlias = tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]


class HeatmapPostprocessor(BasePostprocessor):  # type: ignore[misc]
    """Predictions and confidences of a trained detector, with OpenOOD's interface.

    Confidences are negative OOD scores: larger is more ID. Give the ``Evaluator`` the attributes
    ``net`` and ``transform`` (as ``net`` and ``preprocessor``): then accuracy is that of the run's
    classifier, and images are resized and cropped as in training.

    Args:
        detector: A trained detector.

    Source: Yang et al., OpenOOD, NeurIPS 2022 Datasets and Benchmarks; the interface is that of
        its ``BasePostprocessor``.
    """

    # no hyperparameters to search
    APS_mode = False
    hyperparam_search_done = True

    def __init__(self, detector: HeatmapDetector) -> None:
        self.detector = detector
        self.config = None

    @property
    def net(self) -> nn.Module:
        """The run's classifier; returns logits."""
        return _Logits(self.detector)

    @property
    def transform(self) -> Transform:
        """Makes uint8 ``(3, H, W)`` of a PIL image."""
        return self.detector.transform

    def setup(self, net: nn.Module, id_loader_dict: object, ood_loader_dict: object) -> None:
        """Do nothing: the detector is trained."""

    def postprocess(self, net: nn.Module, data: Tensor) -> tuple[Tensor, Tensor]:
        """Return predicted class ``(B,)`` and confidence ``(B,)``, on the detector's device.

        Args:
            net: Not used: the detector has the classifier that it was trained with.
            data: ``(B, 3, H, W)``: uint8 of any size, or floats of the input size, normalized with
                the mean and std of the classifier.
        """
        normalized = data.is_floating_point()
        result = self.detector(data, normalized=normalized, output="torch")
        return result.prediction, -result.score

    def inference(
        self, net: nn.Module, data_loader: Iterable[Mapping[str, Any]], progress: bool = True
    ) -> _Arrays:
        """Return predicted class, confidence and label ``(N,)`` of all images of a loader.

        Args:
            net: Not used.
            data_loader: Yields batches with ``data`` and ``label``.
            progress: Show a progress bar.
        """
        batches = []
        for batch in tqdm(data_loader, disable=not progress):
            prediction, confidence = self.postprocess(net, batch["data"])
            batches.append((prediction.cpu(), confidence.cpu().double(), batch["label"].cpu()))
        prediction, confidence, label = (torch.cat(column) for column in zip(*batches, strict=True))
        return prediction.numpy(), confidence.numpy(), label.numpy().astype(np.int64)


class _Logits(nn.Module):
    """A detector's classifier on images of either dtype."""

    def __init__(self, detector: HeatmapDetector) -> None:
        super().__init__()
        self.classifier = detector.classifier

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(images).logits
        return logits
