"""The trained detector: returns score, decision, heatmap and predicted class of images."""

import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ood_heatmap.calibration import Calibration, num_needed
from ood_heatmap.errors import UsageError
from ood_heatmap.heatmap import pixel_score, score
from ood_heatmap.images import Transform, apply_transform

if TYPE_CHECKING:
    # only for annotations: this module calls them, but does not create them
    from ood_heatmap.classifier import Classifier, Output
    from ood_heatmap.decoder import Decoder

log = logging.getLogger(__name__)
ImageLike: TypeAlias = Image.Image | str | os.PathLike[str] | NDArray[np.uint8] | Tensor
Images: TypeAlias = ImageLike | Iterable[ImageLike]
_EXPECTED = (
    "images must be PIL images, paths, or uint8 arrays or tensors with values 0 to 255: "
    "(H, W), (H, W, 3) or (3, H, W), a list of these, or (B, H, W, 3) or (B, 3, H, W)"
)


@dataclass(frozen=True)
class Result:
    """Output of the detector for B images.

    Args:
        score: ``(B,)`` float32 in [0, 1]; larger is more OOD.
        heatmap: ``(B, C, H, W)`` float32 output of the decoder: in [-1, 1] for a signed target, in
            [0, 1] for a magnitude target.
        prediction: ``(B,)`` int64 predicted class.
        p_value: ``(B,)`` float64 in (0, 1], the share of held-out ID images that score at least as
            high; NaN without a calibration.
        is_ood: ``(B,)`` bool, the decision at the detector's false-alarm level. None without a
            calibration, or if it has fewer held-out ID images than the level needs.
    """

    score: NDArray[np.float32]
    heatmap: NDArray[np.float32]
    prediction: NDArray[np.int64]
    p_value: NDArray[np.float64]
    is_ood: NDArray[np.bool_] | None

    @property
    def pixel_score(self) -> NDArray[np.float32]:
        """``(B, H, W)`` in [0, 1], maximum of |heatmap| over channels; larger is more OOD."""
        return pixel_score(torch.from_numpy(self.heatmap)).numpy()


