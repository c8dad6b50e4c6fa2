"""Ranges of the decoder's inputs: those of all ID images, found without reading them again."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from ood_heatmap.duplicates import hash_pixels
from ood_heatmap.errors import OodHeatmapError
from ood_heatmap.pipeline import index as index_module
from ood_heatmap.pipeline import ranges as module
from ood_heatmap.pipeline import schedule
from ood_heatmap.pipeline.config import IndexConfig
from ood_heatmap.pipeline.index import build_index
from ood_heatmap.pipeline.ranges import STATISTICS, input_ranges, spatial_statistics
from ood_heatmap.pipeline.run import PIXEL_HASHES, Index, open_index
from ood_heatmap.pipeline.schedule import write_intermediate
from ood_heatmap.sources import open_images


def test_statistics_of_a_map_are_its_mean_and_squared_deviations():
    maps = np.random.default_rng(0).normal(100, 3, (5, 7, 4, 6)).astype(np.float16)
    found = spatial_statistics(torch.from_numpy(maps)).numpy()
    wide = maps.astype(np.float64)
    np.testing.assert_allclose(found[:, 0], wide.mean(axis=(2, 3)), rtol=1e-6)
    np.testing.assert_allclose(found[:, 1], wide.var(axis=(2, 3)) * 24, rtol=1e-4)


def test_a_constant_channel_has_no_deviation_at_all():
    """One left by rounding would be divided by."""
    maps = torch.full((2, 3, 7, 7), 0.1).half()
    assert (spatial_statistics(maps)[:, 1] == 0).all()


def brute_force(index: Index, rows: np.ndarray, num_maps: int) -> list[np.ndarray]:
    """Return mean, and mean plus deviation, of inputs and of maps over some rows, in float64."""
    columns = {
        name: column.read()[rows].astype(np.float64) for name, column in index.columns.items()
    }
    maps = [columns[f"feature_maps_{number + 1}"] for number in range(num_maps)]
    deviations = [maps[0].std(axis=(2, 3), ddof=1)] if maps else []
    vectors = [np.concatenate([columns["features"], *deviations], axis=1)]
    vectors += [item.transpose(0, 2, 3, 1).reshape(-1, item.shape[1]) for item in maps]
    return [np.stack([item.mean(axis=0), item.mean(axis=0) + item.std(axis=0)]) for item in vectors]


def found(index: Index, num_maps: int) -> list[np.ndarray]:
    inputs, maps = input_ranges(index, num_maps)
    return [np.stack(ends) for ends in (inputs, *maps)]


def without_statistics(index: Index) -> Index:
    """Return the index as an earlier version would have made it."""
    files = {name: item for name, item in index.manifest.files.items() if name != STATISTICS}
    return replace(index, manifest=replace(index.manifest, files=files))


@pytest.mark.parametrize("num_maps", [0, 1, 2])
@pytest.mark.parametrize("stored", [True, False])
def test_ranges_are_those_of_all_id_images(finished_run, monkeypatch, num_maps, stored):
    index = open_index(finished_run)
    wanted = brute_force(index, np.arange(80), num_maps)
    if stored:
        monkeypatch.setattr(module, "_sample_moments", None)
    else:
        index = without_statistics(index)
        monkeypatch.setattr(module, "_CHUNK_BYTES", 10_000)  # several chunks
    for ours, truth in zip(found(index, num_maps), wanted, strict=True):
        np.testing.assert_allclose(ours, truth, rtol=1e-5, atol=1e-6)


def test_a_large_index_of_an_earlier_version_is_sampled(finished_run, monkeypatch):
    monkeypatch.setattr(module, "_SAMPLE", 30)
    index = without_statistics(open_index(finished_run))
    rows = np.sort(np.random.default_rng(0).choice(80, 30, replace=False))
    for ours, truth in zip(found(index, 1), brute_force(index, rows, 1), strict=True):
        np.testing.assert_allclose(ours, truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("earlier_version", [False, True])
def test_an_index_that_was_stopped_has_the_statistics_of_an_unbroken_one(
    data, classifier, tmp_path, monkeypatch, earlier_version
):
    """An earlier version leaves shards without statistics: they are computed from the shards."""
    config = IndexConfig(batch_size=16)
    monkeypatch.setattr(schedule, "rows_per_shard", lambda *_: 16)
    images, written = open_images(str(data / "id")), list[str]()

    def stop(stage, task, arrays):
        if len(written) == 3:
            raise OodHeatmapError("stopped")
        written.append(task.name)
        if not earlier_version:
            write_intermediate(stage, task, arrays)

    build_index(tmp_path / "unbroken", images, classifier, config)
    monkeypatch.setattr(index_module, "write_intermediate", stop)
    with pytest.raises(OodHeatmapError, match="stopped"):
        build_index(tmp_path / "stopped", images, classifier, config)
    monkeypatch.setattr(index_module, "write_intermediate", write_intermediate)
    build_index(tmp_path / "stopped", images, classifier, config)
    for file in (STATISTICS, PIXEL_HASHES):
        wanted, found = (
            load_file(tmp_path / name / "index" / file) for name in ("unbroken", "stopped")
        )
        assert wanted.keys() == found.keys()
        for name, values in wanted.items():
            np.testing.assert_array_equal(found[name], values)
    stored = open_index(tmp_path / "stopped")
    np.testing.assert_array_equal(
        stored.pixel_hashes(), hash_pixels(stored.columns["images"].read())
    )
    assert not list((tmp_path / "stopped" / "index").glob("*.intermediate"))
