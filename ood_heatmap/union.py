"""Concatenation of several image sets."""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from ood_heatmap.errors import OodHeatmapError
from ood_heatmap.images import ClassOrder, Decoded, ImageReader, ImageSet, relabel, sort_classes
from ood_heatmap.listing import ChainedNames, Labelling

# separates the sources in the name of a union
SEPARATOR = " + "


@dataclass(frozen=True)
class _UnionReader:
    """Reads from the set that contains the row.

    Args:
        readers: Reader of each set.
        ends: Row after the last one of each set.
    """

    readers: Sequence[ImageReader]
    ends: Sequence[int]

    def read(self, row: int) -> tuple[Decoded, bytes]:
        reader, row = self._find(row)
        return reader.read(row)

    def digest(self, row: int) -> bytes:
        reader, row = self._find(row)
        return reader.digest(row)

    def _find(self, row: int) -> tuple[ImageReader, int]:
        part = bisect_right(self.ends, row)
        return self.readers[part], row - (self.ends[part - 1] if part else 0)


def unite(
    sets: Sequence[ImageSet], *, class_order: ClassOrder = "name", need_labels: bool = True
) -> ImageSet:
    """Concatenate sets; a single set is returned unchanged.

    Classes are matched by name. They are numbered as in the set that has all of them, otherwise in
    ``class_order``; without class names, numbers are kept.

    Args:
        sets: The sets.
        class_order: Order of the union's class names.
        need_labels: Raise if the classes cannot be matched, instead of leaving labels out.

    Raises:
        OodHeatmapError: The classes of the sets cannot be matched.
    """
    if len(sets) == 1:
        return sets[0]
    labels, classes, has_class_names = _unite_labels(sets, class_order, need_labels)
    stamps = [images.stamps for images in sets if images.stamps is not None]
    content = [[images.listing for images in sets], classes if has_class_names else None]
    return ImageSet(
        source=SEPARATOR.join(images.source for images in sets),
        names=ChainedNames([(_prefix(images), images.names) for images in sets]),
        labels=labels,
        classes=classes,
        reader=_UnionReader(
            [images.reader for images in sets], list(accumulate(len(images) for images in sets))
        ),
        listing=hashlib.sha256(json.dumps(content).encode()).hexdigest(),
        has_class_names=has_class_names,
        stamps=np.concatenate(stamps) if len(stamps) == len(sets) else None,
    )


def _prefix(images: ImageSet) -> str:
    """Return the prefix that distinguishes the names of a set from those of other sources."""
    prefix = f"{images.source}/"
    return "" if images.names[0].startswith(prefix) else prefix


def _unite_labels(
    sets: Sequence[ImageSet], class_order: ClassOrder, need_labels: bool
) -> Labelling:
    """Return the labels of a union."""
    named = [images for images in sets if images.class_names]
    numbered = [images for images in sets if images.classes and not images.has_class_names]
    if not named:
        count = max(len(images.classes) for images in sets)
        labels = np.concatenate([images.labels for images in sets])
        return Labelling(labels, tuple(map(str, range(count))), False)
    if numbered and need_labels:
        raise OodHeatmapError(
            f"{numbered[0].source} has class numbers and {named[0].source} has class names: they "
            "cannot be matched. Label both in the same way, or use one of them."
        )
    classes = _unite_classes(named, class_order, need_labels)
    parts = [
        relabel(images, classes).labels if images.class_names else np.full(len(images), -1)
        for images in sets
    ]
    return Labelling(np.concatenate(parts).astype(np.int32), classes, True)


def _unite_classes(
    sets: Sequence[ImageSet], class_order: ClassOrder, need_labels: bool
) -> tuple[str, ...]:
    """Return the class names of the union of sets with class names, by label."""
    largest = max(sets, key=lambda images: len(images.classes)).classes
    union = {name for images in sets for name in images.classes}
    if union == set(largest):
        return largest
    for images in sets:
        if need_labels and list(images.classes) != sort_classes(images.classes, class_order):
            raise OodHeatmapError(
                f"the classes of {images.source} are not numbered in the order {class_order!r}: "
                "how those of all sources are numbered is unknown. Use sources that have all "
                "classes, or the --class-order of the classifier."
            )
    return tuple(sort_classes(union, class_order))
