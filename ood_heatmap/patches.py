"""ID images with a known OOD region: a square patch of an OOD image pasted into them.

They train the decoder to localize OOD regions, and measure how well it does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import EllipsisType

import numpy as np
from numpy.typing import NDArray

# sides of a patch, relative to the image's side
SIDES = (1 / 4, 3 / 8, 1 / 2, 5 / 8)
_HARD, _BLENDED = "hard", "blended"
EDGES = (_HARD, _BLENDED)
# width of the transition between the images, relative to the side of a blended patch
_RAMP = 1 / 4


@dataclass(frozen=True)
class Patch:
    """A square of an OOD image and its position in an ID image of the same size, in pixels.

    Args:
        side: Side length of the square.
        source: Top and left of the square in the OOD image.
        destination: Top and left of the square in the ID image.
        edges: ``hard``, or ``blended``: mixed with the ID image towards its border.
    """

    side: int
    source: tuple[int, int]
    destination: tuple[int, int]
    edges: str

    def opacity(self) -> NDArray[np.float32]:
        """Return the opacity of the OOD image in the square, ``(side, side)`` in (0, 1]."""
        ramp = round(_RAMP * self.side) if self.edges == _BLENDED else 0
        inwards = np.minimum(np.arange(self.side), np.arange(self.side)[::-1])
        share = np.minimum(1, (inwards + 1) / (ramp + 1)).astype(np.float32)
        return np.minimum(share[:, None], share[None, :])

    def mask(self, size: int) -> NDArray[np.bool_]:
        """Return the ``(H, W)`` bool mask of the patch in an image of side ``size``."""
        mask = np.zeros((size, size), dtype=bool)
        mask[_square_slices(self.destination, self.side)] = True
        return mask


def _square_slices(corner: tuple[int, int], side: int) -> tuple[EllipsisType, slice, slice]:
    """Return the slices of a square with this top-left corner, in all channels."""
    top, left = corner
    return ..., slice(top, top + side), slice(left, left + side)


def draw_patch(
    size: int, seed: int, row: int, sides: Sequence[float] = SIDES, edges: Sequence[str] = EDGES
) -> Patch:
    """Draw a random patch; depends only on the arguments, not on batch or rank.

    Args:
        size: Side of the images in pixels.
        seed: Random seed.
        row: Row of the image.
        sides: Relative sides to choose from.
        edges: Kinds of edges to choose from.
    """
    generator = np.random.default_rng([seed, row])
    # drawn first, so that relative positions do not depend on the choices of sides and edges
    positions = generator.random(4)
    chosen_edges = edges[int(generator.integers(len(edges)))]
    side = max(1, round(sides[int(generator.integers(len(sides)))] * size))
    top, left, to_top, to_left = (int(share * (size - side + 1)) for share in positions)
    return Patch(side, (top, left), (to_top, to_left), chosen_edges)


def paste(
    id_image: NDArray[np.uint8], ood_image: NDArray[np.uint8], patch: Patch
) -> NDArray[np.uint8]:
    """Return the ID image with the patch pasted in; pixels outside the patch are unchanged.

    Args:
        id_image: ``(C, H, W)`` uint8.
        ood_image: Same shape and dtype.
        patch: Size, source and destination of the patch.

    Raises:
        ValueError: The shapes or dtypes differ.
    """
    if id_image.shape != ood_image.shape or not id_image.dtype == ood_image.dtype == np.uint8:
        raise ValueError(
            "both images must be uint8 of the same shape, "
            f"got {id_image.dtype} {id_image.shape} and {ood_image.dtype} {ood_image.shape}"
        )
    pasted: NDArray[np.uint8] = id_image.copy()
    destination = _square_slices(patch.destination, patch.side)
    source = _square_slices(patch.source, patch.side)
    background = id_image[destination].astype(np.float32)
    blended = background + patch.opacity() * (ood_image[source] - background)
    pasted[destination] = np.rint(blended).astype(np.uint8)
    return pasted


def paste_all(
    id_images: NDArray[np.uint8], ood_images: NDArray[np.uint8], patches: Sequence[Patch]
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Paste one patch into each image; return the images and the masks of the patches.

    Args:
        id_images: ``(B, C, H, W)`` uint8, H equal to W.
        ood_images: Same shape and dtype.
        patches: One patch per image.

    Returns:
        ``(B, C, H, W)`` uint8 images and ``(B, H, W)`` bool masks.
    """
    triples = zip(id_images, ood_images, patches, strict=True)
    images = np.stack([paste(*triple) for triple in triples])
    return images, np.stack([patch.mask(images.shape[-1]) for patch in patches])
