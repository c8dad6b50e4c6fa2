"""Find images that two sets have in common, which bias metrics.

Images are compared by a hash of their pixels at the classifier's input size, which finds copies in
any file format; and with the ID training image of the nearest features, which finds copies that
were compressed or slightly changed.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ood_heatmap.errors import printable
from ood_heatmap.sanity import Finding

_Float32 = NDArray[np.float32]
_Int64 = NDArray[np.int64]
_UInt8 = NDArray[np.uint8]
_UInt64 = NDArray[np.uint64]

# below this relative difference to its nearest ID image, an image counts as a changed copy
_NEAR = 0.25
_NUM_SHOWN = 3


def hash_pixels(images: _UInt8) -> _UInt64:
    """Return the first 64 bits of the sha256 of each image in ``(B, 3, H, W)``, ``(B,)``."""
    digests = [hashlib.sha256(image.tobytes()).digest()[:8] for image in images]
    return np.frombuffer(b"".join(digests), np.uint64)


def relative_difference(images: _UInt8, others: _UInt8) -> _Float32:
    """Return the difference between pairs of images, relative to the contrast of the first.

    This is the root mean square of the difference, divided by the standard deviation of all values
    of the image: 0 for equal images, around 1.4 for unrelated ones.

    Args:
        images: ``(B, 3, H, W)``.
        others: ``(B, 3, H, W)``.

    Returns:
        ``(B,)`` float32; infinite if the first image has no contrast and the second differs.
    """
    differences = np.empty(len(images), np.float32)
    for row, (image, other) in enumerate(zip(images, others, strict=True)):
        rms = float(np.sqrt(np.mean((image.astype(np.float32) - other) ** 2)))
        contrast = float(image.std())
        differences[row] = rms / contrast if contrast else np.inf if rms else 0.0
    return differences


@dataclass(frozen=True)
class AuditedSet:
    """An image set, prepared for the search of overlaps.

    Args:
        title: Name of the set, for messages.
        kind: Whether its images are ID or OOD.
        fitted: Whether a model was fitted on it, so that metrics on its images are too good.
        name_of: Maps the position of an image to its name.
        pixel_hash: ``(B,)`` uint64, see ``hash_pixels``.
        nearest: ``(B,)`` int64 position of the nearest ID training image.
        difference: ``(B,)`` float32 to that image, see ``relative_difference``; for the ID training
            set, differences between a sample of its images and the nearest other image.
    """

    title: str
    kind: Literal["ID", "OOD"]
    fitted: bool
    name_of: Callable[[int], str]
    pixel_hash: _UInt64
    nearest: _Int64
    difference: _Float32


def find_overlaps(sets: Sequence[AuditedSet]) -> list[Finding]:
    """Find the images that sets have in common; all are counted, three pairs are named.

    Args:
        sets: Image sets in the order of their use, the ID training set first.

    Returns:
        A finding per pair of sets with an overlap; suspicious if it is most of a set and biases
        metrics.
    """
    findings = []
    for first, second in combinations(sets, 2):
        order = np.argsort(first.pixel_hash, kind="stable")
        insertion = np.searchsorted(first.pixel_hash, second.pixel_hash, sorter=order)
        partner = order[np.minimum(insertion, len(order) - 1)]
        equal = np.flatnonzero(first.pixel_hash[partner] == second.pixel_hash)
        findings += _to_findings(first, second, equal, partner[equal], "are also in")
    for item in sets[1:]:
        near = (item.difference < _NEAR) & ~np.isin(item.pixel_hash, sets[0].pixel_hash)
        positions = np.flatnonzero(near)
        if len(positions) / len(near) > _expected_share(sets[0].difference, len(near)):
            relation = "are almost equal to images of"
            findings += _to_findings(sets[0], item, positions, item.nearest[positions], relation)
    return findings


def _expected_share(differences: _Float32, count: int) -> float:
    """Return the largest share of almost equal images that is expected without copies.

    Images of digits or of one production line are similar without being copies: this is the share
    within the ID training set plus three standard errors.

    Args:
        differences: Differences between ID training images and the nearest other image.
        count: Number of images of the set that is compared.
    """
    share = float(np.mean(differences < _NEAR))
    return share + 3 * float(np.sqrt(share * (1 - share) * (1 / len(differences) + 1 / count)))


def _to_findings(
    first: AuditedSet, second: AuditedSet, positions: _Int64, partners: _Int64, relation: str
) -> list[Finding]:
    """Return the finding about images of a set that have a partner in an earlier set, if any."""
    if not len(positions):
        return []
    pairs = ", ".join(
        f"{printable(second.name_of(position))} = {printable(first.name_of(partner))}"
        for position, partner in zip(
            positions.tolist(), partners.tolist()[:_NUM_SHOWN], strict=False
        )
    )
    more = f" and {len(positions) - _NUM_SHOWN:,} more" if len(positions) > _NUM_SHOWN else ""
    if first.kind != second.kind:
        remedy = "No image is both ID and OOD: remove them from one of the sets."
    elif first.fitted:
        remedy = "Metrics on training images are too good: remove them."
    else:
        remedy = "Remove them from one of the sets."
    share = max(
        len(positions) / len(second.pixel_hash),
        len(np.unique(partners)) / len(first.pixel_hash),
    )
    text = (
        f"{len(positions):,} of {len(second.pixel_hash):,} images of {second.title} {relation} "
        f"{first.title} ({pairs}{more}). {remedy}"
    )
    return [Finding(text, share > 0.5 and (first.fitted or first.kind != second.kind))]
