"""The demo: its data, and what it refuses."""

import os
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_sample_images

from ood_heatmap.demo import FOLDERS, WEIGHTS, demo_commands, demo_images, train_classifier
from ood_heatmap.errors import OodHeatmapError, UsageError
from ood_heatmap.pipeline import demo as demo_module
from ood_heatmap.pipeline.demo import prepare_demo


@pytest.fixture
def few_images(monkeypatch):
    """Make the demo write few images, two sets of them, and train on them for one epoch."""
    monkeypatch.setattr(demo_module, "demo_images", lambda: islice(demo_images(), 1430, 1450))
    monkeypatch.setattr(
        demo_module,
        "train_classifier",
        lambda folder, weights: train_classifier(folder, weights, epochs=1),
    )


def test_images_are_the_same_every_time_and_fill_every_folder():
    first, second = (list(demo_images()) for _ in range(2))
    counts = Counter(name.split("/")[0] for name, _ in first)
    assert list(counts) == list(FOLDERS)
    assert counts["id-train"] + counts["id-test"] == 1797
    assert len(dict(first)) == len(first)
    for (name, image), (other_name, other) in zip(first, second, strict=True):
        assert name == other_name
        np.testing.assert_array_equal(np.asarray(image), np.asarray(other))
        assert (image.mode, image.size) == ("RGB", (32, 32))


def test_the_classifier_learns_and_leaves_the_global_generator_alone():
    digits = [(name.split("/"), image) for name, image in islice(demo_images(), 400)]
    images = np.stack([np.asarray(image) for _, image in digits])
    labels = np.array([int(label) for (_, label, _), _ in digits])
    before = torch.get_rng_state()
    network = train_classifier(images, labels, epochs=25)
    torch.testing.assert_close(torch.get_rng_state(), before)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    with torch.inference_mode():
        accuracy = (network(pixels).argmax(dim=1).numpy() == labels).mean()
    assert accuracy > 0.9


@pytest.mark.usefixtures("few_images")
def test_a_demo_that_was_interrupted_is_made_whole(tmp_path):
    run = tmp_path / "demo"
    (run / "data" / "id-train" / "0").mkdir(parents=True)
    (run / "data" / "id-train" / "0" / "0010.png").write_bytes(b"half")
    (run / "data" / f".{WEIGHTS}.tmp").write_bytes(b"half")
    data = prepare_demo(run)
    assert set(load_file(data / WEIGHTS)) >= {"linear.weight", "linear.bias"}
    assert {path.name for path in data.iterdir()} == {"id-train", "id-test", "photo", WEIGHTS}
    written = (data / WEIGHTS).stat().st_mtime_ns
    assert prepare_demo(run) == data
    assert (data / WEIGHTS).stat().st_mtime_ns == written
    *stages, predict = demo_commands(run, data)
    assert [command[0] for command in stages] == ["index", "targets", "train", "evaluate"]
    assert all(isinstance(argument, str) for command in (*stages, predict) for argument in command)
    # pictures mirror the folders below the one that all images have in common
    assert Path(os.path.commonpath(predict[2:-3])) == data
    with Image.open(predict[2]) as photograph:
        # of this one the test set has crops, not of the one of the training set
        np.testing.assert_array_equal(np.asarray(photograph), load_sample_images().images[1])


@pytest.mark.parametrize("own", ["index/manifest.json", "photo.jpg", "data/mine/a.png"])
def test_a_directory_with_anything_else_is_refused_and_left_alone(tmp_path, own):
    (tmp_path / own).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / own).write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UsageError, match="is not a run of the demo: use a new directory"):
        prepare_demo(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.usefixtures("few_images")
def test_a_refused_write_names_the_file(tmp_path):
    data = tmp_path / "data" / "id-train"
    data.mkdir(parents=True)
    for label in range(10):
        (data / str(label)).write_text("no folder")
    with pytest.raises(OodHeatmapError, match=r"cannot write .*id-train"):
        prepare_demo(tmp_path)
