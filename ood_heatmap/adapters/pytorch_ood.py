"""The detector as a ``Detector`` of pytorch-ood, for its benchmarks and metrics."""

from pathlib import Path

import torch
from pytorch_ood.api import Detector
from torch import Tensor

from ood_heatmap.detector import HeatmapDetector
from ood_heatmap.images import Transform


class PytorchOodDetector(Detector):  # type: ignore[misc]
    """A trained detector with pytorch-ood's interface; larger scores are more OOD, as there.

    Give data sets the attribute ``transform``: then images are resized and cropped as in training.

    Args:
        detector: A trained detector.
    """

    def __init__(self, detector: HeatmapDetector) -> None:
        self.detector = detector

    @classmethod
    def load(cls, run: str | Path, device: str = "auto") -> "PytorchOodDetector":
        """Load the detector of a run directory, see ``HeatmapDetector.load``."""
        return cls(HeatmapDetector.load(run, device))

    @property
    def transform(self) -> Transform:
        """Makes uint8 ``(3, H, W)`` of a PIL image."""
        return self.detector.transform

    def predict(self, x: Tensor) -> Tensor:
        """Return the OOD score ``(B,)`` of each image, on the detector's device.

        Args:
            x: ``(B, 3, H, W)``: uint8 of any size, or floats of the input size, normalized with the
                mean and std of the classifier.

        Raises:
            UsageError: Another dtype, shape or range.
        """
        normalized = x.is_floating_point()
        return self.detector(x, normalized=normalized, output="torch").score

    @property
    def device(self) -> torch.device:
        """The device of the detector."""
        return self.detector.device

    def to(self, device: str | torch.device) -> "PytorchOodDetector":
        """Move the detector to a device; return self."""
        self.detector.to(device)
        return self
