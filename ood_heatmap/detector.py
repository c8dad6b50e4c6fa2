"""The trained detector: returns score, decision, heatmap and predicted class of images."""

import copy
import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ood_heatmap.calibration import Calibration, num_needed
from ood_heatmap.errors import UsageError
from ood_heatmap.images import Transform
from ood_heatmap.nearest import IdImages, Nearest
from ood_heatmap.pixels import ImageLike, Images, iter_pixels
from ood_heatmap.result import Detection, Result, Scale, TensorResult
from ood_heatmap.scorer import HeatmapScorer, Scorer

if TYPE_CHECKING:
    # only for annotations: this module calls them, but does not create them
    from ood_heatmap.classifier import Classifier, Output
    from ood_heatmap.decoder import Decoder

__all__ = [
    "Detection",
    "HeatmapDetector",
    "ImageLike",
    "Images",
    "Nearest",
    "Result",
    "TensorResult",
]

log = logging.getLogger(__name__)
_BATCH_SIZE = 64
# nearest ID images of an image at most
_MAX_NEAREST = 5


class HeatmapDetector:
    """A fixed classifier and its trained decoder.

    Logs a warning if the calibration has too few held-out ID images for the false-alarm level.

    Args:
        classifier: The classifier, on its device.
        decoder: The decoder, on the same device and in eval mode.
        scorer: Computes the score of an image, on the same device; that of the decoder if None.
        classes: Class names, empty when unknown.
        color_max: Top of the colour scale shared by all heatmaps of this decoder.
        calibration: Scores of held-out ID images; without it there are no decisions.
        false_alarm: Share of ID images that may be called OOD.
        fingerprint: Fingerprint of the decoder in its run; empty outside a run.
        id_images: Finds the nearest ID training images; None without a run.

    Raises:
        UsageError: ``false_alarm`` is not between 0 and 1.
    """

    def __init__(
        self,
        classifier: "Classifier",
        decoder: "Decoder",
        *,
        scorer: Scorer | None = None,
        classes: Sequence[str] = (),
        color_max: float = 1.0,
        calibration: Calibration | None = None,
        false_alarm: float = 0.05,
        fingerprint: str = "",
        id_images: IdImages | None = None,
    ) -> None:
        if not 0 < false_alarm < 1:
            raise UsageError(f"the false-alarm level must be between 0 and 1, got {false_alarm}.")
        self.classifier, self.decoder, self.scorer = classifier, decoder, scorer or HeatmapScorer()
        self.classes, self.color_max = tuple(classes), color_max
        self.calibration, self.false_alarm = calibration, false_alarm
        self.fingerprint, self.id_images = fingerprint, id_images
        if calibration is not None and not self.decides:
            log.warning(
                "no decisions: a false-alarm level of %g needs at least %d held-out ID images, the "
                "calibration has %d. Evaluate with more ID images, or choose a higher level.",
                false_alarm,
                num_needed(false_alarm),
                len(calibration.scores),
            )

    def __reduce__(self) -> tuple[Any, ...]:
        arguments = {
            "scorer": copy.deepcopy(self.scorer).cpu(),
            "classes": self.classes,
            "color_max": self.color_max,
            "calibration": self.calibration,
            "false_alarm": self.false_alarm,
            "fingerprint": self.fingerprint,
            "id_images": self.id_images,
        }
        decoder = copy.deepcopy(self.decoder).cpu()
        return _rebuild, (self.classifier, decoder, arguments, str(self.device))

    def __repr__(self) -> str:
        config = self.classifier.config
        parts = [config.spec, f"{self.classifier.num_classes} classes", str(self.device)]
        parts.append(f"{config.transform.size} px")
        if self.calibration is None:
            parts.append("not calibrated")
        else:
            parts.append(f"threshold {self.threshold:.4g} at level {self.false_alarm:g}")
        return f"HeatmapDetector({', '.join(parts)})"

    @staticmethod
    def load(
        run: str | Path,
        device: str = "auto",
        false_alarm: float | None = None,
        *,
        trust_code: bool = False,
        network: nn.Module | None = None,
    ) -> "HeatmapDetector":
        """Load the detector of a run or bundle, calibrated if the run has been evaluated.

        Args:
            run: The run directory, or a file written by ``ood-heatmap bundle``.
            device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
            false_alarm: Share of ID images that may be called OOD; as evaluated if None.
            trust_code: Trust the model code named by the run even if it never ran on this machine.
            network: The network that the run was made with, if that was passed from Python.

        Raises:
            OodHeatmapError: A stage is missing, unfinished, damaged or stale; its model code is not
                trusted; or a level is given but the run is not calibrated.
        """
        # imported lazily: a detector in memory needs no code that reads run directories
        from ood_heatmap.in_memory import passing_network
        from ood_heatmap.pipeline.load import load_detector
        from ood_heatmap.user_code import trusting_code

        with trusting_code(trust_code), passing_network(network):
            return load_detector(Path(run), device, false_alarm)

    def at(self, false_alarm: float) -> "HeatmapDetector":
        """Return the same detector with another false-alarm level; nothing is refitted."""
        return self.calibrated(self.calibration, false_alarm)

    def calibrated(self, calibration: Calibration | None, false_alarm: float) -> "HeatmapDetector":
        """Return the same detector with another calibration."""
        return HeatmapDetector(
            self.classifier,
            self.decoder,
            scorer=self.scorer,
            classes=self.classes,
            color_max=self.color_max,
            calibration=calibration,
            false_alarm=false_alarm,
            fingerprint=self.fingerprint,
            id_images=self.id_images,
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

    @property
    def transform(self) -> Transform:
        """Resizes and crops a PIL image to uint8 ``(3, H, W)`` at the input size.

        For a data set with several workers: ``ImageFolder(root, transform=detector.transform)``.
        """
        return self.classifier.config.transform

    @property
    def device(self) -> torch.device:
        """The device of the detector."""
        return self.classifier.device

    def to(self, device: torch.device | str) -> "HeatmapDetector":
        """Move the detector, and all made of it with ``at``, to a device; return it.

        Raises:
            UsageError: There is no such device; nothing has moved.
        """
        try:
            torch.empty(0, device=device)
        # the latter where PyTorch was built without CUDA
        except (RuntimeError, AssertionError) as error:
            reason = str(error).partition("\n")[0].rstrip(".")
            raise UsageError(f"there is no device {str(device)!r} here ({reason}).") from error
        for module in (self.classifier, self.decoder, self.scorer):
            module.to(device)
        return self

    @overload
    def __call__(
        self,
        images: Images,
        *,
        batch_size: int = ...,
        normalized: bool = ...,
        output: Literal["numpy"] = ...,
        nearest: int = ...,
    ) -> Result: ...
    @overload
    def __call__(
        self,
        images: Images,
        *,
        batch_size: int = ...,
        normalized: bool = ...,
        output: Literal["torch"],
    ) -> TensorResult: ...
    def __call__(
        self,
        images: Images,
        *,
        batch_size: int = _BATCH_SIZE,
        normalized: bool = False,
        output: Literal["numpy", "torch"] = "numpy",
        nearest: int = 0,
    ) -> Result | TensorResult:
        """Detect OOD images of any size.

        Several threads may call the same detector.

        Args:
            images: One image or several: PIL images, paths, or uint8 arrays or tensors on any
                device, each ``(H, W)``, ``(H, W, 3)`` or ``(3, H, W)``; or a batch ``(B, H, W, 3)``
                or ``(B, 3, H, W)``. Grey images may have one channel. Images of a list may differ
                in size and type. Ambiguous shapes are read as channels-last.
            batch_size: Maximum number of images in a forward pass.
            normalized: The images are floats ``(B, 3, H, W)`` or ``(3, H, W)`` of the input size,
                normalized with the mean and std of ``detector.classifier.config``, as a data
                loader yields them.
            output: ``numpy`` for arrays on the host, ``torch`` for tensors on the detector's
                device.
            nearest: Number of nearest ID training images to find for each image, at most 5. Needs
                the run, and arrays as output.

        Raises:
            UsageError: The type, dtype or shape is not supported, there is no image, or nearest ID
                images are asked for that cannot be found.
            UnreadableImageError: A file cannot be read, or an image cannot be converted to RGB.
        """
        if output not in ("numpy", "torch"):
            raise UsageError(f"output must be 'numpy' or 'torch', got {output!r}.")
        id_images = self._id_images(nearest, output)
        batches = iter_pixels(
            images,
            self.classifier.config,
            batch_size=batch_size,
            normalized=normalized,
            keep_sources=output == "numpy",
        )
        results: list[TensorResult] = []
        found: list[Nearest] = []
        sources: list[ImageLike] = []
        for batch in batches:
            classified = self._classify(batch.pixels)
            result = self._decode(classified)
            if id_images is not None:
                arrays = (classified.features.cpu().numpy(), result.prediction.cpu().numpy())
                found.append(id_images.search(*arrays, int(nearest)))
            # heatmaps of many images need not fit on a GPU
            results.append(result.to("cpu") if output == "numpy" else result)
            sources += batch.sources
        joined = TensorResult.concatenate(results)
        if output == "torch":
            return joined
        return joined.to_numpy(
            scale=self.scale,
            images=sources,
            is_transformed=batch.is_transformed,
            nearest=Nearest.concatenate(found) if found else None,
        )

    def _id_images(self, nearest: int, output: str) -> IdImages | None:
        """Return what finds nearest ID images, if any are asked for."""
        if nearest not in range(_MAX_NEAREST + 1):
            raise UsageError(f"nearest must be 0 to {_MAX_NEAREST}, got {nearest!r}.")
        if not nearest:
            return None
        if self.id_images is None:
            raise UsageError(
                "nearest= needs ID images, and neither a bundle nor a detector made in memory has "
                "any: load the detector from its run directory."
            )
        if output != "numpy":
            raise UsageError("nearest= needs output='numpy'.")
        return self.id_images

    def detect(self, pixels: NDArray[np.uint8]) -> "tuple[Result, Output]":
        """Detect OOD images in uint8 ``(B, 3, H, W)`` at the classifier's input size.

        Returns:
            The result, and the classifier's output.
        """
        output = self._classify(torch.from_numpy(pixels))
        return self._decode(output).to_numpy(scale=self.scale), output

    def decode(self, output: "Output", *, heatmaps: bool = True) -> Result:
        """Compute heatmaps, scores and decisions from the classifier's output.

        Args:
            output: Output of the classifier, on the detector's device.
            heatmaps: Copy the heatmaps to the host; if False, the result has none.
        """
        result = self._decode(output)
        if not heatmaps:
            result = replace(result, heatmap=result.heatmap[:0])
        return result.to_numpy(scale=self.scale)

    def _classify(self, pixels: Tensor) -> "Output":
        """Run the classifier on uint8 or normalized float images."""
        output: Output = self.classifier(pixels.to(self.device))
        return output

    # not inference_mode: a caller may modify the tensors in place
    @torch.no_grad()
    def _decode(self, output: "Output") -> TensorResult:
        """Compute everything from the classifier's output, on its device."""
        confidence, prediction = output.logits.softmax(dim=1).max(dim=1)
        heatmap, scores = decode(self.decoder, self.scorer, output, prediction)
        on_host = scores.cpu().numpy()
        return TensorResult(
            score=scores,
            heatmap=heatmap,
            prediction=prediction,
            p_value=torch.from_numpy(self.p_value(on_host)).to(scores.device),
            is_ood=scores > self.threshold if self.decides else None,
            confidence=confidence,
        )

    @property
    def scale(self) -> Scale:
        """Names, thresholds and colours that all results have in common."""
        return Scale(
            self.classes,
            self.false_alarm,
            self.threshold,
            self.pixel_threshold,
            self.color_max,
            self.transform,
        )

    def class_name(self, label: int) -> str:
        """Return the name of a class, or its number if class names are unknown."""
        return self.scale.class_name(label)

    def p_value(self, scores: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return the p-value of each score, ``(B,)``; NaN without a calibration."""
        if self.calibration is None:
            return np.full(len(scores), np.nan)
        return self.calibration.p_value(scores)


def _rebuild(
    classifier: "Classifier", decoder: "Decoder", arguments: dict[str, Any], device: str
) -> HeatmapDetector:
    """Rebuild a pickled detector on its device, or on the CPU of a machine without it."""
    detector = HeatmapDetector(classifier, decoder, **arguments)
    kind = torch.device(device)
    if kind.type == "cuda" and (kind.index or 0) >= torch.cuda.device_count():
        log.warning("this machine has no %s: the detector is on the CPU", device)
        return detector.to("cpu")
    return detector.to(kind)


def decode(
    decoder: "Decoder", scorer: Scorer, output: "Output", prediction: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute heatmaps ``(B, C, H, W)`` and image scores ``(B,)`` from the classifier's output."""
    places, learned = run_decoder(decoder, output, prediction)
    score: Tensor = scorer(output, learned)
    return decoder.heatmap(places, scorer.level(score), scorer.local(places)), score


def run_decoder(decoder: "Decoder", output: "Output", prediction: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``Decoder.detect`` of the classifier's output."""
    # rounded to float16, like the cached feature maps in training
    count = len(decoder.config.map_shapes)
    maps = [feature_map.half().float() for feature_map in output.maps[:count]]
    return decoder.detect(output.features, prediction, maps)
