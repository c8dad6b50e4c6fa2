"""The four stages from Python: a network in memory, plain paths, defaults."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import ood_heatmap
from ood_heatmap import (
    EvaluateConfig,
    HeatmapDetector,
    IndexConfig,
    TrainConfig,
    build_index,
    build_targets,
    evaluate,
    train,
)
from ood_heatmap.checkpoints import hash_weights
from ood_heatmap.errors import OodHeatmapError, StaleCacheError, UsageError
from ood_heatmap.pipeline.run import read_manifest
from ood_heatmap.sources import open_images

QUICK = TrainConfig(epochs=1, batch_size=32, width=32)


class Small(nn.Module):
    """A network that can be imported from nowhere but here."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(6, 6, 3, 2, 1), nn.ReLU())
        self.head = nn.Linear(6, 4)
        # so that several classes are predicted
        self.head.weight.data *= 20

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.first(images)).mean(dim=(2, 3)))


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return Small(seed=0)


@pytest.fixture(scope="module")
def run(tmp_path_factory, data, network) -> str:
    run = str(tmp_path_factory.mktemp("python") / "run")
    indexed = build_index(
        run, str(data / "id"), network=network, transform=16, mean=(0.5,) * 3, std=(0.25,) * 3
    )
    assert indexed.num_images == 80
    assert build_targets(run, data / "ood").num_images == 50
    train(run, config=QUICK)
    results = evaluate(run, data / "test", [data / "far"], config=EvaluateConfig(neighbours=5))
    assert results.false_alarm == 0.05
    return run


def test_a_network_in_memory_goes_through_all_stages(run, network, data):
    detector = HeatmapDetector.load(run, "cpu")
    result = detector(sorted((data / "far").iterdir()))
    images = torch.from_numpy(np.stack([np.asarray(result.image(i)) for i in range(3)]))
    assert len(result) == 25
    assert images.shape == (3, 24, 24, 3)
    recorded = read_manifest(Path(run), "index").inputs["classifier"]
    assert recorded["weights"] == hash_weights(network)
    assert recorded["spec"] == "in-memory/Small"


def test_the_network_of_the_user_stays_as_it_was(run, network):
    assert network.training
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_another_process_needs_the_network_again(run):
    code = (
        "import sys; from ood_heatmap import HeatmapDetector\n"
        "from ood_heatmap.errors import OodHeatmapError\n"
        "try:\n    HeatmapDetector.load(sys.argv[1], 'cpu')\n"
        "except OodHeatmapError as error:\n    print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, run], capture_output=True, text=True, check=True
    )
    (line,) = done.stdout.splitlines()
    assert "passed from Python (Small, weights" in line
    assert "pass it again as network=" in line


def test_another_network_is_refused(run):
    with pytest.raises(StaleCacheError, match="weights was"):
        HeatmapDetector.load(run, "cpu", network=Small(seed=1))


def test_a_copy_of_the_network_is_the_network(run):
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3)).astype(np.uint8)
    wanted = HeatmapDetector.load(run, "cpu")(images).score
    found = HeatmapDetector.load(run, "cpu", network=Small(seed=0))(images).score
    np.testing.assert_array_equal(found, wanted)


def test_a_named_network_and_an_opened_set(tmp_path, data, spec):
    images = open_images(str(data / "id"))
    weights = data / "weights.safetensors"
    results = build_index(tmp_path / "run", images, network=spec, weights=weights, device="cpu")
    assert results.classes == tuple(f"class{number}" for number in range(4))
    assert results.classifier["spec"] == spec


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({}, "pass transform="),
        ({"transform": 16, "weights": "w.pt"}, "weights= is for a network that is named"),
        ({"transform": 16, "mean": (0.5,)}, "three numbers"),
        ({"transform": 16, "num_classes": 7}, "has 4 classes, not 7"),
        ({"transform": 16, "mean": (124.0, 117.0, 104.0)}, "divide values"),
        ({"transform": nn.ReLU()}, "a step ReLU"),
    ],
)
def test_what_does_not_fit_a_network_is_refused_before_anything_is_written(
    tmp_path, data, network, arguments, named
):
    with pytest.raises(UsageError, match=named):
        build_index(tmp_path / "run", data / "id", network=network, **arguments)
    assert not (tmp_path / "run").exists()


def test_a_network_that_cannot_be_copied_is_one_line(tmp_path, data, network):
    broken = Small(seed=0)
    broken.weight = broken.head.weight * 2  # not a leaf
    with pytest.raises(OodHeatmapError, match=r"cannot be copied.*file\.py:function"):
        build_index(tmp_path / "run", data / "id", network=broken, transform=16)


def test_image_sets_are_checked(run, data):
    for images, named in (
        ([], "no image set"),
        ([open_images(str(data / "far"))] * 2, "one opened image set"),
        ([str(data / "far")] * 2, "named twice"),
    ):
        with pytest.raises(UsageError, match=named):
            build_targets(run, images)
    with pytest.raises(UsageError, match="two OOD sets are named 'far'"):
        evaluate(run, data / "test", [data / "far", data / "far"])


def test_the_package_is_light_until_something_is_used():
    code = "import sys, ood_heatmap; print(dir(ood_heatmap), *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "build_index" in done.stdout
    assert "torch" not in done.stdout.split()
    for name in ood_heatmap.__all__:
        assert getattr(ood_heatmap, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'other'"):
        _ = ood_heatmap.other
    assert IndexConfig is ood_heatmap.IndexConfig
