"""Localisation: the table equals one recomputed from the run's own parts, controls and all."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from ood_heatmap.detector import HeatmapDetector
from ood_heatmap.errors import OodHeatmapError, StaleCacheError, UsageError
from ood_heatmap.localization import localization_metrics
from ood_heatmap.patches import SIDES, SQUARES, PatchKinds, draw_patch, paste_all
from ood_heatmap.pipeline import localize as module
from ood_heatmap.pipeline import pixel_methods
from ood_heatmap.pipeline.config import LocalizeConfig, TrainConfig
from ood_heatmap.pipeline.localization_table import LocalizationRow, format_localization
from ood_heatmap.pipeline.localize import localize
from ood_heatmap.pipeline.page import redraw_page
from ood_heatmap.pipeline.run import open_decoder, open_index
from ood_heatmap.pipeline.train import train_decoder
from ood_heatmap.pipeline.verify import verify
from ood_heatmap.sources import open_images

CPU = torch.device("cpu")
CONFIG = LocalizeConfig(count=12, batch_size=16)
METHODS = [
    "heatmap",
    "centre prior",
    "nearest difference",
    "feature distance",
    "shuffled weights",
    "swapped class",
]


def measure(run, data, config=CONFIG):
    sets = {name: open_images(str(data / name)) for name in ("far", "ood")}
    return localize(run, open_images(str(data / "test")), sets, CPU, config)


@pytest.fixture(scope="module")
def measured(finished_run, data, tmp_path_factory):
    """Return a run in which localize has run, its decoder with a feature map."""
    run = shutil.copytree(finished_run, tmp_path_factory.mktemp("localize") / "run")
    train_decoder(
        run,
        CPU,
        TrainConfig(epochs=2, batch_size=32, width=32, feature_maps=1, overwrite=True),
    )
    shutil.rmtree(run / "evaluation")
    measure(run, data)
    return run


def table(run):
    content = json.loads((run / "localization" / "localization.json").read_text())
    keys = ("method", "set", "side", "edges")
    return content, {tuple(row[key] for key in keys): row for row in content["table"]}


def methods_of(run):
    index = open_index(run)
    decoder = open_decoder(run, index.manifest, CPU).decoder
    return index, pixel_methods.make_localization_methods(index, decoder, CPU, CONFIG)


def patched(data, run, set_name, side, edges):
    """Return the images and masks of a cell."""
    transform = open_index(run).classifier(CPU).config.transform
    id_pixels, ood_pixels = (
        module._read_sample(open_images(str(data / name)), transform, CONFIG).pixels
        for name in ("test", set_name)
    )
    kinds = PatchKinds((side,), SQUARES.shapes, (edges,))
    patches = [draw_patch(16, 0, row, kinds) for row in range(12)]
    return paste_all(id_pixels, ood_pixels, patches)


def test_every_method_set_size_and_kind_is_there_with_its_means(measured):
    content, rows = table(measured)
    wanted = {
        (method, name, side, edges)
        for method in METHODS
        for name in ("far", "ood", "mean")
        for side in (*SIDES, "mean")
        for edges in (*SQUARES.edges, "mean")
    }
    assert set(rows) == wanted
    for metric in ("pixel_auroc", "aupro", "pointing"):
        cells = [
            rows["heatmap", name, side, edges][metric]
            for name in ("far", "ood")
            for side in SIDES
            for edges in SQUARES.edges
        ]
        assert rows["heatmap", "mean", "mean", "mean"][metric] == pytest.approx(np.mean(cells))
        hard = np.mean([rows["heatmap", "far", side, "hard"][metric] for side in SIDES])
        assert rows["heatmap", "far", "mean", "hard"][metric] == pytest.approx(hard)
    assert content["sets"]["far"]["num_images"] == 12


def test_the_heatmaps_figures_are_those_of_the_detector(measured, data):
    images, masks = patched(data, measured, "far", 0.5, "hard")
    detector = HeatmapDetector.load(measured, "cpu")
    heatmap = torch.from_numpy(detector(images).heatmap)
    scores_by_method = detector.decoder.place_scores(heatmap).numpy()
    wanted = localization_metrics(scores_by_method, masks)
    found = table(measured)[1]["heatmap", "far", 0.5, "hard"]
    assert found["pixel_auroc"] == pytest.approx(wanted.pixel_auroc, abs=1e-5)
    assert found["aupro"] == pytest.approx(wanted.aupro, abs=1e-5)


def test_the_nearest_difference_is_to_the_nearest_id_image_of_the_predicted_class(measured, data):
    index, methods = methods_of(measured)
    images, _ = patched(data, measured, "ood", 0.25, "blended")
    output = methods.forward.classifier(torch.from_numpy(images))
    prediction = output.logits.argmax(dim=1).numpy()
    bank = index.columns["features"].read().astype(np.float64)
    distance = ((output.features.numpy()[:, None] - bank) ** 2).sum(axis=2)
    distance[prediction[:, None] != index.columns["prediction"].read()] = np.inf
    nearest = index.columns["images"].take(distance.argmin(axis=1)).astype(int)
    wanted = np.abs(nearest - images).max(axis=1)
    np.testing.assert_array_equal(methods(images)["nearest difference"], wanted)


def test_the_feature_distance_is_brute_force_to_the_id_places(measured, data):
    index, methods = methods_of(measured)
    images, _ = patched(data, measured, "ood", 0.25, "hard")
    maps = methods.forward.classifier(torch.from_numpy(index.columns["images"].read())).maps[0]
    # so few images that every place is taken
    places = maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1]).numpy()
    assert methods.locations.rows.shape == places.shape
    asked = methods.forward.classifier(torch.from_numpy(images)).maps[0].permute(0, 2, 3, 1).numpy()
    distance = np.sqrt(((asked[..., None, :] - places) ** 2).sum(axis=-1).min(axis=-1))
    wanted = interpolate(torch.from_numpy(distance)[:, None], (16, 16), mode="bilinear")[:, 0]
    np.testing.assert_allclose(methods(images)["feature distance"], wanted, atol=5e-3)


def test_sanity_checks_swap_the_class_and_shuffle_the_weights(measured, data):
    index, methods = methods_of(measured)
    images, _ = patched(data, measured, "ood", 0.25, "hard")
    output = methods.forward.classifier(torch.from_numpy(images))
    swapped = (output.logits.argmax(dim=1) + 1) % 4
    maps = [output.maps[0].half().float()]
    with torch.no_grad():
        heatmap, _ = methods.decoder.detect(output.features, swapped, maps)
        wanted = methods.decoder.place_scores(heatmap)
    scores_by_method = methods(images)
    np.testing.assert_allclose(scores_by_method["swapped class"], wanted, atol=1e-5)
    own, shuffled = index.classifier(CPU).network, methods.shuffled.classifier.network
    for before, after in zip(own.parameters(), shuffled.parameters(), strict=True):
        assert torch.equal(before.flatten().sort()[0], after.flatten().sort()[0])
    assert any(
        not torch.equal(*pair) for pair in zip(own.parameters(), shuffled.parameters(), strict=True)
    )
    assert not np.allclose(scores_by_method["shuffled weights"], scores_by_method["heatmap"])


def test_the_centre_prior_looks_at_no_image(measured, data):
    prior = pixel_methods._centre_prior(5)
    assert prior.argmax() == 2 * 5 + 2
    np.testing.assert_allclose(prior, prior[::-1].T)
    rows = table(measured)[1]
    first, second = (rows["centre prior", name, 0.5, "hard"] for name in ("far", "ood"))
    assert first["pixel_auroc"] == second["pixel_auroc"]


def test_a_sanity_check_that_lowers_nothing_is_said(measured, caplog):
    rows = [
        LocalizationRow(method, "mean", "mean", "mean", {"pixel_auroc": value}, np.zeros((0, 3)))
        for method, value in [("heatmap", 0.8), ("shuffled weights", 0.6), ("swapped class", 0.9)]
    ]
    lowered = module._check_sanity(rows)
    assert lowered == pytest.approx({"shuffled weights": 0.2, "swapped class": -0.1})
    assert [record.getMessage()[:13] for record in caplog.records] == ["swapped class"]


def test_made_again_it_is_the_same_byte_for_byte_and_verified(measured, data, tmp_path, tree):
    run = shutil.copytree(measured, tmp_path / "run")
    assert "localization: 2 files unchanged" in verify(run)
    (run / "localization" / "localization.json").unlink()
    with pytest.raises(OodHeatmapError, match=r"localization\.json is missing"):
        verify(run)
    shutil.rmtree(run / "localization")
    measure(run, data)
    assert tree(run / "localization") == tree(measured / "localization")
    before = (run / "localization" / "manifest.json").stat().st_mtime_ns
    measure(run, data)  # finished: nothing is written
    assert (run / "localization" / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(StaleCacheError, match=r"different options\.seed"):
        measure(run, data, LocalizeConfig(count=12, seed=1))


def test_images_that_changed_with_the_same_listing_are_noticed(measured, data, tmp_path):
    run = shutil.copytree(measured, tmp_path / "run")
    images = open_images(str(data / "test"))
    other = open_images(str(data / "far"))
    swapped = replace(images, reader=other.reader)  # other bytes behind the same names and sizes
    sets = {name: open_images(str(data / name)) for name in ("far", "ood")}
    config = replace(CONFIG, count=10)
    localize(run, images, sets, CPU, replace(config, overwrite=True))
    before = table(run)[1]
    with pytest.raises(StaleCacheError, match=r"other images \(images\.content differs\)"):
        localize(run, swapped, sets, CPU, config)
    localize(run, swapped, sets, CPU, replace(config, overwrite=True))
    assert table(run)[1] != before


def test_a_decoder_without_maps_and_a_network_without_any(run, data, monkeypatch):
    measure(run, data, LocalizeConfig(count=2, batch_size=16))
    assert {row["method"] for row in table(run)[0]["table"]} == set(METHODS)

    def none(*_: object):
        raise OodHeatmapError("no spatial feature maps")

    index = open_index(run)
    content = index.manifest.results["classifier"]
    monkeypatch.setitem(content, "num_maps", 0)
    monkeypatch.setitem(index.manifest.inputs["classifier"], "num_maps", 0)
    monkeypatch.setitem(index.manifest.inputs["classifier"], "maps", [])
    monkeypatch.setattr("ood_heatmap.classifier.find_maps", none)
    decoder = open_decoder(run, index.manifest, CPU).decoder
    methods = pixel_methods.make_localization_methods(index, decoder, CPU, CONFIG)
    scores_by_method = methods(np.zeros((2, 3, 16, 16), np.uint8))
    assert list(scores_by_method) == [method for method in METHODS if method != "feature distance"]


@pytest.mark.parametrize("name", ["id", "mean"])
def test_names_with_a_meaning_of_their_own_are_refused(run, data, name):
    images = open_images(str(data / "far"))
    with pytest.raises(UsageError, match=f"cannot be called '{name}'"):
        localize(run, images, {name: images}, CPU, CONFIG)


def test_a_set_with_nothing_readable_is_one_line(run, data, tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"broken")
    broken = open_images(str(tmp_path / "broken"))
    config = LocalizeConfig(count=3, skip_unreadable=True)
    with pytest.raises(OodHeatmapError, match=r"none of 1 images of .* is readable"):
        localize(run, broken, {"far": open_images(str(data / "far"))}, CPU, config)


def test_the_table_has_a_line_for_each_method_and_set(measured):
    content, rows = table(measured)
    text, ahead = format_localization(content).split("\n\n")
    lines = text.splitlines()
    assert len(lines) == 1 + len(METHODS) * 3
    assert lines[0].split()[:3] == ["method", "set", "AUROC"]
    mean = next(line for line in lines if line.startswith("heatmap") and " mean " in line)
    row = rows["heatmap", "mean", "mean", "mean"]
    for key in ("pixel_auroc", "aupro", "pointing"):
        low, high = row["intervals"][key]
        assert f"{100 * row[key]:.1f} [{100 * low:.1f}, {100 * high:.1f}]" in mean
    lines = ahead.splitlines()
    assert len(lines) == len(METHODS)
    lead = content["leads"]["centre prior"]
    for key in ("pixel_auroc", "aupro", "pointing"):
        other = rows["centre prior", "mean", "mean", "mean"]
        assert lead[key] == pytest.approx(row[key] - other[key])
        low, high = lead["intervals"][key]
        assert low <= lead[key] <= high
        assert f"{100 * lead[key]:+.1f} [{100 * low:.1f}, {100 * high:.1f}]" in lines[1]


def test_intervals_are_those_of_drawing_images_again(measured, data):
    """The interval of a cell against sklearn's figures of images drawn with NumPy."""
    images, masks = patched(data, measured, "far", 0.5, "hard")
    scores_by_method = methods_of(measured)[1](images)["heatmap"]
    generator, drawn = np.random.default_rng(1), []
    for _ in range(400):
        rows = generator.integers(0, 12, 12)
        drawn.append(localization_metrics(scores_by_method[rows], masks[rows]))
    row = table(measured)[1]["heatmap", "far", 0.5, "hard"]
    for key in ("pixel_auroc", "aupro", "pointing"):
        values = np.array([getattr(one, key) for one in drawn])
        low, high = row["intervals"][key]
        assert low <= row[key] <= high
        np.testing.assert_allclose(
            (low, high), np.quantile(values, [0.025, 0.975]), atol=0.25 * np.ptp(values) + 1e-6
        )


def test_the_report_is_drawn_again_with_the_localization(measured, run, data, tree):
    page = run / "evaluation" / "report.html"
    before = tree(run / "evaluation")
    assert 'id="localization"' not in page.read_text()
    measure(run, data)
    assert 'id="localization"' in page.read_text()
    assert tree(run / "evaluation") == before
    # without an evaluation there is nothing to draw
    assert not (measured / "evaluation").exists()


def test_a_damaged_evaluation_does_not_fail_it(run, data, caplog):
    (run / "evaluation" / "report.json").write_text("{")
    measure(run, data)
    assert "the report was not drawn again" in caplog.text


def test_the_report_of_an_evaluation_by_an_earlier_version_is_left_as_it_is(tmp_path):
    old = Path(__file__).parent / "data" / "format-2" / "run"
    run = shutil.copytree(old, tmp_path / "run")
    page = run / "evaluation" / "report.html"
    before = page.read_bytes()
    redraw_page(run)
    assert page.read_bytes() == before
