"""The ID training images nearest to given images, read from the index of a run."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ood_heatmap.pictures import Neighbour
from ood_heatmap.pipeline.run import open_index


class NearestImages:
    """Finds nearest ID images of the predicted class, and reads them.

    Searches on the CPU: a class is opened when it is first predicted.

    Args:
        run: A run directory with a finished index.

    Raises:
        OodHeatmapError: The index is missing, unfinished or damaged.
    """

    def __init__(self, run: Path) -> None:
        self._index = open_index(run)
        self._bank = self._index.bank(torch.device("cpu"))
        self._classes = self._index.results.classes

    def find(
        self, features: NDArray[np.float32], prediction: NDArray[np.integer], count: int
    ) -> list[list[Neighbour]]:
        """Return the nearest ID images of each image, nearest first.

        Args:
            features: ``(B, D)`` float32, finite.
            prediction: ``(B,)`` predicted class.
            count: Maximum number for each image.
        """
        rows, distances = self._bank.k_nearest(features, prediction, count)
        return [
            self._read(row[row >= 0], distance[row >= 0].tolist())
            for row, distance in zip(rows, distances, strict=True)
        ]

    def _read(self, rows: NDArray[np.int64], distances: Sequence[float]) -> list[Neighbour]:
        """Return ID images by their data set row."""
        positions = self._index.positions(rows)
        images, label, prediction = (
            self._index.columns[name].take(positions) for name in ("images", "label", "prediction")
        )
        # of the data set, where it is known
        classes = np.where(label >= 0, label, prediction).tolist()
        return [
            Neighbour(
                Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))),
                distance,
                self._classes[number] if self._classes else str(number),
            )
            for image, distance, number in zip(images, distances, classes, strict=True)
        ]
