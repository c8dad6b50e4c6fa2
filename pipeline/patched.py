"""ID images with a patch of an OOD image in them, as a set that stage 2 reads like any other."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ood_heatmap.cache.shards import Rows
from ood_heatmap.images import Decoded, ImageSet, Transform, apply_transform
from ood_heatmap.patches import Patch, draw_patch, paste


@dataclass(frozen=True)
class PastePlan:
    """Which OOD image goes into which ID image.

    Args:
        position: ``(P,)`` of the ID image in the index.
        row: ``(P,)`` of the OOD set.
        seed: Of the patches' sizes and places.
    """

    position: NDArray[np.int64]
    row: NDArray[np.int64]
    seed: int

    def __len__(self) -> int:
        return len(self.position)

    def patch(self, number: int, size: int) -> Patch:
        """Return what of the OOD image goes where."""
        return draw_patch(size, self.seed, number)


def draw_paste_plan(count: int, num_id: int, ood_rows: NDArray[np.int64], seed: int) -> PastePlan:
    """Draw ``count`` pairs at random; no image is taken again before all were taken as often."""
    generator = np.random.default_rng([seed, 0, 1])  # not the generator of any single row
    position, row = (
        np.resize(generator.permutation(rows), count) for rows in (np.arange(num_id), ood_rows)
    )
    return PastePlan(position, row, seed)


@dataclass(frozen=True)
class _PastedReader:
    """Pastes patches when they are read; the bytes of an image are those of its OOD image."""

    images: ImageSet
    id_images: Rows
    paste_plan: PastePlan
    transform: Transform

    def read(self, number: int) -> tuple[Decoded, bytes]:
        row = int(self.paste_plan.row[number])
        image, digest = self.images.read(row)
        pixels = apply_transform(self.transform, image, self.images.names[row])
        (id_image,) = self.id_images.take(self.paste_plan.position[number : number + 1])
        return paste(id_image, pixels, self.paste_plan.patch(number, self.transform.size)), digest

    def digest(self, number: int) -> bytes:
        return self.images.digest(int(self.paste_plan.row[number]))


def pasted_images(
    images: ImageSet, id_images: Rows, paste_plan: PastePlan, transform: Transform
) -> ImageSet:
    """Return the patched images, at the input size already; a row is a position in the paste plan.

    Args:
        images: The OOD set; its bytes are the patched images' content, the ID images belong to
            the index.
        id_images: ``(N, 3, H, W)`` uint8, of the index.
        paste_plan: What goes where.
        transform: Brings OOD images to the input size.
    """
    return ImageSet(
        source=f"ID images with patches of {images.source}",
        names=[images.names[row] for row in paste_plan.row],
        labels=np.full(len(paste_plan), -1, np.int32),
        classes=(),
        reader=_PastedReader(images, id_images, paste_plan, transform),
        listing=images.listing,
    )
