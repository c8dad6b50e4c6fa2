"""Images that two sets have in common, which make metrics too good or too bad.

Images are compared by the hash of their pixels at the input size of the classifier, so a copy is
found in another file format too; and with the ID training image of the nearest features, which
finds copies that were compressed or slightly changed.
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

# an image whose relative difference to its nearest ID image is smaller is a changed copy
_NEAR = 0.25
_SHOWN = 3


def hash_pixels(images: _UInt8) -> _UInt64:
    """Return the first 64 bits of the sha256 of each image of ``(B, 3, H, W)``, ``(B,)``."""
    digests = [hashlib.sha256(image.tobytes()).digest()[:8] for image in images]
    return np.frombuffer(b"".join(digests), np.uint64)


def relative_difference(images: _UInt8, others: _UInt8) -> _Float32:
    """Return how much pairs of images differ, relative to the contrast of the first.

    The root mean square of the difference over the standard deviation of all values of the image:
    0 for equal images, around 1.4 for unrelated ones.

    Args:
        images: ``(B, 3, H, W)``.
        others: ``(B, 3, H, W)``.

    Returns:
        ``(B,)`` float32; infinite where an image without contrast differs.
    """
    found = np.empty(len(images), np.float32)
    for number, (image, other) in enumerate(zip(images, others, strict=True)):
        rms = float(np.sqrt(np.mean((image.astype(np.float32) - other) ** 2)))
        contrast = float(image.std())
        found[number] = rms / contrast if contrast else np.inf if rms else 0.0
    return found


@dataclass(frozen=True)
class AuditedSet:
    """One image set, as far as overlaps go.

    Args:
        title: What it is, for messages.
        kind: Whether its images are ID or OOD.
        fitted: Whether something was fitted on it, so that metrics of its images are too good.
        name_of: Position of an image to its name.
        pixel_hash: ``(B,)`` uint64, see ``hash_pixels``.
        nearest: ``(B,)`` int64 position of its nearest ID training image.
        difference: ``(B,)`` float32 to that image, see ``relative_difference``; for the ID training
            set that of a sample of its images to their nearest other ones.
    """

    title: str
    kind: Literal["ID", "OOD"]
    fitted: bool
    name_of: Callable[[int], str]
    pixel_hash: _UInt64
    nearest: _Int64
    difference: _Float32


def find_overlaps(sets: Sequence[AuditedSet]) -> list[Finding]:
    """Return what image sets have in common: three pairs of images are named, all are counted.

    Args:
        sets: In the order of their use, the ID training set first.

    Returns:
        Suspicious where most images of a set are in another that they must not be in.
    """
    findings = []
    for first, second in combinations(sets, 2):
        order = np.argsort(first.pixel_hash, kind="stable")
        place = np.searchsorted(first.pixel_hash, second.pixel_hash, sorter=order)
        partner = order[np.minimum(place, len(order) - 1)]
        equal = np.flatnonzero(first.pixel_hash[partner] == second.pixel_hash)
        findings += _to_findings(first, second, equal, partner[equal], "are also in")
    for item in sets[1:]:
        near = (item.difference < _NEAR) & ~np.isin(item.pixel_hash, sets[0].pixel_hash)
        found = np.flatnonzero(near)
        if len(found) / len(near) > _natural_share(sets[0].difference, len(near)):
            words = "are almost equal in"
            findings += _to_findings(sets[0], item, found, item.nearest[found], words)
    return findings


def _natural_share(differences: _Float32, count: int) -> float:
    """Return the share of almost equal images that is no more than chance.

    Images of digits or of one machine are much alike without being copies: what the ID training
    set has within itself, and three standard errors more.

    Args:
        differences: Of ID training images to their nearest other ones.
        count: Images of the set that is compared.
    """
    share = float(np.mean(differences < _NEAR))
    return share + 3 * float(np.sqrt(share * (1 - share) * (1 / len(differences) + 1 / count)))


def _to_findings(
    first: AuditedSet, second: AuditedSet, positions: _Int64, partners: _Int64, words: str
) -> list[Finding]:
    """Return the finding for images of a set that have a partner in a set before it, if any."""
    if not len(positions):
        return []
    pairs = ", ".join(
        f"{printable(second.name_of(position))} = {printable(first.name_of(partner))}"
        for position, partner in zip(positions.tolist(), partners.tolist()[:_SHOWN], strict=False)
    )
    more = f" and {len(positions) - _SHOWN:,} more" if len(positions) > _SHOWN else ""
    if first.kind != second.kind:
        way_out = "No image is both ID and OOD: leave them out of one of the sets."
    elif first.fitted:
        way_out = "Metrics of images that something was fitted on are too good: leave them out."
    else:
        way_out = "Leave them out of one of the sets."
    share = max(
        len(positions) / len(second.pixel_hash),
        len(np.unique(partners)) / len(first.pixel_hash),
    )
    text = (
        f"{len(positions):,} of {len(second.pixel_hash):,} images of {second.title} {words} "
        f"{first.title} ({pairs}{more}). {way_out}"
    )
    return [Finding(text, share > 0.5 and (first.fitted or first.kind != second.kind))]
