"""ID images with a pasted patch of an OOD image, as an image set that stage 2 reads."""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import interpolate

from ood_heatmap.cache.shards import Rows
from ood_heatmap.images import Decoded, ImageSet, Transform, apply_transform
from ood_heatmap.listing import SelectedNames
from ood_heatmap.patches import MIXED, SQUARES, Patch, draw_patch


@dataclass(frozen=True)
class PastePlan:
    """Which OOD image is pasted into which ID image.

    Args:
        position: ``(P,)`` positions of the ID images in the index.
        row: ``(P,)`` rows of the OOD set.
        seed: Seed of the patches' sizes, shapes and positions.
        squares: Paste squares only, hard or blended; otherwise all shapes and opacities.
    """

    position: NDArray[np.int64]
    row: NDArray[np.int64]
    seed: int
    squares: bool = False

    def __len__(self) -> int:
        return len(self.position)

    def patch(self, number: int, size: int) -> Patch:
        """Return the patch of one image: source, destination and opacity."""
        return draw_patch(size, self.seed, number, SQUARES if self.squares else MIXED)

    def presence(self, number: int, size: int, heatmap_size: int) -> NDArray[np.uint8]:
        """Return the opacity of the OOD image in one of the patched images.

        Args:
            number: Position in the plan.
            size: Side of the images in pixels.
            heatmap_size: Side of a heatmap, ``h``; each of its pixels is the average of an area.

        Returns:
            ``(h, h)`` uint8, 0 outside the patch and 255 where only the OOD image is seen.
        """
        presence = torch.from_numpy(self.patch(number, size).presence(size))
        averages = interpolate(presence[None, None], heatmap_size, mode="area")[0, 0]
        return averages.mul(255).round().to(torch.uint8).numpy()


def draw_paste_plan(
    count: int, num_id: int, ood_rows: NDArray[np.int64], seed: int, *, squares: bool = False
) -> PastePlan:
    """Draw ``count`` random pairs.

    Cycles through random permutations, so all images are used equally often (plus or minus one).
    """
    # a seed of three numbers: independent of the per-patch generators, seeded by [seed, number]
    generator = np.random.default_rng([seed, 0, 1])
    position, row = (
        np.resize(generator.permutation(rows), count) for rows in (np.arange(num_id), ood_rows)
    )
    return PastePlan(position, row, seed, squares)


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
        patch = self.paste_plan.patch(number, self.transform.size)
        return patch.paste(id_image, pixels), digest

    def digest(self, number: int) -> bytes:
        return self.images.digest(int(self.paste_plan.row[number]))


def pasted_images(
    images: ImageSet,
    id_images: Rows,
    paste_plan: PastePlan,
    transform: Transform,
    heatmap_size: int,
) -> ImageSet:
    """Return the patched images as a set at the input size; rows are positions in the plan.

    Their masks are the presence of the OOD images.

    Args:
        images: The OOD set. Digests are of its images only: the ID images are covered by the
            fingerprint of the index.
        id_images: ``(N, 3, H, W)`` uint8 images of the index.
        paste_plan: Which image is pasted where.
        transform: Transform of the OOD images to the input size.
        heatmap_size: Side of the masks in pixels.
    """
    return ImageSet(
        source=f"ID images with patches of {images.source}",
        names=SelectedNames(images.names, paste_plan.row),
        labels=np.full(len(paste_plan), -1, np.int32),
        classes=(),
        reader=_PastedReader(images, id_images, paste_plan, transform),
        listing=images.listing,
        mask=partial(paste_plan.presence, size=transform.size, heatmap_size=heatmap_size),
    )
