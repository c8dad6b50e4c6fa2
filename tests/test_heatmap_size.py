"""Heatmaps smaller than the images go through every command."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate

from ood_heatmap.detector import HeatmapDetector
from ood_heatmap.pipeline import pixel_methods
from ood_heatmap.pipeline.config import (
    EvaluateConfig,
    LocalizeConfig,
    PredictConfig,
    TargetsConfig,
    TrainConfig,
)
from ood_heatmap.pipeline.evaluate import evaluate
from ood_heatmap.pipeline.export import export
from ood_heatmap.pipeline.localize import localize
from ood_heatmap.pipeline.plan import plan_targets, plan_train
from ood_heatmap.pipeline.predict import predict
from ood_heatmap.pipeline.run import open_decoder, open_index
from ood_heatmap.pipeline.targets import build_targets
from ood_heatmap.pipeline.train import train_decoder
from ood_heatmap.pipeline.verify import verify
from ood_heatmap.sources import open_images

CPU = torch.device("cpu")
TARGETS = TargetsConfig(patched=0.5, batch_size=16, heatmap_size=8, overwrite=True)
TRAIN = TrainConfig(
    epochs=2,
    batch_size=32,
    width=32,
    feature_maps=1,
    overwrite=True,
    stack="plain",
    target="magnitude",
)
LOCALIZE = LocalizeConfig(count=12, batch_size=16)


@pytest.fixture(scope="module")
def sets(data):
    return {name: open_images(str(data / name)) for name in ("test", "far", "ood")}


@pytest.fixture(scope="module")
def small(finished_run, sets, tmp_path_factory):
    """Return a run of images of 16 px with heatmaps of 8 px."""
    run = Path(shutil.copytree(finished_run, tmp_path_factory.mktemp("small") / "run"))
    shutil.rmtree(run / "evaluation")
    build_targets(run, sets["ood"], CPU, TARGETS)
    train_decoder(run, CPU, TRAIN)
    config = EvaluateConfig(batch_size=16, neighbours=5, examples=3)
    evaluate(run, sets["test"], {"far": sets["far"]}, CPU, config)
    return run


def test_heatmaps_and_scores_have_the_targets_size(small, data):
    detector = HeatmapDetector.load(small, "cpu")
    result = detector([data / "far" / f"{number:03d}.png" for number in range(3)])
    assert result.heatmap.shape == (3, 3, 8, 8)
    means = np.abs(result.heatmap).max(axis=1).mean(axis=(1, 2))
    with np.load(small / "evaluation" / "scores-far.npz") as saved:
        np.testing.assert_allclose(saved["heatmap"][:3], means, rtol=1e-4)
        np.testing.assert_allclose(saved["combined"][:3], result.score, rtol=1e-4, atol=1e-4)


def test_pixel_scores_are_compared_at_the_images_size(small, sets):
    localize(small, sets["test"], {"far": sets["far"]}, CPU, LOCALIZE)
    index = open_index(small)
    decoder = open_decoder(small, index.manifest, CPU).decoder
    methods = pixel_methods.make_localization_methods(index, decoder, CPU, LOCALIZE)
    pixels = index.columns["images"].take(np.arange(4))
    found = methods(pixels)["heatmap"]
    coarse = torch.from_numpy(HeatmapDetector.load(small, "cpu").detect(pixels)[0].pixel_score)
    wanted = interpolate(coarse[:, None], (16, 16), mode="bilinear")[:, 0]
    # maps are rounded to float16 in one and not in the other
    np.testing.assert_allclose(found, wanted, atol=1e-3)
    assert json.loads((small / "localization" / "localization.json").read_text())["table"]


def test_raw_heatmaps_have_the_targets_size_and_pictures_the_images(small, data, tmp_path):
    detector = HeatmapDetector.load(small, "cpu")
    predict(detector, [data / "far" / "000.png"], tmp_path / "out", PredictConfig(workers=1))
    (heatmap,) = (tmp_path / "out" / "heatmaps").glob("*.npy")
    assert np.load(heatmap).shape == (3, 8, 8)
    (picture,) = (tmp_path / "out" / "pictures").glob("*.png")
    with Image.open(picture) as opened:
        assert opened.height > 8


def test_an_exported_file_has_heatmaps_of_the_targets_size(small, tmp_path):
    differences = export(HeatmapDetector.load(small, "cpu"), tmp_path / "detector.pt2", "torch")
    assert differences is not None
    assert differences.heatmap < 1e-3


def test_plans_and_verify_know_the_size(small, sets):
    found = plan_targets(small, sets["ood"], CPU, TARGETS)
    shards = (small / "targets").glob("*.h5")
    written = sum(path.stat().st_size for path in shards)
    assert found.disk <= written < found.disk + 2 * 20_000
    assert plan_train(small, CPU, TRAIN).rows == 80 + 75
    assert "targets: averaged to 8 px, from the images again, all equal" in verify(small)
