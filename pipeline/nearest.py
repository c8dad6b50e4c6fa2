"""The ID training images nearest to given images, read from the index of a run."""

from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ood_heatmap.cache.neighbours import Bank
from ood_heatmap.errors import StaleCacheError
from ood_heatmap.nearest import Nearest
from ood_heatmap.pictures import Neighbour
from ood_heatmap.pipeline.run import Index, open_index


class NearestImages:
    """Finds nearest ID images of the predicted class, and reads them; thread-safe.

    The index is opened at the first search, in each process that a pickle of this arrives in.
    Searches on the CPU: a class is opened when it is first predicted.

    Args:
        run: A run directory.
        fingerprint: Fingerprint of its index.
    """

    def __init__(self, run: Path, fingerprint: str) -> None:
        # another process may have another working directory
        self._run, self._fingerprint = run.absolute(), fingerprint
        self._lock = Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return NearestImages, (self._run, self._fingerprint)

    @cached_property
    def _index(self) -> Index:
        index = open_index(self._run)
        if index.manifest.fingerprint != self._fingerprint:
            raise StaleCacheError(f"{self._run} was indexed again: load the detector again.")
        return index

    @cached_property
    def _bank(self) -> Bank:
        return self._index.bank(torch.device("cpu"))

    def search(
        self, features: NDArray[np.float32], prediction: NDArray[np.integer[Any]], count: int
    ) -> Nearest:
        """Find ID images of the predicted class of each image, or of any if it has none.

        Args:
            features: ``(B, D)`` float32; images with others than finite ones have no nearest.
            prediction: ``(B,)`` predicted class.
            count: Maximum number for each image.

        Raises:
            OodHeatmapError: The index is missing or damaged, or is another one.
        """
        row = np.full((len(features), count), -1, np.int64)
        distance = np.full(row.shape, np.inf)
        known = np.isfinite(features).all(axis=1)
        with self._lock:
            found = self._bank.k_nearest(features[known], prediction[known], count)
        row[known], distance[known] = found
        return Nearest(row, distance, self)

    def read(self, row: NDArray[np.int64], distance: NDArray[np.float64]) -> list[Neighbour]:
        """Read the ID images of one image.

        Args:
            row: ``(K,)`` their rows, as of ``search``.
            distance: ``(K,)`` their distances.
        """
        with self._lock:
            index = self._index
        classes = index.results.classes
        positions = index.positions(row[row >= 0])
        images, label, prediction = (
            index.columns[name].take(positions) for name in ("images", "label", "prediction")
        )
        # of the data set, where it is known
        numbers = np.where(label >= 0, label, prediction).tolist()
        return [
            Neighbour(
                Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))),
                far,
                classes[number] if classes else str(number),
            )
            for image, far, number in zip(images, distance[row >= 0].tolist(), numbers, strict=True)
        ]
