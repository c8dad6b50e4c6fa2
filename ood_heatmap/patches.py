"""ID images with a known OOD region: a patch of an OOD image pasted into them.

They train the decoder to localize OOD regions, and measure how well it does. A patch is a square,
an ellipse or an irregular blob, with hard or blended edges, or translucent.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import EllipsisType
from typing import Any

import numpy as np
from numpy.typing import NDArray

# sides of a patch, relative to the image's side: of the square that has as many pixels
SIDES = (1 / 4, 3 / 8, 1 / 2, 5 / 8)
_SQUARE, _ELLIPSE, _BLOB = "square", "ellipse", "blob"
SHAPES = (_SQUARE, _ELLIPSE, _BLOB)
_HARD, _BLENDED, _TRANSLUCENT = "hard", "blended", "translucent"
EDGES = (_HARD, _BLENDED, _TRANSLUCENT)
# width of the transition between the images, relative to the side of a blended patch
_RAMP = 1 / 4
# of the OOD image in a translucent patch, at least
_MIN_OPACITY = 0.3
# length of an ellipse, relative to its width, at most
_MAX_ASPECT = 2.5
# waves in the outline of a blob, their standard deviation in radians per radius, and their height
_NUM_WAVES, _FREQUENCY, _ROUGHNESS = 16, 2.5, 0.35


@dataclass(frozen=True)
class PatchKinds:
    """What a patch is drawn from, each with the same probability.

    Args:
        sides: Sides relative to the image's side.
        shapes: Some of ``SHAPES``.
        edges: Some of ``EDGES``.
    """

    sides: Sequence[float] = SIDES
    shapes: Sequence[str] = SHAPES
    edges: Sequence[str] = EDGES


# what the decoder is trained with: of everything, and smaller and larger than what is measured
MIXED = PatchKinds((3 / 16, 1 / 4, 5 / 16, 3 / 8, 1 / 2, 5 / 8, 3 / 4))
# what it was trained with before there were other shapes
SQUARES = PatchKinds(SIDES, (_SQUARE,), (_HARD, _BLENDED))


@dataclass(frozen=True, eq=False)
class Patch:
    """A region of an OOD image and its position in an ID image of the same size, in pixels.

    Args:
        source: Top and left of the region's bounding box in the OOD image.
        destination: Top and left of the bounding box in the ID image.
        opacity: ``(h, w)`` float32 in [0, 1], the opacity of the OOD image in the bounding box.
    """

    source: tuple[int, int]
    destination: tuple[int, int]
    opacity: NDArray[np.float32]

    def presence(self, size: int) -> NDArray[np.float32]:
        """Return the opacity in an ID image of side ``size``, ``(H, W)``; 0 outside the region."""
        presence = np.zeros((size, size), np.float32)
        presence[self._box(self.destination)] = self.opacity
        return presence

    def mask(self, size: int) -> NDArray[np.bool_]:
        """Return the ``(H, W)`` bool mask of the region in an image of side ``size``."""
        return self.presence(size) > 0

    def _box(self, corner: tuple[int, int]) -> tuple[EllipsisType, slice, slice]:
        """Return the slices of the bounding box with this top-left corner, in all channels."""
        (top, left), (height, width) = corner, self.opacity.shape
        return ..., slice(top, top + height), slice(left, left + width)

    def paste(self, id_image: NDArray[np.uint8], ood_image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return the ID image with the patch pasted in; pixels outside the patch are unchanged.

        Args:
            id_image: ``(C, H, W)`` uint8.
            ood_image: Same shape and dtype.

        Raises:
            ValueError: The shapes or dtypes differ.
        """
        if id_image.shape != ood_image.shape or not id_image.dtype == ood_image.dtype == np.uint8:
            raise ValueError(
                "both images must be uint8 of the same shape, "
                f"got {id_image.dtype} {id_image.shape} and {ood_image.dtype} {ood_image.shape}"
            )
        pasted: NDArray[np.uint8] = id_image.copy()
        destination = self._box(self.destination)
        background = id_image[destination].astype(np.float32)
        blended = background + self.opacity * (ood_image[self._box(self.source)] - background)
        pasted[destination] = np.rint(blended).astype(np.uint8)
        return pasted


