"""The image sets and the classifier that a user names, opened."""

import logging
import os
from pathlib import Path

import torch

from ood_heatmap.classifier import Classifier, load_classifier
from ood_heatmap.distributed import main_process_first
from ood_heatmap.errors import UsageError
from ood_heatmap.images import ClassOrder, ImageSet
from ood_heatmap.pipeline.config import ClassifierOptions, DataOptions, TestData
from ood_heatmap.sources import open_images

log = logging.getLogger(__name__)


def open_source(source: str, data: DataOptions, *, class_order: ClassOrder = "name") -> ImageSet:
    """Open an image set; rank 0 first, so that only one process downloads."""
    with main_process_first():
        images = open_images(
            source, data_root=data.data_root, download=data.download, class_order=class_order
        )
    log.debug("%s: %d images, %d classes", source, len(images), len(images.classes))
    return images


def open_ood_sets(data: TestData) -> dict[str, ImageSet]:
    """Open the OOD test sets, by name."""
    sets: dict[str, ImageSet] = {}
    for item in data.ood_sources:
        name, source = split_named_source(item)
        if name in sets:
            raise UsageError(f"two OOD sets are called {name!r}: name them with NAME=SOURCE.")
        sets[name] = open_source(source, data)
    return sets


def split_named_source(item: str) -> tuple[str, str]:
    """Split ``NAME=SOURCE``; without a name it is the last part of the source."""
    name, equals, source = item.partition("=")
    if equals and not Path(item).exists():
        return name, source
    path = Path(item)
    return (path.stem if path.exists() else item.partition("/")[0]), item


def near_names(near: tuple[str, ...], ood_sources: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of near sets that were given by name, by source, or by both."""
    named = [(item, *split_named_source(item)) for item in ood_sources]
    names = {
        os.path.normpath(text): name for item, name, source in named for text in (item, source)
    }
    names |= {name: name for _, name, _ in named}
    return tuple(dict.fromkeys(names.get(os.path.normpath(item), item) for item in near))


def open_classifier(given: ClassifierOptions, device: torch.device) -> Classifier:
    """Load the classifier that the options name, rank 0 first."""
    with main_process_first():
        classifier = load_classifier(
            given.spec,
            weights=given.weights,
            num_classes=given.num_classes,
            mean=given.mean,
            std=given.std,
            size=given.size,
            head=given.head,
            num_maps=given.feature_maps,
            autocast=given.autocast,
        )
    log.debug("%s: %s", given.spec, classifier.config)
    return classifier.to(device)
