"""Localisation: the table equals one recomputed from the run's own parts, controls and all."""

import json
import shutil
from collections import Counter
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch.nn.functional import interpolate

from ood_heatmap.decoder import make_decoder
from ood_heatmap.detector import HeatmapDetector
from ood_heatmap.errors import OodHeatmapError, StaleCacheError, UsageError
from ood_heatmap.localization import METRICS, localization_metrics
from ood_heatmap.patches import EDGES, SHAPES, SIDES, PatchKinds, draw_patch, paste_all
from ood_heatmap.pipeline import localize as module
from ood_heatmap.pipeline import pixel_methods
from ood_heatmap.pipeline.config import LocalizeConfig, TrainConfig
from ood_heatmap.pipeline.localization_cells import Cell, draw_weights, iter_cells
from ood_heatmap.pipeline.localization_table import (
    LocalizationRow,
    compare_id_on_id,
    format_localization,
)
from ood_heatmap.pipeline.localize import localize
from ood_heatmap.pipeline.page import redraw_page
from ood_heatmap.pipeline.run import open_decoder, open_index
from ood_heatmap.pipeline.train import train_decoder
from ood_heatmap.pipeline.verify import verify
from ood_heatmap.sources import open_images

CPU = torch.device("cpu")
CONFIG = LocalizeConfig(count=12, batch_size=16, resamples=300)
METHODS = [
    "heatmap",
    "centre prior",
    "nearest difference",
    "feature distance",
    "shuffled weights",
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
    keys = ("method", "set", "side", "shape", "edges")
    return content, {tuple(row[key] for key in keys): row for row in content["table"]}


def row_of(rows, method, name, kind=("mean", "mean", "mean")):
    key = (method, name, *kind)
    return rows[key]


def methods_of(run):
    index = open_index(run)
    decoder = open_decoder(run, index.manifest, CPU).decoder
    return index, pixel_methods.make_localization_methods(index, decoder, CPU, CONFIG)


def samples_of(data, run, *names):
    transform = open_index(run).classifier(CPU).config.transform
    return [module._read_sample(open_images(str(data / name)), transform, CONFIG) for name in names]


def patched(data, run, set_name, side, shape, edges, rows=range(12)):
    """Return the images and masks of a cell."""
    id_pixels, ood_pixels = (item.pixels for item in samples_of(data, run, "test", set_name))
    kinds = PatchKinds((side,), (shape,), (edges,))
    rows = list(rows)
    return paste_all(id_pixels[rows], ood_pixels[rows], [draw_patch(16, 0, i, kinds) for i in rows])


def place_scores(detector, images):
    """Return how much the detector's heatmaps are OOD at each pixel."""
    with torch.no_grad():
        output = detector.classifier(torch.from_numpy(images))
        maps = [item.half().float() for item in output.maps]
        prediction = output.logits.argmax(dim=1)
        return detector.decoder.place_scores(output.features, prediction, maps).numpy()


def rows_of(side, shape, edges):
    """Return the images that are measured with a kind of patch, every third."""
    part = (SIDES.index(side) + SHAPES.index(shape) + EDGES.index(edges)) % 3
    return range(part, 12, 3)


def test_every_kind_of_patch_has_a_third_of_the_images():
    cells = list(iter_cells(12))
    assert {cell.kind for cell in cells} == set(product(SIDES, SHAPES, EDGES))
    assert len(cells) == 36
    for cell in cells:
        assert cell.rows.tolist() == list(rows_of(*cell.kind))
    for row in range(12):
        mine = [cell for cell in cells if row in cell.rows]
        assert {(cell.side, cell.shape) for cell in mine} == set(product(SIDES, SHAPES))
        assert len(mine) == 12
        assert {(cell.side, cell.edges) for cell in mine} == set(product(SIDES, EDGES))
    assert all(len(cell.rows) == 1 for cell in iter_cells(1))


def test_images_are_drawn_again_within_their_third():
    weights = draw_weights(10, 200, seed=0)
    for part in range(3):
        assert set(weights[:, part::3].sum(axis=1)) == {len(range(part, 10, 3))}
    assert weights.min() == 0
    np.testing.assert_array_equal(weights, draw_weights(10, 200, seed=0))


def test_every_method_set_and_kind_is_there_with_its_means(measured):
    content, rows = table(measured)
    kinds: list[tuple[object, ...]] = [(side, "mean", "mean") for side in SIDES]
    kinds += [("mean", *pair) for pair in product((*SHAPES, "mean"), (*EDGES, "mean"))]
    wanted = {
        (method, name, *kind)
        for method in METHODS
        for name in ("far", "ood", "id", "mean")
        for kind in kinds
    }
    assert set(rows) == wanted
    for metric in METRICS:
        both = [rows["heatmap", name, "mean", "mean", "mean"][metric] for name in ("far", "ood")]
        whole = rows["heatmap", "mean", "mean", "mean", "mean"][metric]
        # not over patches of ID images
        assert whole == pytest.approx(np.mean(both))
        for parts in (
            product(SIDES, ["mean"], ["mean"]),
            product(["mean"], SHAPES, ["mean"]),
            product(["mean"], ["mean"], EDGES),
            product(["mean"], SHAPES, EDGES),
        ):
            values = [row_of(rows, "heatmap", "far", kind)[metric] for kind in parts]
            assert both[0] == pytest.approx(np.mean(values))
    assert content["sets"]["far"]["num_images"] == 12


@pytest.mark.parametrize(
    ("name", "shape", "edges"), [("far", "blob", "blended"), ("ood", "square", "hard")]
)
def test_the_heatmaps_figures_are_those_of_the_detector(measured, data, name, shape, edges):
    detector, wanted = HeatmapDetector.load(measured, "cpu"), []
    for side in SIDES:
        cell = (side, shape, edges)
        images, masks = patched(data, measured, name, *cell, rows=rows_of(*cell))
        wanted.append(asdict(localization_metrics(place_scores(detector, images), masks)))
    found = table(measured)[1]["heatmap", name, "mean", shape, edges]
    for metric in METRICS:
        assert found[metric] == pytest.approx(np.mean([one[metric] for one in wanted]), abs=1e-5)


def test_patches_of_other_id_images_are_of_another_class(measured, data):
    (sample,) = samples_of(data, measured, "test")
    methods = methods_of(measured)[1]
    labelled = replace(sample, label=np.arange(12) % 3)
    partners = module._draw_partners(labelled, methods, 0)
    assert (labelled.label[partners] != labelled.label).all()
    assert len(set(partners.tolist())) > 5
    # the images of the folder have no labels
    prediction = methods.predict(sample.pixels)
    output = methods.forward.classifier(torch.from_numpy(sample.pixels))
    np.testing.assert_array_equal(prediction, output.logits.argmax(dim=1))
    partners = module._draw_partners(sample, methods, 0)
    assert (prediction[partners] != prediction).all()
    one_class = replace(sample, label=np.zeros(12, np.int32))
    assert not len(module._draw_partners(one_class, methods, 0))
    detector, wanted = HeatmapDetector.load(measured, "cpu"), []
    for side in SIDES:
        cell = (side, "ellipse", "translucent")
        rows = list(rows_of(*cell))
        patches = [draw_patch(16, 0, i, PatchKinds((side,), cell[1:2], cell[2:])) for i in rows]
        images, masks = paste_all(sample.pixels[rows], sample.pixels[partners[rows]], patches)
        wanted.append(localization_metrics(place_scores(detector, images), masks).pixel_auroc)
    found = table(measured)[1]["heatmap", "id", "mean", "ellipse", "translucent"]
    assert found["pixel_auroc"] == pytest.approx(np.mean(wanted), abs=1e-5)


def test_without_id_images_of_two_classes_there_is_no_such_row(run, data):
    images = open_images(str(data / "test"))
    images = replace(images, labels=np.zeros(len(images), np.int32))
    sets = {"far": open_images(str(data / "far"))}
    localize(run, images, sets, CPU, LocalizeConfig(count=2, batch_size=16, resamples=5))
    content, rows = table(run)
    assert content["id_on_id"] is None
    assert {row[1] for row in rows} == {"far", "mean"}
    assert "ID on ID" not in format_localization(content)


@pytest.mark.parametrize(
    ("ood", "pasted_id", "words"),
    [
        (0.8, 0.81, "just as well: what is measured is what does not belong into the image"),
        (0.8, 0.7, "less well: what is measured is mostly what does not belong into the image"),
        (0.8, 0.6, "much less well: what is measured is OOD content"),
    ],
)
def test_what_patches_of_id_images_mean_is_said(ood, pasted_id, words):
    rows = []
    for name, value in [("mean", ood), ("id", pasted_id)]:
        metrics, resampled = {"shuffled_auroc": value}, np.full((9, 4), value)
        rows.append(LocalizationRow("heatmap", name, "mean", "mean", "mean", metrics, resampled))
    found = compare_id_on_id(rows)
    assert found["meaning"] == words
    assert found["difference"] == pytest.approx(ood - pasted_id)
    assert found["interval"] == pytest.approx([ood - pasted_id] * 2)


def test_large_images_are_measured_on_every_second_pixel():
    masks = np.zeros((3, 300, 300), bool)
    masks[:, 150:250, :100] = masks[0, :50, 200:] = True
    scores = np.random.default_rng(0).random(masks.shape, np.float32) + masks / np.float32(2)
    cell, asked = Cell(0.5, "square", "hard", np.arange(3)), []
    # each image is its number
    images = (
        np.zeros((3, 3, 300, 300), np.uint8) + np.arange(3, dtype=np.uint8)[:, None, None, None]
    )

    def methods(block: np.ndarray) -> dict[str, np.ndarray]:
        asked.append(len(block))
        return {"heatmap": scores[block[:, 0, 0, 0]]}

    first, found = module._score(methods, images, 2)  # type: ignore[arg-type]
    assert asked == [2, 1]
    np.testing.assert_array_equal(first["heatmap"], scores[0])
    # the scores of all pixels are not kept
    assert found["heatmap"].base is None
    (row,) = module._measure_cell("far", cell, masks, found, np.ones((1, 3)))
    wanted = localization_metrics(scores[:, 1::3, 1::3], masks[:, 1::3, 1::3])
    assert row.metrics == asdict(wanted)


def test_the_nearest_difference_is_to_the_nearest_id_image_of_the_predicted_class(measured, data):
    index, methods = methods_of(measured)
    images, _ = patched(data, measured, "ood", 0.25, "blob", "blended")
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
    images, _ = patched(data, measured, "ood", 0.25, "square", "hard")
    maps = methods.forward.classifier(torch.from_numpy(index.columns["images"].read())).maps[0]
    # so few images that every place is taken
    places = maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1]).numpy()
    assert methods.locations.rows.shape == places.shape
    asked = methods.forward.classifier(torch.from_numpy(images)).maps[0].permute(0, 2, 3, 1).numpy()
    distance = np.sqrt(((asked[..., None, :] - places) ** 2).sum(axis=-1).min(axis=-1))
    wanted = interpolate(torch.from_numpy(distance)[:, None], (16, 16), mode="bilinear")[:, 0]
    np.testing.assert_allclose(methods(images)["feature distance"], wanted, atol=5e-3)


