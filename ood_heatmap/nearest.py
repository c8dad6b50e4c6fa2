"""The nearest ID training images of images: rows and distances, and what finds and reads them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    # drawing needs matplotlib's fonts, and is imported where it is called
    from ood_heatmap.pictures import Neighbour

# of some rows of a result
Selection: TypeAlias = (
    slice | Sequence[int] | Sequence[bool] | NDArray[np.bool_] | NDArray[np.integer[Any]]
)


@dataclass(frozen=True)
class Nearest:
    """The nearest ID training images of B images, in the classifier's feature space.

    Args:
        row: ``(B, K)`` int64 rows of the ID training set, nearest first; they have the predicted
            class of the image, unless no ID image has. -1 where the class has fewer images.
        distance: ``(B, K)`` float64 Euclidean distances of the features; infinite there.
        id_images: Reads them, for pictures.
    """

    row: NDArray[np.int64]
    distance: NDArray[np.float64]
    id_images: "IdImages | None" = None

    def __getitem__(self, selected: Selection) -> "Nearest":
        return replace(self, row=self.row[selected], distance=self.distance[selected])

    @staticmethod
    def concatenate(parts: Sequence["Nearest"]) -> "Nearest":
        """Join the results of batches, at least one."""
        return replace(
            parts[0],
            row=np.concatenate([part.row for part in parts]),
            distance=np.concatenate([part.distance for part in parts]),
        )

    def neighbours(self, row: int) -> "list[Neighbour]":
        """Read the nearest ID images of an image; none if they cannot be read."""
        if self.id_images is None:
            return []
        return self.id_images.read(self.row[row], self.distance[row])


class IdImages(Protocol):
    """The ID training images of a detector; thread-safe, and can be pickled."""

    def search(
        self, features: NDArray[np.float32], prediction: NDArray[np.integer[Any]], count: int
    ) -> Nearest:
        """Find those nearest to features ``(B, D)`` among those of predicted classes ``(B,)``."""

    def read(self, row: NDArray[np.int64], distance: NDArray[np.float64]) -> "list[Neighbour]":
        """Read some of them, by their rows and distances ``(K,)``."""
