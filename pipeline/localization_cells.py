"""What ``localize`` measures: kinds of patches, the images of each, and how they are resampled."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from ood_heatmap.metrics import bootstrap_weights
from ood_heatmap.patches import EDGES, SHAPES, SIDES, PatchKinds

_Int64 = NDArray[np.int64]
_Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Cell:
    """A kind of patch and the images that are measured with it.

    Args:
        side: The patch's side as a share of the image's.
        shape: One of ``SHAPES``.
        edges: One of ``EDGES``.
        rows: Positions of the images.
    """

    side: float
    shape: str
    edges: str
    rows: _Int64

    @property
    def kind(self) -> tuple[float, str, str]:
        """Side, shape and edges."""
        return self.side, self.shape, self.edges

    @property
    def kinds(self) -> PatchKinds:
        """The kind, to draw patches of."""
        return PatchKinds((self.side,), (self.shape,), (self.edges,))

    @property
    def is_example(self) -> bool:
        """Whether the figure shows it: of each shape one, all of another side and other edges."""
        number = SHAPES.index(self.shape)
        return (self.side, self.edges) == (SIDES[number], EDGES[number])


def iter_cells(count: int) -> Iterator[Cell]:
    """Yield every kind of patch with its part of the images.

    A Latin square: each image has every combination of side and shape once, and with each side
    every kind of edges once.
    """
    parts = _parts(count)
    for i, j, k in product(range(len(SIDES)), range(len(SHAPES)), range(len(EDGES))):
        yield Cell(SIDES[i], SHAPES[j], EDGES[k], parts[(i + j + k) % len(parts)])


def draw_weights(count: int, num_resamples: int, seed: int) -> _Float64:
    """Draw ``(R, count)`` bootstrap counts; each part of the images is resampled by itself."""
    generator = np.random.default_rng(seed)
    weights = np.zeros((num_resamples, count), order="F")
    for rows in _parts(count):
        weights[:, rows] = bootstrap_weights(len(rows), num_resamples, generator)
    return weights


def _parts(count: int) -> list[_Int64]:
    """Divide the images into as many parts as there are kinds of edges."""
    num_parts = min(len(EDGES), count)
    return [np.arange(part, count, num_parts) for part in range(num_parts)]
