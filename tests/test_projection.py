"""Wide feature maps are cached as their principal components, the same in every stage."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save
from sklearn.decomposition import PCA

from ood_heatmap.classifier import load_classifier
from ood_heatmap.detector import HeatmapDetector
from ood_heatmap.errors import DamagedCacheError, OodHeatmapError, StaleCacheError
from ood_heatmap.pipeline import channels, index
from ood_heatmap.pipeline.config import IndexConfig, LocalizeConfig, TargetsConfig, TrainConfig
from ood_heatmap.pipeline.export import export
from ood_heatmap.pipeline.index import build_index
from ood_heatmap.pipeline.localize import localize
from ood_heatmap.pipeline.plan import plan_index
from ood_heatmap.pipeline.run import open_index, open_targets
from ood_heatmap.pipeline.targets import build_targets
from ood_heatmap.pipeline.train import train_decoder
from ood_heatmap.pipeline.verify import verify
from ood_heatmap.projection import Projection, fit_projection, load_projections, to_tensors
from ood_heatmap.sources import open_images

CPU = torch.device("cpu")
# maps of the test classifier have 8 and 6 channels
CONFIG = IndexConfig(batch_size=16, map_channels=7)


def test_a_projection_is_scikit_learns():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(12, 12, generator=generator)
    maps = torch.einsum("dc,bchw->bdhw", mixing, torch.randn(40, 12, 3, 3, generator=generator)) + 5
    projection = fit_projection(maps.split(16), 4)
    vectors = maps.permute(0, 2, 3, 1).reshape(-1, 12).numpy()
    wanted = PCA(4, svd_solver="full").fit(vectors)
    np.testing.assert_allclose(projection.mean, wanted.mean_, rtol=1e-5)
    signs = np.sign((projection.weight.numpy() * wanted.components_).sum(axis=1))
    components = signs[:, None] * wanted.components_
    np.testing.assert_allclose(projection.weight, components, atol=1e-4)
    found = projection(maps).permute(0, 2, 3, 1).reshape(-1, 4)
    np.testing.assert_allclose(found, signs * wanted.transform(vectors), atol=1e-3)


def test_a_projection_does_not_depend_on_the_number_of_threads():
    maps, before = torch.randn(64, 32, 7, 7), torch.get_num_threads()
    fitted = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            fitted.append(fit_projection(maps.split(32), 16))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(fitted[0].weight, fitted[1].weight, rtol=0, atol=0)


def test_damaged_projections_are_refused():
    content = to_tensors({"a": Projection(torch.eye(2), torch.zeros(2))})
    path = Path("index/projections.safetensors")
    assert set(load_projections(save(content), path)) == {"a"}
    for damaged in (b"nothing", save({"a.weight": torch.eye(2)})):
        with pytest.raises(DamagedCacheError, match=r"projections.safetensors has no projections"):
            load_projections(damaged, path)


@pytest.fixture(scope="module")
def projected(finished_run, data, spec, tmp_path_factory):
    """Return a run whose deepest map of 8 channels is cached as 7."""
    run = tmp_path_factory.mktemp("projected") / "run"
    classifier = load_classifier(spec, weights=data / "weights.safetensors", num_maps=2)
    build_index(run, open_images(str(data / "id")), classifier, CONFIG)
    build_targets(
        run, open_images(str(data / "ood")), CPU, TargetsConfig(batch_size=16, patched=0.0)
    )
    train_decoder(run, CPU, TrainConfig(epochs=2, batch_size=32, width=32, feature_maps=2))
    return run


def test_all_stages_cache_the_components_of_wide_maps(projected, data, classifier):
    opened = open_index(projected)
    targets = open_targets(projected, opened)
    assert opened.results.map_shapes == ((7, 4, 4), (6, 8, 8))
    vectors = classifier(torch.from_numpy(opened.columns["images"].read())).maps
    # fitted on all of 80 images
    whole = vectors[0].permute(0, 2, 3, 1).flatten(0, 2).numpy()
    cached = opened.columns["feature_maps_1"].read().astype(np.float64)
    components = cached.transpose(0, 2, 3, 1).reshape(-1, 7)
    wanted = np.abs(PCA(7, svd_solver="full").fit_transform(whole))
    np.testing.assert_allclose(np.abs(components), wanted, atol=2e-3 * wanted.max())
    np.testing.assert_allclose(opened.columns["feature_maps_2"].read(), vectors[1], atol=1e-2)
    images = open_images(str(data / "ood"))
    pixels = np.stack([classifier.config.transform(images.read(row)[0]) for row in range(50)])
    restored = opened.classifier(CPU)
    for number, maps in enumerate(restored(torch.from_numpy(pixels)).maps, start=1):
        found = targets.columns[f"feature_maps_{number}"].read()
        np.testing.assert_allclose(found, maps, rtol=1e-2, atol=1e-2)


def test_projections_are_part_of_the_fingerprint(projected, run):
    manifest = open_index(projected).manifest
    assert manifest.inputs["options"]["map_channels"] == 7
    assert "projections.safetensors" in manifest.files
    other = open_index(run).manifest
    assert other.inputs["options"]["map_channels"] is None
    assert "projections.safetensors" not in other.files
    assert manifest.content != other.content


def test_narrow_maps_are_cached_as_they_are(data, run, classifier, tree):
    before = tree(run / "index")
    images = open_images(str(data / "id"))
    for number in (0, 8, 256):
        # already complete
        build_index(run, images, classifier, replace(CONFIG, map_channels=number))
    assert tree(run / "index") == before
    with pytest.raises(StaleCacheError, match=r"options.map_channels \(none, now 7\)"):
        build_index(run, images, classifier, CONFIG)


def test_an_index_that_was_interrupted_keeps_its_projections(
    projected, data, classifier, tmp_path, monkeypatch, tree
):
    run, images = tmp_path / "run", open_images(str(data / "id"))

    def stop(*_):
        raise OodHeatmapError("stopped")

    with monkeypatch.context() as patched:
        patched.setattr(index, "_embed_shards", stop)
        with pytest.raises(OodHeatmapError, match="stopped"):
            build_index(run, images, classifier, CONFIG)
    assert (run / "index" / "projections.safetensors").is_file()
    monkeypatch.setattr(channels, "_fit", None)
    build_index(run, images, classifier, CONFIG)
    assert tree(run / "index") == tree(projected / "index")


def test_a_sample_without_a_readable_image_is_refused(data, classifier, tmp_path):
    shutil.copytree(data / "id", tmp_path / "id")
    for path in (tmp_path / "id").rglob("*.png"):
        path.write_bytes(b"broken")
    config = replace(CONFIG, skip_unreadable=True)
    with pytest.raises(OodHeatmapError, match=r"none of 80 images of .* is readable"):
        build_index(tmp_path / "run", open_images(str(tmp_path / "id")), classifier, config)


def test_every_command_projects_alike(projected, data, tmp_path):
    detector = HeatmapDetector.load(projected, "cpu")
    differences = export(detector, tmp_path / "detector.pt2", "torch")
    assert differences is not None
    assert differences.heatmap < 1e-3
    sets = {"far": open_images(str(data / "far"))}
    config = LocalizeConfig(count=6, batch_size=16)
    localize(projected, open_images(str(data / "test")), sets, CPU, config)
    assert "targets: 50 of 50 paired again, all equal" in verify(projected)


def test_a_plan_counts_the_channels_that_are_cached(projected, data, classifier):
    images = open_images(str(data / "id"))
    planned = [
        plan_index(images, classifier, replace(CONFIG, map_channels=number)).disk
        for number in (0, 7, 4)
    ]
    # one of 8 channels of 4x4 float16 values; four of 8, and as they are 64 values five of 6 of 8x8
    assert planned[0] - planned[1] == 80 * 16 * 2
    assert planned[0] - planned[2] == 80 * (4 * 16 + 5 * 64) * 2
