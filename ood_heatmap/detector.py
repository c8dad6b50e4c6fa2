"""What a user holds after training: images in; score, decision, heatmap and predicted class out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ood_heatmap.calibration import FALSE_ALARM, Calibration
from ood_heatmap.classifier import Classifier, Output
from ood_heatmap.decoder import Decoder
from ood_heatmap.errors import UsageError
from ood_heatmap.heatmap import score, strength
from ood_heatmap.images import Transform

Images = Image.Image | Sequence[Image.Image] | NDArray[np.uint8] | Tensor


@dataclass(frozen=True)
class Result:
    """What the detector says of B images.

    Args:
        score: ``(B,)`` float32 in [0, 1]; larger is more OOD.
        heatmap: ``(B, C, H, W)`` float32, as the decoder returns it: [-1, 1] signed, [0, 1]
            magnitude.
        prediction: ``(B,)`` int64 predicted class.
        p_value: ``(B,)`` float64 in (0, 1], the share of held-out ID images that score as high; NaN
            when the detector is not calibrated.
        is_ood: ``(B,)`` bool, the decision at the detector's false-alarm level; None when it is not
            calibrated.
    """

    score: NDArray[np.float32]
    heatmap: NDArray[np.float32]
    prediction: NDArray[np.int64]
    p_value: NDArray[np.float64]
    is_ood: NDArray[np.bool_] | None

    @property
    def pixel_score(self) -> NDArray[np.float32]:
        """``(B, H, W)`` in [0, 1], how OOD each pixel is: maximum of |heatmap| over channels."""
        return strength(torch.from_numpy(self.heatmap)).numpy()


class HeatmapDetector:
    """A fixed classifier and its trained decoder.

    Args:
        classifier: On its device.
        decoder: On the same device, in eval mode.
        classes: Class names, empty when unknown.
        color_max: Top of the colour scale on which all heatmaps of this decoder are drawn.
        calibration: What held-out ID images look like to it; without it there are no decisions.
        false_alarm: The share of ID images that may be called OOD.

    Raises:
        UsageError: ``false_alarm`` is not between 0 and 1.
    """

    def __init__(
        self,
        classifier: Classifier,
        decoder: Decoder,
        *,
        classes: Sequence[str] = (),
        color_max: float = 1.0,
        calibration: Calibration | None = None,
        false_alarm: float = FALSE_ALARM,
    ) -> None:
        if not 0 < false_alarm < 1:
            raise UsageError(f"the false-alarm level is between 0 and 1, got {false_alarm}.")
        self.classifier, self.decoder = classifier, decoder
        self.classes, self.color_max = tuple(classes), color_max
        self.calibration, self.false_alarm = calibration, false_alarm

    @staticmethod
    def load(
        run: str | Path, device: str = "auto", false_alarm: float | None = None
    ) -> "HeatmapDetector":
        """Return the detector of a run directory, calibrated when the run has been evaluated.

        A run names the user's own model code by its path, and that code is run: load only runs you
        trust.

        Args:
            run: The run directory.
            device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
            false_alarm: The share of ID images that may be called OOD; as evaluated when None.

        Raises:
            OodHeatmapError: A stage is missing, unfinished, damaged or stale; or a level is asked
                for and the run is not calibrated.
        """
        # not at the top: a detector in memory needs nothing that reads run directories
        from ood_heatmap.pipeline.run import load_detector

        return load_detector(Path(run), device, false_alarm)

    def at(self, false_alarm: float) -> "HeatmapDetector":
        """Return the same detector deciding at another level; nothing is fitted or loaded again."""
        return self.calibrated(self.calibration, false_alarm)

    def calibrated(self, calibration: Calibration | None, false_alarm: float) -> "HeatmapDetector":
        """Return the same detector with another calibration."""
        return HeatmapDetector(
            self.classifier,
            self.decoder,
            classes=self.classes,
            color_max=self.color_max,
            calibration=calibration,
            false_alarm=false_alarm,
        )

    @property
    def threshold(self) -> float:
        """The score above which an image is called OOD; NaN when not calibrated."""
        return self.calibration.threshold(self.false_alarm) if self.calibration else math.nan

    @property
    def pixel_threshold(self) -> float:
        """The strength above which a pixel is called OOD; NaN when not calibrated.

        At most a share ``false_alarm`` of ID images have any such pixel.
        """
        return self.calibration.pixel_threshold(self.false_alarm) if self.calibration else math.nan

    def __call__(self, images: Images) -> Result:
        """Detect on images of any size.

        Args:
            images: A PIL image or several; or uint8 ``(H, W, 3)``, ``(B, H, W, 3)`` or ``(B, 3, H,
                W)``.

        Raises:
            UsageError: Another dtype or shape.
        """
        return self.detect(to_pixels(images, self.classifier.config.transform))[0]

    @torch.inference_mode()
    def detect(self, pixels: NDArray[np.uint8]) -> tuple[Result, Output]:
        """Detect on uint8 ``(B, 3, H, W)`` of the classifier's input size.

        Return what the classifier says too.
        """
        output = self.classifier(torch.from_numpy(pixels).to(self.classifier.device))
        return self.decode(output), output

    @torch.inference_mode()
    def decode(self, output: Output) -> Result:
        """Return the heatmaps of what the classifier says, and what they say."""
        prediction = output.logits.argmax(dim=1)
        heatmap = heatmap_of(self.decoder, output, prediction)
        scores = score(heatmap).cpu().numpy()
        return Result(
            scores,
            heatmap.cpu().numpy(),
            prediction.cpu().numpy(),
            self.p_value(scores),
            scores > self.threshold if self.calibration else None,
        )

    def class_name(self, label: int) -> str:
        """Return the name of a class, or its number when the classes have no names."""
        return self.classes[label] if self.classes else str(label)

    def p_value(self, scores: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return the p-value of each score, ``(B,)``; NaN when not calibrated."""
        if self.calibration is None:
            return np.full(len(scores), np.nan)
        return self.calibration.p_value(scores)


def heatmap_of(decoder: Decoder, output: Output, prediction: Tensor) -> Tensor:
    """Return the heatmap ``(B, C, H, W)`` float32 of what the classifier says."""
    # through float16, as the decoder has seen feature maps in training
    maps = [item.half().float() for item in output.maps]
    heatmap: Tensor = decoder(output.features, prediction, maps).float()
    return heatmap


def to_pixels(images: Images, transform: Transform) -> NDArray[np.uint8]:
    """Return images as uint8 ``(B, 3, H, W)`` at the input size."""
    if isinstance(images, Image.Image):
        images = [images]
    if isinstance(images, Tensor):
        images = images.cpu().numpy()
    if isinstance(images, np.ndarray):
        images = [Image.fromarray(item) for item in channels_last(images)]
    return np.stack([transform(item) for item in images])


def channels_last(array: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return an array of images as ``(B, H, W, 3)``."""
    if array.dtype != np.uint8:
        raise UsageError(f"images must be uint8 with values 0 to 255, got {array.dtype}.")
    if array.ndim == 3:
        array = array[None]
    if array.ndim != 4 or 3 not in (array.shape[1], array.shape[3]):
        raise UsageError(f"images must be (B, H, W, 3) or (B, 3, H, W), got shape {array.shape}.")
    if array.shape[3] != 3:
        array = array.transpose(0, 2, 3, 1)
    return np.ascontiguousarray(array)