def draw_patch(size: int, seed: int, row: int, kinds: PatchKinds = MIXED) -> Patch:
    """Draw a random patch; depends only on the arguments, not on batch or rank.

    Args:
        size: Side of the images in pixels.
        seed: Random seed.
        row: Row of the image.
        kinds: Sizes, shapes and edges to choose from.
    """
    generator = np.random.default_rng([seed, row])
    # drawn first, so that relative positions do not depend on the kinds
    positions = generator.random(4)
    edges = kinds.edges[int(generator.integers(len(kinds.edges)))]
    side = max(1, round(kinds.sides[int(generator.integers(len(kinds.sides)))] * size))
    shape = kinds.shapes[int(generator.integers(len(kinds.shapes)))]
    mask = _draw_mask(shape, size, side, generator)
    free = np.array(2 * mask.shape)
    top, left, to_top, to_left = (positions * (size - free + 1)).astype(int).tolist()
    opacity = _draw_opacity(mask, edges, side, generator)
    return Patch((top, left), (to_top, to_left), opacity)


def _draw_mask(
    shape: str, size: int, side: int, generator: np.random.Generator
) -> NDArray[np.bool_]:
    """Draw a region of about ``side ** 2`` pixels, and return its mask in its bounding box.

    The region is where a function of the position is smallest. It is cut off at the borders of an
    image of side ``size``.
    """
    if shape == _SQUARE:
        return np.ones((side, side), bool)
    # in radii of a disc of that many pixels, from the centre of the image
    offset = (np.arange(size) + 0.5 - size / 2) * np.sqrt(np.pi) / side
    field = (_draw_ellipse if shape == _ELLIPSE else _draw_blob)(offset, generator)
    # a threshold, not an order: pixels with the same value are all inside
    inside: NDArray[np.bool_] = field <= np.partition(field, side**2 - 1, axis=None)[side**2 - 1]
    down, right = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    return inside[down[0] : down[-1] + 1, right[0] : right[-1] + 1]


def _draw_ellipse(offset: NDArray[Any], generator: np.random.Generator) -> NDArray[np.float64]:
    """Return the squared distance from the centre relative to that of a random ellipse."""
    aspect, angle = generator.uniform(1, _MAX_ASPECT), generator.uniform(0, np.pi)
    down, right = offset[:, None], offset[None, :]
    along = np.cos(angle) * right + np.sin(angle) * down
    across = np.cos(angle) * down - np.sin(angle) * right
    field: NDArray[np.float64] = along**2 / aspect + across**2 * aspect
    return field


def _draw_blob(offset: NDArray[Any], generator: np.random.Generator) -> NDArray[np.float64]:
    """Return the distance from the centre plus smooth noise, which may leave holes and islands.

    The noise is a sum of random waves, a Gaussian process with a Gaussian covariance.

    Source: Rahimi and Recht, Random Features for Large-Scale Kernel Machines, NeurIPS 2007.
    """
    down, right = generator.normal(0, _FREQUENCY, (2, _NUM_WAVES))
    phase = generator.uniform(0, 2 * np.pi, _NUM_WAVES)
    # the real part of a product of exponentials: a wave is not computed pixel by pixel
    waves = np.exp(1j * np.outer(offset, down)) @ np.exp(
        1j * (np.outer(right, offset) + phase[:, None])
    )
    distance = np.hypot(offset[:, None], offset[None, :])
    field: NDArray[np.float64] = distance + _ROUGHNESS * np.sqrt(2 / _NUM_WAVES) * waves.real
    return field


def _draw_opacity(
    mask: NDArray[np.bool_], edges: str, side: int, generator: np.random.Generator
) -> NDArray[np.float32]:
    """Return the opacity in a region: 1, increasing from its border inwards, or a random value."""
    if edges == _BLENDED:
        depth = _depth(mask, round(_RAMP * side) + 1)
        return np.asarray(depth / depth.max(), np.float32)
    opacity = generator.uniform(_MIN_OPACITY, 1) if edges == _TRANSLUCENT else 1
    return np.asarray(mask * opacity, np.float32)


def _depth(mask: NDArray[np.bool_], limit: int) -> NDArray[np.int64]:
    """Return how many steps, also diagonal, each pixel is from outside the mask, up to a limit."""
    inside = np.pad(mask, 1)
    depth = np.zeros(mask.shape, np.int64)
    for _ in range(limit):
        depth += inside[1:-1, 1:-1]
        rows = inside[:-2] & inside[1:-1] & inside[2:]
        inside[1:-1, 1:-1] = rows[:, :-2] & rows[:, 1:-1] & rows[:, 2:]
    return depth


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
    triples = zip(patches, id_images, ood_images, strict=True)
    images = np.stack([patch.paste(id_image, ood_image) for patch, id_image, ood_image in triples])
    return images, np.stack([patch.mask(images.shape[-1]) for patch in patches])
