"""What a user names; every fault ends in one line."""

import os
import shutil

import numpy as np
import pytest
import torch

from ood_heatmap.decoding import decode
from ood_heatmap.errors import UsageError
from ood_heatmap.images import relabel
from ood_heatmap.pipeline.config import IndexConfig
from ood_heatmap.pipeline.index import build_index
from ood_heatmap.source_array import from_array
from ood_heatmap.sources import open_images


def test_an_unknown_source_lists_the_sets():
    with pytest.raises(UsageError, match=r"'nowhere'.*cifar10.*svhn"):
        open_images("nowhere")


@pytest.mark.parametrize("kind", ["folder", "npy", "npz"])
def test_size_and_time_of_the_file_of_each_image_are_known(tmp_path, kind):
    if kind == "folder":
        root = tmp_path / "set"
        paths = [root / "a" / "x.png", root / "b" / "y.png"]
        for path in paths:
            path.parent.mkdir(parents=True)
            path.write_bytes(b"-")
    else:
        root = tmp_path / f"set.{kind}"
        array = np.zeros((2, 3, 8, 8), np.uint8)
        np.save(root, array) if kind == "npy" else np.savez(root, images=array)
        paths = [root, root]
    for number, path in enumerate(paths):
        os.utime(path, ns=(0, 1_600_000_000_123_456_789 + number))
    wanted = [[path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
    stamps = open_images(str(root)).stamps
    assert stamps is not None
    assert stamps.tolist() == wanted
    assert from_array(np.zeros((2, 3, 8, 8), np.uint8)).stamps is None


def test_the_class_order_that_index_names_gives_the_accuracy_it_says(data, classifier, tmp_path):
    """Folders 2, 10, 30, 100 are the classifier's classes 0 to 3 in their natural order."""
    names = ["2", "10", "30", "100"]
    pictures = open_images(str(data / "id"))
    pixels = decode(pictures, np.arange(len(pictures)), classifier.config.transform).pixels
    prediction = classifier(torch.from_numpy(pixels)).logits.argmax(dim=1).tolist()
    for name in names:
        (tmp_path / "set" / name).mkdir(parents=True)
    for row, label in enumerate(prediction):
        shutil.copy(data / "id" / pictures.names[row], tmp_path / "set" / names[label])
    config = IndexConfig(batch_size=32)
    found = build_index(tmp_path / "a", open_images(str(tmp_path / "set")), classifier, config)
    assert found.results["accuracy"] < 0.9
    (warning,) = found.results["warnings"]
    assert "The natural order of the classes (2, 10, 30, ...) gives 100.00%" in warning
    assert warning.endswith("index the folders with --class-order natural.")
    images = open_images(str(tmp_path / "set"), class_order="natural")
    found = build_index(tmp_path / "b", images, classifier, config)
    assert found.results["accuracy"] == 1
    assert found.results["classes"] == names
    # a test set lists its folders in its own order, and is matched by name
    others = relabel(open_images(str(tmp_path / "set")), found.results["classes"])
    expected = [names.index(name.partition("/")[0]) for name in others.names]
    assert others.labels.tolist() == expected
