"""ID images with a patch of an OOD image in them, as a set that stage 2 reads like any other."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ood_heatmap.cache.shards import Rows
from ood_heatmap.images import Decoded, ImageSet, Transform, apply_transform
from ood_heatmap.patches import Patch, draw_patch, paste

Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class Pasting:
    """Which OOD image goes into which ID image.

    Args:
        position: ``(P,)`` of the ID image in the index.
        row: ``(P,)`` of the OOD set.
        seed: Of the patches' sizes and places.
    """

    position: Int64
    row: Int64
    seed: int

    def __len__(self) -> int:
        return len(self.position)

    def patch(self, number: int, size: int) -> Patch:
        """Return what of the OOD image goes where."""
        return draw_patch(size, self.seed, number)


def draw_pasting(count: int, num_id: int, ood_rows: Int64, seed: int) -> Pasting:
    """Draw ``count`` pairs at random; no image is taken again before all were taken as often."""
    generator = np.random.default_rng([seed, 0, 1])  # not the generator of any single row
    position, row = (
        np.resize(generator.permutation(rows), count) for rows in (np.arange(num_id), ood_rows)
    )
    return Pasting(position, row, seed)


@dataclass(frozen=True)
class _PastedReader:
    """Pastes patches when they are read; the bytes of an image are those of its OOD image."""

    images: ImageSet
    id_images: Rows
    pasting: Pasting
    transform: Transform

    def read(self, number: int) -> tuple[Decoded, bytes]:
        row = int(self.pasting.row[number])
        image, digest = self.images.read(row)
        pixels = apply_transform(self.transform, image, self.images.names[row])
        (id_image,) = self.id_images.take(self.pasting.position[number : number + 1])
        return paste(id_image, pixels, self.pasting.patch(number, self.transform.size)), digest

    def digest(self, number: int) -> bytes:
        return self.images.digest(int(self.pasting.row[number]))


def pasted_images(
    images: ImageSet, id_images: Rows, pasting: Pasting, transform: Transform
) -> ImageSet:
    """Return the patched images, at the input size already; a row is a number of the pasting.

    Args:
        images: The OOD set; its bytes are the patched images' content, the ID images belong to
            the index.
        id_images: ``(N, 3, H, W)`` uint8, of the index.
        pasting: What goes where.
        transform: Brings OOD images to the input size.
    """
    return ImageSet(
        source=f"ID images with patches of {images.source}",
        names=[images.names[row] for row in pasting.row],
        labels=np.full(len(pasting), -1, np.int32),
        classes=(),
        reader=_PastedReader(images, id_images, pasting, transform),
        listing=images.listing,
    )
