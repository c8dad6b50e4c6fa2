"""Open the image sets and the classifier named by command-line options."""

import logging
import os
import re
from pathlib import Path

import torch

from ood_heatmap.classifier import Classifier, load_classifier
from ood_heatmap.distributed import main_process_first
from ood_heatmap.errors import UsageError
from ood_heatmap.images import ClassOrder, ImageSet
from ood_heatmap.patterns import is_pattern
from ood_heatmap.pipeline.config import ClassifierOptions, DataOptions, TestData
from ood_heatmap.sources import open_union

log = logging.getLogger(__name__)


def open_source(source: str, data: DataOptions) -> ImageSet:
    """Open an image set; rank 0 first, so that only one rank downloads."""
    return open_sources((source,), data)


def open_sources(
    sources: tuple[str, ...],
    data: DataOptions,
    *,
    class_order: ClassOrder = "name",
    need_labels: bool = True,
) -> ImageSet:
    """Open the union of image sets; rank 0 first, so that only one rank downloads.

    Args:
        sources: Sources as named by the user, at least one.
        data: Root folder and download option.
        class_order: Order of class names that defines the labels.
        need_labels: Raise if the classes of the sources cannot be matched.
    """
    with main_process_first():
        images = open_union(
            sources,
            data_root=data.data_root,
            download=data.download,
            class_order=class_order,
            need_labels=need_labels,
        )
    log.debug("%s: %d images, %d classes", images.source, len(images), len(images.classes))
    return images


def open_ood_sets(data: TestData) -> dict[str, ImageSet]:
    """Open the OOD test sets, by name."""
    sets: dict[str, ImageSet] = {}
    for text in data.ood_sources:
        name, source = split_named_source(text)
        if name in sets:
            raise UsageError(f"two OOD sets are named {name!r}: name them with NAME=SOURCE.")
        sets[name] = open_source(source, data)
    return sets


def split_named_source(text: str) -> tuple[str, str]:
    """Split ``NAME=SOURCE``.

    The name defaults to the stem of a path, the beginning of a pattern of paths or the folder that
    it is in, or the name of a data set.
    """
    name, equals, source = text.partition("=")
    if equals and not Path(text).exists():
        return name, source
    path = Path(text)
    if path.exists():
        return path.stem, text
    if is_pattern(text):
        beginning = re.split(r"[*?\[{]", path.name)[0]
        return Path(beginning).stem.rstrip("-_.") or path.parent.name, text
    return text.partition("/")[0], text


def near_names(near: tuple[str, ...], ood_sources: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of the near-OOD sets, given as name, source, or ``NAME=SOURCE``."""
    named = [(text, *split_named_source(text)) for text in ood_sources]
    names = {
        os.path.normpath(given): name for text, name, source in named for given in (text, source)
    }
    names |= {name: name for _, name, _ in named}
    return tuple(dict.fromkeys(names.get(os.path.normpath(given), given) for given in near))


def open_classifier(options: ClassifierOptions, device: torch.device) -> Classifier:
    """Load the classifier named by the options; rank 0 first."""
    with main_process_first():
        classifier = load_classifier(
            options.spec,
            weights=options.weights,
            num_classes=options.num_classes,
            mean=options.mean,
            std=options.std,
            size=options.size,
            head=options.head,
            num_maps=options.feature_maps,
            autocast=options.autocast,
        )
    log.debug("%s: %s", options.spec, classifier.config)
    return classifier.to(device)
