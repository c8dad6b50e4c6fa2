"""What a user holds after training: images in; score, heatmap and predicted class out."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ood_heatmap.classifier import Classifier, Output
from ood_heatmap.decoder import Decoder
from ood_heatmap.devices import choose_device
from ood_heatmap.errors import UsageError
from ood_heatmap.heatmap import score, strength
from ood_heatmap.images import Transform
from ood_heatmap.pipeline.index import Index, open_classifier_of
from ood_heatmap.pipeline.train import open_decoder

Images = Image.Image | Sequence[Image.Image] | NDArray[np.uint8] | Tensor


@dataclass(frozen=True)
class Result:
    """What the detector says of B images.

    Args:
        score: ``(B,)`` float32 in [0, 1]; larger is more OOD.
        heatmap: ``(B, C, H, W)`` float32, as the decoder returns it: [-1, 1] signed, [0, 1]
            magnitude.
        prediction: ``(B,)`` int64 predicted class.
    """

    score: NDArray[np.float32]
    heatmap: NDArray[np.float32]
    prediction: NDArray[np.int64]

    @property
    def strength(self) -> NDArray[np.float32]:
        """``(B, H, W)`` in [0, 1].

        How OOD each pixel is, the maximum over channels of ``|heatmap|``.
        """
        return strength(torch.from_numpy(self.heatmap)).numpy()


class HeatmapDetector:
    """A fixed classifier and its trained decoder.

    Args:
        classifier: On its device.
        decoder: On the same device, in eval mode.
        classes: Class names, empty when unknown.
        color_max: Top of the colour scale on which all heatmaps of this decoder are drawn.
    """

    def __init__(
        self,
        classifier: Classifier,
        decoder: Decoder,
        *,
        classes: Sequence[str] = (),
        color_max: float = 1.0,
    ) -> None:
        self.classifier, self.decoder = classifier, decoder
        self.classes, self.color_max = tuple(classes), color_max

    @staticmethod
    def load(run: str | Path, device: str = "auto") -> "HeatmapDetector":
        """Return the detector of a run directory.

        A run names the user's own model code by its path, and that code is run: load only runs you
        trust.

        Raises:
            OodHeatmapError: A stage is missing, unfinished, damaged or stale.
        """
        run = Path(run)
        index = open_classifier_of(run)
        return detector_of(run, index, choose_device(device))

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
        """Return the heatmaps of what the classifier says."""
        prediction = output.logits.argmax(dim=1)
        # through float16, as the decoder has seen feature maps in training
        maps = [item.half().float() for item in output.maps]
        heatmap = self.decoder(output.features, prediction, maps).float()
        return Result(score(heatmap).cpu().numpy(), heatmap.cpu().numpy(), prediction.cpu().numpy())


def detector_of(run: Path, index: Index, device: torch.device) -> HeatmapDetector:
    """Return the detector of an opened index."""
    trained = open_decoder(run, index.manifest, device)
    num_maps = len(trained.decoder.config.map_shapes)
    return HeatmapDetector(
        index.classifier(device, num_maps=num_maps),
        trained.decoder,
        classes=index.manifest.results["classes"],
        color_max=trained.manifest.results["color_max"],
    )


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
