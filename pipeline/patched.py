"""ID images with a pasted patch of an OOD image, as an image set that stage 2 reads."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ood_heatmap.cache.shards import Rows
from ood_heatmap.images import Decoded, ImageSet, Transform, apply_transform
from ood_heatmap.listing import SelectedNames
from ood_heatmap.patches import Patch, draw_patch, paste


@dataclass(frozen=True)
class PastePlan:
    """Which OOD image is pasted into which ID image.

    Args:
        position: ``(P,)`` positions of the ID images in the index.
        row: ``(P,)`` rows of the OOD set.
        seed: Seed of the patches' sizes and positions.
    """

    position: NDArray[np.int64]
    row: NDArray[np.int64]
    seed: int

    def __len__(self) -> int:
        return len(self.position)

    def patch(self, number: int, size: int) -> Patch:
        """Return the patch of one image: size, source and destination."""
        return draw_patch(size, self.seed, number)


def draw_paste_plan(count: int, num_id: int, ood_rows: NDArray[np.int64], seed: int) -> PastePlan:
    """Draw ``count`` random pairs.

    Cycles through random permutations, so all images are used equally often (plus or minus one).
    """
    # a seed of three numbers: independent of the per-patch generators, seeded by [seed, number]
    generator = np.random.default_rng([seed, 0, 1])
    position, row = (
        np.resize(generator.permutation(rows), count) for rows in (np.arange(num_id), ood_rows)
    )
    return PastePlan(position, row, seed)


@dataclass(frozen=True)
class _PastedReader:
    """Pastes patches on reading; the digest of an image is that of its OOD image."""

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
    """Return the patched images as a set at the input size; rows are positions in the plan.

    Args:
        images: The OOD set. Digests are of its images only: the ID images are covered by the
            fingerprint of the index.
        id_images: ``(N, 3, H, W)`` uint8 images of the index.
        paste_plan: Which image is pasted where.
        transform: Transform of the OOD images to the input size.
    """
    return ImageSet(
        source=f"ID images with patches of {images.source}",
        names=SelectedNames(images.names, paste_plan.row),
        labels=np.full(len(paste_plan), -1, np.int32),
        classes=(),
        reader=_PastedReader(images, id_images, paste_plan, transform),
        listing=images.listing,
    )
