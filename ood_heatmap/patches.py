"""ID images that are OOD at a known place: a square of an OOD image pasted into them.

What teaches a decoder where an image is OOD, and what measures whether it knows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import EllipsisType

import numpy as np
from numpy.typing import NDArray

SIDES = (1 / 4, 3 / 8, 1 / 2, 5 / 8)  # of a patch, as shares of the image's side
HARD, BLENDED = "hard", "blended"
EDGES = (HARD, BLENDED)
RAMP = 1 / 4  # of a blended patch's side: over so much the ID image goes over into the OOD image


@dataclass(frozen=True)
class Patch:
    """A square of an OOD image, and where it goes in an ID image of the same size; in pixels.

    Args:
        side: Of the square.
        source: Its top and left in the OOD image.
        place: Its top and left in the ID image.
        edges: ``hard``, or ``blended``: mixed with the ID image towards its border.
    """

    side: int
    source: tuple[int, int]
    place: tuple[int, int]
    edges: str

    def opacity(self) -> NDArray[np.float32]:
        """Return the OOD image's share in each pixel of the square, ``(side, side)`` in (0, 1]."""
        ramp = round(RAMP * self.side) if self.edges == BLENDED else 0
        inwards = np.minimum(np.arange(self.side), np.arange(self.side)[::-1])
        share = np.minimum(1, (inwards + 1) / (ramp + 1)).astype(np.float32)
        return np.minimum(share[:, None], share[None, :])

    def mask(self, size: int) -> NDArray[np.bool_]:
        """Return where an image of ``size`` pixels a side has any of the patch, ``(H, W)`` bool."""
        mask = np.zeros((size, size), dtype=bool)
        mask[square(self.place, self.side)] = True
        return mask


def square(corner: tuple[int, int], side: int) -> tuple[EllipsisType, slice, slice]:
    """Return what selects a square with this top and left, in all channels."""
    top, left = corner
    return ..., slice(top, top + side), slice(left, left + side)


def draw_patch(
    size: int, seed: int, row: int, sides: Sequence[float] = SIDES, edges: Sequence[str] = EDGES
) -> Patch:
    """Return a random patch, a function of its arguments alone: the same in any batch or process.

    Args:
        size: Pixels of the images' side.
        seed: Of all draws.
        row: Number of the image.
        sides: Shares of the side to choose from.
        edges: Kinds of edges to choose from.
    """
    generator = np.random.default_rng([seed, row])
    # the places first: they stay the same relative to what is free, whatever there is to choose
    places = generator.random(4)
    kind = edges[int(generator.integers(len(edges)))]
    side = max(1, round(sides[int(generator.integers(len(sides)))] * size))
    top, left, to_top, to_left = (int(share * (size - side + 1)) for share in places)
    return Patch(side, (top, left), (to_top, to_left), kind)


def paste(
    id_image: NDArray[np.uint8], ood_image: NDArray[np.uint8], patch: Patch
) -> NDArray[np.uint8]:
    """Return the ID image with the patch in it; outside the patch it is unchanged.

    Args:
        id_image: ``(C, H, W)`` uint8.
        ood_image: Same shape and dtype.
        patch: What goes where.

    Raises:
        ValueError: The shapes or dtypes differ.
    """
    if id_image.shape != ood_image.shape or not id_image.dtype == ood_image.dtype == np.uint8:
        raise ValueError(
            f"both must be uint8 of one shape, got {id_image.dtype} {id_image.shape} and "
            f"{ood_image.dtype} {ood_image.shape}"
        )
    pasted: NDArray[np.uint8] = id_image.copy()
    here, there = square(patch.place, patch.side), square(patch.source, patch.side)
    below = id_image[here].astype(np.float32)
    mixed = below + patch.opacity() * (ood_image[there] - below)
    pasted[here] = np.rint(mixed).astype(np.uint8)
    return pasted


def paste_all(
    id_images: NDArray[np.uint8], ood_images: NDArray[np.uint8], patches: Sequence[Patch]
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Return images with a patch each, and where the patches are.

    Args:
        id_images: ``(B, C, H, W)`` uint8, H equal to W.
        ood_images: Same shape and dtype.
        patches: One for each.

    Returns:
        ``(B, C, H, W)`` uint8 images and ``(B, H, W)`` bool masks.
    """
    triples = zip(id_images, ood_images, patches, strict=True)
    images = np.stack([paste(*triple) for triple in triples])
    return images, np.stack([patch.mask(images.shape[-1]) for patch in patches])
