"""Half-and-half mixtures of two ID images of different classes, as an image set.

They have the style of ID images and are not ID, see ``combined``.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ood_heatmap.images import Decoded, ImageSet, Transform, apply_transform
from ood_heatmap.listing import SelectedNames

# mixtures per image, and of all at most
_PER_IMAGE, _MAX_MIXTURES = 5, 1000
# share of the first image
_SHARES = (0.3, 0.7)


@dataclass(frozen=True)
class _MixedReader:
    """Mixes two images on reading; the digest is that of the first and the second."""

    images: ImageSet
    first: NDArray[np.int64]
    second: NDArray[np.int64]
    share: NDArray[np.float32]
    transform: Transform

    def read(self, number: int) -> tuple[Decoded, bytes]:
        (first, digest), (second, other) = (
            self._read(int(rows[number])) for rows in (self.first, self.second)
        )
        mixed = second + self.share[number] * (first.astype(np.float32) - second)
        return np.rint(mixed).astype(np.uint8), digest + other

    def digest(self, number: int) -> bytes:
        return b"".join(self.images.digest(int(rows[number])) for rows in (self.first, self.second))

    def _read(self, row: int) -> tuple[NDArray[np.uint8], bytes]:
        image, digest = self.images.read(row)
        return apply_transform(self.transform, image, self.images.names[row]), digest


def mix(
    images: ImageSet,
    rows: NDArray[np.int64],
    prediction: NDArray[np.int32],
    transform: Transform,
    seed: int,
) -> ImageSet | None:
    """Return mixtures of random pairs of images that are predicted as different classes.

    Args:
        images: A set of ID images.
        rows: ``(n,)`` rows to mix.
        prediction: ``(n,)`` their predicted classes.
        transform: Transform to the classifier's input size, at which they are mixed.
        seed: Random seed of pairs and shares.

    Returns:
        Images at the input size; None if no two images differ in class.
    """
    generator = np.random.default_rng([seed, 0, 2])
    count = min(_MAX_MIXTURES, _PER_IMAGE * len(rows))
    pairs = generator.integers(len(rows), size=(20 * count, 2))
    pairs = pairs[prediction[pairs[:, 0]] != prediction[pairs[:, 1]]][:count]
    if not len(pairs):
        return None
    first, second = rows[pairs].T
    share = generator.uniform(*_SHARES, len(pairs)).astype(np.float32)
    return ImageSet(
        source=f"mixtures of {images.source}",
        names=SelectedNames(images.names, first),
        labels=np.full(len(pairs), -1, np.int32),
        classes=(),
        reader=_MixedReader(images, first, second, share, transform),
        listing=images.listing,
    )
