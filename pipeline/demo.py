"""Write the demo's images and classifier into its run directory."""

import logging
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.torch import save_file

from ood_heatmap.cache.files import make_directory, replacing
from ood_heatmap.demo import (
    FOLDERS,
    PHOTOGRAPH,
    WEIGHTS,
    demo_images,
    train_classifier,
    whole_photograph,
)
from ood_heatmap.errors import OodHeatmapError, UsageError

log = logging.getLogger(__name__)


def prepare_demo(run: Path) -> Path:
    """Write images and a trained classifier unless they exist, and return their folder.

    Raises:
        UsageError: ``run`` contains files that are not the demo's.
        OodHeatmapError: A file cannot be written.
    """
    data = run / "data"
    if not (data / WEIGHTS).is_file():
        if not _is_free(run):
            raise UsageError(f"{run} is not a run of the demo: use a new directory.")
        _write_data(data)
    # here, so that pictures of predict are not in folders named after those of scikit-learn
    make_directory((data / PHOTOGRAPH).parent)
    with replacing(data / PHOTOGRAPH) as scratch:
        scratch.write_bytes(whole_photograph())
    return data


def _write_data(data: Path) -> None:
    """Write images and a classifier that is trained on them."""
    log.info("writing images to %s and training a small classifier of digits", data)
    images, labels = [], []
    for name, image in demo_images():
        _save_png(image, data / name)
        folder, label, *_ = name.split("/")
        if folder == "id-train":
            images.append(np.asarray(image))
            labels.append(int(label))
    network = train_classifier(np.stack(images), np.array(labels))
    # written last: its existence marks the images as complete
    with replacing(data / WEIGHTS) as scratch:
        save_file(network.state_dict(), scratch)


def _is_free(run: Path) -> bool:
    """Return whether a directory is missing, empty or has data of an interrupted demo."""
    known = {("data",), ("data", f".{WEIGHTS}.tmp"), *(("data", name) for name in FOLDERS)}
    return all(
        path.relative_to(run).parts in known for path in [*run.glob("*"), *run.glob("data/*")]
    )


def _save_png(image: Image.Image, path: Path) -> None:
    """Write one PNG; not atomic, since images are used only once the classifier exists."""
    make_directory(path.parent)
    try:
        image.save(path, "png")
    except OSError as error:
        raise OodHeatmapError(f"cannot write {path}: {error.strerror or error}.") from error