def test_sanity_checks_swap_the_class_and_shuffle_the_weights(measured, data):
    index, split = methods_of(measured)
    # its places do not depend on the class
    assert not split.decoder.places_see_class
    config = replace(split.decoder.config, stack="plain", target="magnitude")
    methods = replace(split, decoder=make_decoder(config).eval())
    images, _ = patched(data, measured, "ood", 0.25, "square", "hard")
    assert list(methods(images)) == [*split(images), "swapped class"]
    output = methods.forward.classifier(torch.from_numpy(images))
    swapped = (output.logits.argmax(dim=1) + 1) % 4
    maps = [output.maps[0].half().float()]
    with torch.no_grad():
        wanted = methods.decoder.place_scores(output.features, swapped, maps)
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
    kind = ("mean", "blob", "hard")
    first, second = (row_of(rows, "centre prior", name, kind) for name in ("far", "ood"))
    assert first["pixel_auroc"] == second["pixel_auroc"]
    assert first["shuffled_auroc"] == pytest.approx(0.5)


def test_a_sanity_check_that_lowers_nothing_is_said(measured, caplog):
    rows = [
        LocalizationRow(
            *(method, "mean", "mean", "mean", "mean"), {"pixel_auroc": value}, np.zeros((0, 4))
        )
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


def test_the_table_is_one_screen_with_every_method_set_and_kind(measured):
    content, rows = table(measured)
    text = format_localization(content)
    by_method, by_set, by_kind, words = (part.splitlines() for part in text.split("\n\n"))
    assert max(map(len, text.splitlines())) <= 80
    assert len(text.splitlines()) <= 32
    assert [line.split("  ")[0] for line in by_method] == ["method", *METHODS]
    for name, line in zip(["far", "ood", "id"], by_set[1:], strict=True):
        row = row_of(rows, "heatmap", name)
        low, high = row["intervals"]["pixel_auroc"]
        assert line.startswith("ID on ID " if name == "id" else f"{name} ")
        assert f"{100 * row['pixel_auroc']:.1f} [{100 * low:.1f}, {100 * high:.1f}]" in line
        for key in ("shuffled_auroc", "aupro", "pointing"):
            assert f" {100 * row[key]:.1f}" in line
    row = row_of(rows, "heatmap", "mean")
    assert by_method[1].split()[1:] == [f"{100 * row[key]:.1f}" for key in METRICS]
    lead = content["leads"]["centre prior"]
    for key in METRICS:
        other = rows["centre prior", "mean", "mean", "mean", "mean"]
        assert lead[key] == pytest.approx(row[key] - other[key])
        low, high = lead["intervals"][key]
        assert low <= lead[key] <= high
    low, high = lead["intervals"]["pixel_auroc"]
    assert f"{100 * lead['pixel_auroc']:+.1f} [{100 * low:.1f}, {100 * high:.1f}]" in by_method[2]
    heads = by_kind[: -len(SIDES) - len(SHAPES) - len(EDGES)]
    assert Counter(" ".join(heads).split()) == Counter(
        " ".join(["AUROC by patch", *METHODS]).split()
    )
    kinds: list[tuple[object, ...]] = [(side, "mean", "mean") for side in SIDES]
    kinds += [("mean", shape, "mean") for shape in SHAPES]
    kinds += [("mean", "mean", edges) for edges in EDGES]
    sides = [f"{100 * side:g} % side" for side in SIDES]
    labels = [*sides, *SHAPES, *(f"{edges} edges" for edges in EDGES)]
    for kind, label, line in zip(kinds, labels, by_kind[len(heads) :], strict=True):
        values = (row_of(rows, method, "mean", kind)["pixel_auroc"] for method in METHODS)
        assert line.startswith(f"{label} ")
        assert line.removeprefix(label).split() == [f"{100 * value:.1f}" for value in values]
    assert content["id_on_id"]["meaning"] in " ".join(words)


def test_a_long_name_and_full_marks_stay_within_80_columns(measured):
    text = (measured / "localization" / "localization.json").read_text()
    content = json.loads(text.replace('"far"', json.dumps("far " * 30)))
    for number, rows in ((1.0, content["table"]), (0.5, content["leads"].values())):
        for row in rows:
            row.update(dict.fromkeys(METRICS, number))
            row["intervals"] = dict.fromkeys(METRICS, (number, number))
    assert max(map(len, format_localization(content).splitlines())) <= 80


def test_intervals_are_those_of_drawing_images_again(measured, data):
    """The interval of a mean over cells against images drawn with NumPy, third by third."""
    score = methods_of(measured)[1]
    cells = []
    for side in SIDES:
        rows = rows_of(side, "square", "hard")
        images, masks = patched(data, measured, "far", side, "square", "hard", rows)
        cells.append((rows[0], score(images)["heatmap"], masks))
    generator, drawn = np.random.default_rng(1), []
    for _ in range(300):
        of_part = [generator.integers(0, 4, 4) for _ in range(3)]
        resampled = [
            asdict(localization_metrics(scores[of_part[part]], masks[of_part[part]]))
            for part, scores, masks in cells
        ]
        drawn.append({key: np.mean([one[key] for one in resampled]) for key in METRICS})
    row = table(measured)[1]["heatmap", "far", "mean", "square", "hard"]
    for key in ("pixel_auroc", "aupro", "pointing"):
        values = np.array([one[key] for one in drawn])
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


def test_the_outline_of_a_patch_lies_on_the_edges_of_its_pixels():
    mask = np.zeros((16, 16), bool)
    mask[0:5, 10:16] = True
    axes = Figure().subplots()
    axes.imshow(mask)
    module._outline(axes, mask)
    (path,) = axes.collections[0].get_paths()
    assert path.vertices.min(axis=0).tolist() == [9.5, -0.5]
    assert path.vertices.max(axis=0).tolist() == [15.5, 4.5]
    # row 0 is at the top
    assert axes.yaxis_inverted()
