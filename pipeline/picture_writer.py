"""Draws and writes the pictures of ``predict``."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ood_heatmap.cache.files import make_directory, replacing
from ood_heatmap.detector import HeatmapDetector, Result
from ood_heatmap.errors import OodHeatmapError
from ood_heatmap.heatmap import pixel_score
from ood_heatmap.images import ImageSet, to_rgb
from ood_heatmap.pictures import ColorScale, Decision, Neighbour, draw_overlay, draw_panel
from ood_heatmap.pipeline.result_folder import HEATMAPS, JPEG_SUFFIXES, PICTURES


@dataclass(frozen=True)
class Scored:
    """A batch of images and the detector's result.

    Args:
        rows: ``(B,)`` positions in the list of images.
        digests: sha256 of each image's bytes.
        result: Result of the detector.
        is_finite: ``(B,)`` bool, False where the classifier returned NaN or infinity.
        neighbours: Nearest ID images of each image, if asked for; none where not finite.
    """

    rows: NDArray[np.int64]
    digests: Sequence[bytes]
    result: Result
    is_finite: NDArray[np.bool_]
    neighbours: Sequence[Sequence[Neighbour]]


@dataclass(frozen=True)
class PictureWriter:
    """Draws and writes pictures and raw heatmaps; thread-safe.

    Args:
        detector: The detector that scored the images.
        images: The images.
        folder: Folder of the results.
        names: Path of each image's picture in the folder of pictures.
        is_panel: Draw panels, not overlays alone.
    """

    detector: HeatmapDetector
    images: ImageSet
    folder: Path
    names: Sequence[str]
    is_panel: bool

    def write(self, scored: Scored, i: int) -> tuple[str, str]:
        """Write the picture and raw heatmap of an image.

        Args:
            scored: The batch.
            i: Position of the image in the batch.

        Returns:
            Paths of both in the folder of the results.

        Raises:
            OodHeatmapError: The image has changed, or a file cannot be written.
        """
        name = self.names[int(scored.rows[i])]
        picture_name, heatmap_name = f"{PICTURES}/{name}", f"{HEATMAPS}/{name}.npy"
        picture_path, heatmap_path = self.folder / picture_name, self.folder / heatmap_name
        for path in (picture_path, heatmap_path):
            make_directory(path.parent)
        picture = self._draw(scored, i)
        with replacing(picture_path) as scratch:
            if picture_path.suffix.lower() in JPEG_SUFFIXES:
                # colours at full resolution: the heatmap and its legend are compared
                picture.save(scratch, "jpeg", quality=92, subsampling=0)
            else:
                picture.save(scratch, "png", compress_level=1)
        with replacing(heatmap_path) as scratch, scratch.open("wb") as file:
            # a strided array would be written value by value
            np.save(file, np.ascontiguousarray(scored.result.heatmap[i]))
        return picture_name, heatmap_name

    def _draw(self, scored: Scored, i: int) -> Image.Image:
        """Draw the picture of an image, read again: batches have no photos at full size."""
        image, digest = self.images.read(int(scored.rows[i]))
        if digest != scored.digests[i]:
            raise OodHeatmapError("changed since it was scored")
        photo = to_rgb(image)
        detector, result = self.detector, scored.result
        pixels = pixel_score(torch.from_numpy(result.heatmap[i : i + 1]))[0].numpy()
        box = detector.classifier.config.transform.seen_box(*photo.size)
        scale = ColorScale(detector.color_max, detector.pixel_threshold)
        if not self.is_panel:
            return draw_overlay(photo, pixels, box, scale)
        decision = Decision(
            float(result.score[i]),
            detector.class_name(int(result.prediction[i])),
            None if result.is_ood is None else bool(result.is_ood[i]),
            threshold=detector.threshold,
            false_alarm=detector.false_alarm,
            p_value=float(result.p_value[i]),
            confidence=float(result.confidence[i]),
        )
        return draw_panel(photo, pixels, box, scale, decision, scored.neighbours[i])
