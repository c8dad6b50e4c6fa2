"""Image sets in WebDataset shards, which are tar files; an image is read by its position."""

import logging
import time
from collections.abc import Mapping, Sequence

import numpy as np

from ood_heatmap.decoding import prefetch
from ood_heatmap.errors import OodHeatmapError, printable
from ood_heatmap.images import ClassOrder, ImageSet
from ood_heatmap.listing import Labelling, Labels
from ood_heatmap.packed import set_of_packed
from ood_heatmap.source_folder import image_suffixes
from ood_heatmap.tar_index import TarIndex, add_text, index_tar

log = logging.getLogger(__name__)

# more than cores: they wait for the disk
_LISTING_THREADS = 8
_LOG_SECONDS = 10.0


def open_tars(paths: Sequence[str], *, source: str, class_order: ClassOrder = "name") -> ImageSet:
    """Open WebDataset shards as one image set.

    The image of a sample is its member with the suffix of an image. Its label is in ``.cls``, or in
    ``.json`` under ``label``. If labels are numbers and ``.txt`` is the same in all samples of a
    class, it is the name of the class.

    Args:
        paths: The tar files, in the order of their rows.
        source: Name for messages.
        class_order: Order in which class names are numbered.

    Raises:
        OodHeatmapError: A shard is damaged or compressed, a label cannot be read, or there are no
            images.
    """
    shown = printable(source)
    indexes = _list_all(paths, shown)
    if not any(len(index.images.names) for index in indexes):
        suffixes = ", ".join(sorted(image_suffixes()))
        raise OodHeatmapError(
            f"{shown} contains no images (looked for {suffixes} in tar files). "
            "Use tar files with images."
        )
    num_without_image = sum(index.num_without_image for index in indexes)
    if num_without_image:
        log.warning("%s: samples without an image: %d", shown, num_without_image)
    labelling = _join_labels(indexes, shown, class_order)
    return set_of_packed([index.images for index in indexes], labelling, source=source)


def _list_all(paths: Sequence[str], source: str) -> list[TarIndex]:
    """List the shards, and log the progress where that takes long: for the first time."""
    indexes, logged = [], time.monotonic()
    for index in prefetch(index_tar, paths, workers=_LISTING_THREADS):
        indexes.append(index)
        if time.monotonic() - logged > _LOG_SECONDS:
            logged = time.monotonic()
            log.info("%s: listed %d of %d tar files, once", source, len(indexes), len(paths))
    return indexes


def _join_labels(indexes: Sequence[TarIndex], source: str, class_order: ClassOrder) -> Labelling:
    """Return the labels of all shards."""
    labels, texts = Labels(source), dict[str, str]()
    for index in indexes:
        labels.extend(np.array(index.labels.codes, np.int32), index.labels.texts)
        for label, text in index.class_texts.items():
            add_text(texts, label, text)
    return labels.resolve(_class_names(texts, labels.texts), class_order)


def _class_names(texts: Mapping[str, str], labels: Sequence[str]) -> list[str]:
    """Return the names of the classes by number; none unless every class has its own."""
    count = len(set(labels) - {"-1"})
    names = [texts.get(str(number), "") for number in range(count)]
    return names if all(names) and len(set(names)) == count else []