class HeatmapDetector:
    """A fixed classifier and its trained decoder.

    Logs a warning if the calibration has too few held-out ID images for the false-alarm level.

    Args:
        classifier: The classifier, on its device.
        decoder: The decoder, on the same device and in eval mode.
        classes: Class names, empty when unknown.
        color_max: Top of the colour scale shared by all heatmaps of this decoder.
        calibration: Scores of held-out ID images; without it there are no decisions.
        false_alarm: Share of ID images that may be called OOD.
        fingerprint: Fingerprint of the decoder in its run; empty outside a run.

    Raises:
        UsageError: ``false_alarm`` is not between 0 and 1.
    """

    def __init__(
        self,
        classifier: "Classifier",
        decoder: "Decoder",
        *,
        classes: Sequence[str] = (),
        color_max: float = 1.0,
        calibration: Calibration | None = None,
        false_alarm: float = 0.05,
        fingerprint: str = "",
    ) -> None:
        if not 0 < false_alarm < 1:
            raise UsageError(f"the false-alarm level must be between 0 and 1, got {false_alarm}.")
        self.classifier, self.decoder = classifier, decoder
        self.classes, self.color_max = tuple(classes), color_max
        self.calibration, self.false_alarm = calibration, false_alarm
        self.fingerprint = fingerprint
        if calibration is not None and not self.decides:
            log.warning(
                "no decisions: a false-alarm level of %g needs at least %d held-out ID images, the "
                "calibration has %d. Evaluate with more ID images, or choose a higher level.",
                false_alarm,
                num_needed(false_alarm),
                len(calibration.scores),
            )

    @staticmethod
    def load(
        run: str | Path,
        device: str = "auto",
        false_alarm: float | None = None,
        *,
        trust_code: bool = False,
    ) -> "HeatmapDetector":
        """Load the detector of a run directory, calibrated if the run has been evaluated.

        Args:
            run: The run directory.
            device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
            false_alarm: Share of ID images that may be called OOD; as evaluated if None.
            trust_code: Trust the model code named by the run even if it never ran on this machine.

        Raises:
            OodHeatmapError: A stage is missing, unfinished, damaged or stale; its model code is not
                trusted; or a level is given but the run is not calibrated.
        """
        # imported lazily: a detector in memory needs no code that reads run directories
        from ood_heatmap.pipeline.run import load_detector
        from ood_heatmap.user_code import trusting_code

        with trusting_code(trust_code):
            return load_detector(Path(run), device, false_alarm)

    def at(self, false_alarm: float) -> "HeatmapDetector":
        """Return the same detector with another false-alarm level; nothing is refitted."""
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
            fingerprint=self.fingerprint,
        )

    @property
    def decides(self) -> bool:
        """Whether decisions are possible: calibrated with enough held-out ID images."""
        return self.calibration is not None and self.calibration.has_threshold(self.false_alarm)

    @property
    def threshold(self) -> float:
        """The score above which an image is called OOD.

        NaN without a calibration, infinite if it has too few held-out ID images for the level.
        """
        return self.calibration.threshold(self.false_alarm) if self.calibration else math.nan

    @property
    def pixel_threshold(self) -> float:
        """The pixel score above which a pixel is called OOD; NaN or infinite as ``threshold`` is.

        At most a share ``false_alarm`` of ID images have any such pixel.
        """
        return self.calibration.pixel_threshold(self.false_alarm) if self.calibration else math.nan

    def __call__(self, images: Images) -> Result:
        """Detect OOD images of any size.

        Args:
            images: One image or several: PIL images, paths, or uint8 arrays or tensors, each
                ``(H, W)``, ``(H, W, 3)`` or ``(3, H, W)``; or a batch ``(B, H, W, 3)`` or ``(B, 3,
                H, W)``. Grey images may have one channel. Images of a list may differ in size and
                type. Ambiguous shapes are read as channels-last.

        Raises:
            UsageError: The type, dtype or shape is not supported, or there is no image.
            UnreadableImageError: A file cannot be read, or an image cannot be converted to RGB.
        """
        return self.detect(_to_pixels(images, self.classifier.config.transform))[0]

    @torch.inference_mode()
    def detect(self, pixels: NDArray[np.uint8]) -> "tuple[Result, Output]":
        """Detect OOD images in uint8 ``(B, 3, H, W)`` at the classifier's input size.

        Returns:
            The result, and the classifier's output.
        """
        output = self.classifier(torch.from_numpy(pixels).to(self.classifier.device))
        return self.decode(output), output

    @torch.inference_mode()
    def decode(self, output: "Output", *, heatmaps: bool = True) -> Result:
        """Compute heatmaps, scores and decisions from the classifier's output.

        Args:
            output: Output of the classifier, on the detector's device.
            heatmaps: Copy the heatmaps to the host; if False, the result has none.
        """
        prediction = output.logits.argmax(dim=1)
        heatmap = decode_heatmap(self.decoder, output, prediction)
        scores = score(heatmap).cpu().numpy()
        return Result(
            scores,
            heatmap[: len(heatmap) * heatmaps].cpu().numpy(),
            prediction.cpu().numpy(),
            self.p_value(scores),
            scores > self.threshold if self.decides else None,
        )

    def class_name(self, label: int) -> str:
        """Return the name of a class, or its number if class names are unknown."""
        return self.classes[label] if self.classes else str(label)

    def p_value(self, scores: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return the p-value of each score, ``(B,)``; NaN without a calibration."""
        if self.calibration is None:
            return np.full(len(scores), np.nan)
        return self.calibration.p_value(scores)


def decode_heatmap(decoder: "Decoder", output: "Output", prediction: Tensor) -> Tensor:
    """Compute the heatmap ``(B, C, H, W)`` float32 from the classifier's output."""
    # rounded to float16, like the cached feature maps in training
    maps = [feature_map.half().float() for feature_map in output.maps]
    heatmap: Tensor = decoder(output.features, prediction, maps).float()
    return heatmap


def _to_pixels(images: Images, transform: Transform) -> NDArray[np.uint8]:
    """Convert images to uint8 ``(B, 3, H, W)`` at the input size."""
    pixels = [
        apply_transform(transform, _to_picture(image), _name(image, row))
        for row, image in enumerate(_split(images))
    ]
    if not pixels:
        raise UsageError(f"there is no image; {_EXPECTED}.")
    return np.stack(pixels)


def _split(images: Images) -> Iterable[ImageLike]:
    """Return the images as an iterable, not yet validated."""
    if isinstance(images, Tensor):
        # one copy from a GPU, not one per image
        images = images.cpu()
    if isinstance(images, Tensor | np.ndarray):
        return images if images.ndim == 4 else [images]
    if isinstance(images, Image.Image | str | os.PathLike):
        return [images]
    if isinstance(images, Iterable) and not isinstance(images, Mapping | bytes | bytearray):
        return images
    raise UsageError(f"{_EXPECTED}; got {type(images).__name__}.")


def _name(image: ImageLike, row: int) -> str:
    """Return the name of an image for messages."""
    return os.fsdecode(image) if isinstance(image, str | os.PathLike) else f"image {row}"


def _to_picture(image: ImageLike) -> Image.Image:
    """Convert one image to a PIL image of any mode."""
    if isinstance(image, str | os.PathLike):
        # imported lazily: only needed for paths
        from ood_heatmap.source_folder import read_file

        return read_file(Path(image))[0]
    if isinstance(image, Image.Image):
        if 0 in image.size:
            raise UsageError(f"an image has no pixels: its size is {image.width} x {image.height}.")
        return image
    if not isinstance(image, Tensor | np.ndarray):
        raise UsageError(f"{_EXPECTED}; got {type(image).__name__} for one of them.")
    if image.dtype not in (np.uint8, torch.uint8):
        raise UsageError(
            f"{_EXPECTED}; got {image.dtype}. Undo a normalization and convert to uint8 first."
        )
    array = image.numpy(force=True) if isinstance(image, Tensor) else np.asarray(image)
    if array.ndim == 3 and array.shape[2] not in (1, 3) and array.shape[0] in (1, 3):
        array = array.transpose(1, 2, 0)
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3)):
        raise UsageError(f"{_EXPECTED}; got shape {tuple(image.shape)} for one of them.")
    if array.size == 0:
        raise UsageError(f"an image has no pixels: its shape is {tuple(image.shape)}.")
    grey = array.ndim == 3 and array.shape[2] == 1
    return Image.fromarray(np.ascontiguousarray(array[:, :, 0] if grey else array))
