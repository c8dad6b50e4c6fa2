"""Stage 4: the table equals scikit-learn recomputed from the saved scores, and counts by hand."""

import hashlib
import json
import os
import re
import shutil
import statistics
from dataclasses import replace
from html import unescape
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scipy.stats import beta
from sklearn.covariance import ledoit_wolf
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from ood_heatmap import __version__
from ood_heatmap.baselines import METHODS as BASELINES
from ood_heatmap.baselines import Score, choose_neighbours, fit_methods
from ood_heatmap.cache.flat import unit_length
from ood_heatmap.cache.manifest import FileRecord, write_manifest
from ood_heatmap.cache.shards import Rows
from ood_heatmap.calibration import Calibration
from ood_heatmap.classifier import Classifier, load_classifier
from ood_heatmap.combined import make_bank
from ood_heatmap.detector import HeatmapDetector, run_decoder
from ood_heatmap.distances import Mahalanobis
from ood_heatmap.errors import OodHeatmapError, StaleCacheError, UsageError
from ood_heatmap.metrics import METRICS
from ood_heatmap.pipeline import fitting, scoring
from ood_heatmap.pipeline.config import EvaluateConfig, IndexConfig, TargetsConfig, TrainConfig
from ood_heatmap.pipeline.evaluate import evaluate
from ood_heatmap.pipeline.fitting import fit_data
from ood_heatmap.pipeline.index import build_index
from ood_heatmap.pipeline.run import (
    Index,
    open_index,
    open_targets,
    read_manifest,
    read_result,
)
from ood_heatmap.pipeline.scoring import score_set
from ood_heatmap.pipeline.tables import (
    format_decisions,
    metrics_table,
)
from ood_heatmap.pipeline.targets import build_targets
from ood_heatmap.pipeline.train import train_decoder
from ood_heatmap.scorer import HeatmapScorer
from ood_heatmap.sources import open_images
from ood_heatmap.verdict import verdict

CPU = torch.device("cpu")
CALIBRATION_FILE = "evaluation/calibration.safetensors"
METHODS = ("heatmap", *(method.name for method in BASELINES), "sum", "combined")
CONFIG = EvaluateConfig(near=("near",), batch_size=16, neighbours=5, examples=3)


def sets_of(data):
    return {"far": open_images(str(data / "far")), "near": open_images(str(data / "ood"))}


def table(run):
    content = json.loads((run / "evaluation" / "metrics.json").read_text())
    return content, {(row["method"], row["set"]): row for row in content["table"]}


def scores(run, name):
    return np.load(run / "evaluation" / f"scores-{name}.npz", allow_pickle=False)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["near", "far"])
def test_figures_equal_scikit_learn_on_the_saved_scores(finished_run, method, name):
    row = table(finished_run)[1][method, name]
    id_scores, ood_scores = scores(finished_run, "id")[method], scores(finished_run, name)[method]
    is_ood = np.r_[np.zeros(len(id_scores)), np.ones(len(ood_scores))]
    both = np.r_[id_scores, ood_scores].astype(np.float64)

    def fpr95(positive, values) -> float:
        fpr, tpr, _ = roc_curve(positive, values, drop_intermediate=False)
        return fpr[np.argmax(tpr >= 0.95)]

    assert row["auroc"] == pytest.approx(roc_auc_score(is_ood, both), abs=1e-12)
    assert row["aupr_out"] == pytest.approx(average_precision_score(is_ood, both), abs=1e-12)
    assert row["aupr_in"] == pytest.approx(average_precision_score(1 - is_ood, -both), abs=1e-12)
    assert row["fpr95_ood_pos"] == pytest.approx(fpr95(is_ood, both), abs=1e-12)
    assert row["fpr95_id_pos"] == pytest.approx(fpr95(1 - is_ood, -both), abs=1e-12)
    assert row["prevalence_ood"] == len(ood_scores) / len(both)


def test_means_are_over_near_far_and_all_sets(finished_run):
    rows = table(finished_run)[1]
    for method in METHODS:
        near, far = rows[method, "near"]["auroc"], rows[method, "far"]["auroc"]
        assert rows[method, "mean near"]["auroc"] == near
        assert rows[method, "mean far"]["auroc"] == far
        assert rows[method, "mean all"]["auroc"] == pytest.approx((near + far) / 2)


def test_scores_are_those_of_the_detector_on_the_images_themselves(data, finished_run):
    paths = sorted((data / "far").iterdir())
    result = HeatmapDetector.load(finished_run, "cpu")([Image.open(path) for path in paths])
    saved = scores(finished_run, "far")
    np.testing.assert_allclose(saved["combined"], result.score, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(saved["prediction"], result.prediction)


def bank_of(run):
    """Return the unit-length features of the ID training images, which are in float16."""
    tensors = load_file(run / "evaluation" / "combination.safetensors")
    return tensors["bank"].double().numpy()


def test_baselines_are_their_formulas(data, classifier, finished_run):
    paths = sorted((data / "far").iterdir())
    transform = classifier.config.transform
    output = classifier(torch.from_numpy(np.stack([transform(Image.open(p)) for p in paths])))
    logits = output.logits.numpy().astype(np.float64)
    powers = np.exp(logits)
    saved = scores(finished_run, "far")
    np.testing.assert_allclose(saved["msp"], 1 - powers.max(axis=1) / powers.sum(axis=1), rtol=1e-4)
    np.testing.assert_allclose(saved["max_logit"], -logits.max(axis=1), rtol=1e-4)
    np.testing.assert_allclose(saved["energy"], -np.log(powers.sum(axis=1)), rtol=1e-4, atol=1e-5)
    query = output.features.numpy().astype(np.float64)
    query /= np.linalg.norm(query, axis=1, keepdims=True)
    distance = np.linalg.norm(query[:, None] - bank_of(finished_run), axis=2)
    np.testing.assert_allclose(saved["knn"], np.sort(distance, axis=1)[:, 4], rtol=1e-4)


def test_features_of_the_caches_are_what_the_baselines_are_fitted_on(data, finished_run):
    """Mahalanobis and the linear control, from the shards and the images themselves."""
    with h5py.File(finished_run / "index" / "images-00000.h5") as file:
        features, label = file["features"][...].astype(np.float64), file["label"][...]
    means = np.stack([features[label == one].mean(axis=0) for one in range(4)])
    centred = features - means[label]
    inverse = np.linalg.pinv(centred.T @ centred / len(features), rcond=1e-6)
    detector = HeatmapDetector.load(finished_run, "cpu")
    transform = detector.classifier.config.transform
    pixels = np.stack([transform(Image.open(path)) for path in sorted((data / "far").iterdir())])
    queries = detector.classifier(torch.from_numpy(pixels)).features.numpy().astype(np.float64)
    difference = queries[:, None] - means
    wanted = np.einsum("qld,de,qle->ql", difference, inverse, difference).min(axis=1)
    np.testing.assert_allclose(scores(finished_run, "far")["mahalanobis"], wanted, rtol=1e-4)
    with h5py.File(finished_run / "targets" / "targets-00000.h5") as file:
        auxiliary = file["features"][...].astype(np.float64)
    both, is_ood = np.r_[features, auxiliary], np.repeat([0, 1], [80, 50])
    mean, deviation = both.mean(axis=0), np.where(both.std(axis=0) > 0, both.std(axis=0), 1)
    model = LogisticRegression(max_iter=1000).fit((both - mean) / deviation, is_ood)
    odds = model.decision_function((queries - mean) / deviation)
    np.testing.assert_allclose(scores(finished_run, "far")["logistic_regression"], odds, atol=0.02)


def pixels_of(detector, folder):
    transform = detector.classifier.config.transform
    return torch.from_numpy(
        np.stack([transform(Image.open(path)) for path in sorted(folder.iterdir())])
    )


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_mahalanobis_of_layers_uses_all_cached_maps(data, classifier, finished_run):
    """Also those that the decoder does without, as here; on the images themselves."""
    with h5py.File(finished_run / "index" / "images-00000.h5") as file:
        maps = [file[f"feature_maps_{number}"][...].astype(np.float64) for number in (1, 2)]
        features, label = file["features"][...].astype(np.float64), file["label"][...]
    output = classifier(pixels_of(HeatmapDetector.load(finished_run, "cpu"), data / "far"))
    bank = [features, *(item.mean(axis=(2, 3)) for item in maps)]
    # in float16, as they are cached
    of_far = [item.half().double().mean(dim=(2, 3)).numpy() for item in output.maps]
    of_far = [output.features.numpy().astype(np.float64), *of_far]
    # the deepest map of this network is what its features are the mean of
    np.testing.assert_allclose(bank[1], bank[0], rtol=1e-3, atol=1e-4)
    joined, queries = (
        np.concatenate([unit(one[0]), unit(one[2])], axis=1) for one in (bank, of_far)
    )
    means = np.stack([joined[label == one].mean(axis=0) for one in range(4)])
    inverse = np.linalg.inv(ledoit_wolf(joined - means[label], assume_centered=True)[0])
    difference = queries[:, None] - means
    wanted = np.einsum("qld,de,qle->ql", difference, inverse, difference).min(axis=1)
    found = scores(finished_run, "far")["mahalanobis_pp_layers"]
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


def three(saved):
    names = ("max_logit", "knn", "mahalanobis_pp")
    first, *rest = (saved[name].astype(np.float64) for name in names)
    return np.stack([first, *map(np.log, rest)])


def sum_of(terms, reference):
    mean, std = reference.mean(axis=1), reference.std(axis=1)
    return ((terms - mean[:, None]) / std[:, None]).sum(axis=0)


@pytest.mark.parametrize("name", ["id", "far", "near", "calibration"])
def test_the_sum_of_three_is_standardised_on_held_out_images(finished_run, name):
    saved = scores(finished_run, name)
    wanted = sum_of(three(saved), three(scores(finished_run, "calibration")))
    np.testing.assert_allclose(saved["sum"], wanted, rtol=1e-4, atol=1e-4)


def test_without_held_out_images_id_training_images_stand_in(data, run, monkeypatch):
    """Those that the kNN score searches, each without itself among its neighbours."""
    monkeypatch.setattr(fitting, "_MAX_BANK", 30)
    config = replace(CONFIG, calibration_share=0, overwrite=True)
    evaluate(run, open_images(str(data / "test")), sets_of(data), CPU, config)
    with h5py.File(run / "index" / "images-00000.h5") as file:
        features, label = file["features"][...], file["label"][...]
    mahalanobis = Mahalanobis.fit_unit(features, label)
    features = features[np.random.default_rng(config.seed).choice(80, 30, replace=False)]
    last = HeatmapDetector.load(run, "cpu").classifier.last_layer()
    logits = last(torch.from_numpy(features)).detach().numpy()
    bank = make_bank(torch.from_numpy(features)).double().numpy()
    distance = np.linalg.norm(unit(features)[:, None] - bank, axis=2)
    np.fill_diagonal(distance, np.inf)
    reference = {
        "max_logit": -logits.max(axis=1),
        "knn": np.sort(distance, axis=1)[:, CONFIG.neighbours - 1],
        "mahalanobis_pp": mahalanobis(torch.from_numpy(features)).numpy(),
    }
    saved = scores(run, "far")
    wanted = sum_of(three(saved), three(reference))
    np.testing.assert_allclose(saved["sum"], wanted, rtol=1e-4, atol=1e-4)


def test_sets_scored_by_a_version_without_a_method_are_scored_again(data, run, monkeypatch):
    test, wanted = open_images(str(data / "test")), table(run)[0]
    shutil.rmtree(run / "evaluation")
    with monkeypatch.context() as earlier:
        earlier.setattr(scoring.DetectionMethods, "add_sum", lambda self, scored, _: scored)
        earlier.setattr("ood_heatmap.pipeline.evaluate.metrics_table", raise_keyboard_interrupt)
        with pytest.raises(KeyboardInterrupt):
            evaluate(run, test, sets_of(data), CPU, CONFIG)
    assert "sum" not in scores(run, "far").files
    evaluate(run, test, sets_of(data), CPU, CONFIG)
    assert table(run)[0] == wanted


def test_rank_0_fits_for_all_and_no_rank_reads_all_features(data, run, monkeypatch):
    """The other ranks get what rank 0 has fitted; features are read in blocks."""

    def read(rows):
        assert len(rows.shape) == 1, f"all {rows.shape} are read at once"
        return np.concatenate(rows.arrays)

    fitted: dict[str, Score] = {}
    before = (run / "evaluation" / "scores-far.npz").read_bytes()
    monkeypatch.setattr(Rows, "read", read)
    monkeypatch.setattr(
        scoring, "fit_methods", lambda data: fitted.update(fit_methods(data)) or fitted
    )
    shutil.rmtree(run / "evaluation")
    evaluate(run, open_images(str(data / "test")), sets_of(data), CPU, CONFIG)
    assert list(fitted) == [method.name for method in BASELINES]
    assert (run / "evaluation" / "scores-far.npz").read_bytes() == before

    def fail(data):
        raise AssertionError("fitted by another rank")

    monkeypatch.setattr(scoring, "fit_methods", fail)
    monkeypatch.setattr(scoring, "is_main", lambda: False)
    monkeypatch.setattr(scoring, "broadcast", lambda value: fitted if value is None else None)
    index = open_index(run)
    detectors = scoring.open_detectors([run], index, CPU)
    methods = scoring.make_detection_methods(index, open_targets(run, index), detectors, CONFIG)
    assert methods.by_name is fitted


def test_the_report_opens_only_the_classes_predicted_for_its_images(data, run, monkeypatch):
    banks, open_bank = [], Index.bank
    monkeypatch.setattr(
        Index, "bank", lambda index, device: banks.append(open_bank(index, device)) or banks[-1]
    )
    # the same image is the lowest of both
    near = {"near": open_images(str(data / "test"))}
    config = replace(CONFIG, gallery=1, calibration_share=0, overwrite=True)
    evaluate(run, open_images(str(data / "test")), near, CPU, config)
    shown = [
        scores(run, name)["prediction"][scores(run, name)["heatmap"].argmin()]
        for name in ("id", "near")
    ]
    (bank,) = banks
    opened = bank.classes[bank.num_searched > 0].tolist()
    assert opened == sorted(set(shown))
    assert len(bank.classes) > len(opened)


def test_the_images_of_the_report_are_classified_in_batches_too(data, run, monkeypatch):
    sizes, forward = [], Classifier.forward
    monkeypatch.setattr(
        Classifier,
        "forward",
        lambda self, images: sizes.append(len(images)) or forward(self, images),
    )
    config = replace(CONFIG, calibration_share=0, overwrite=True)
    evaluate(run, open_images(str(data / "test")), sets_of(data), CPU, config)
    content = json.loads((run / "evaluation" / "report.json").read_text())
    assert len(content["cards"]) == 30 + 25 + 40
    assert max(sizes) == CONFIG.batch_size


def test_the_classifier_is_restored_once(data, run, monkeypatch):
    restored, restore = [], Index.classifier
    monkeypatch.setattr(
        Index,
        "classifier",
        lambda *arguments, **options: restored.append(arguments) or restore(*arguments, **options),
    )
    config = replace(CONFIG, overwrite=True)
    evaluate(run, open_images(str(data / "test")), sets_of(data), CPU, config)
    assert len(restored) == 1


def test_controls_do_not_take_patched_id_images_for_ood(data, run):
    def auxiliary():
        index = open_index(run)
        targets = open_targets(run, index)
        return fit_data(index, targets, index.classifier(CPU), 0, 0).ood.features

    before = auxiliary()
    config = TargetsConfig(batch_size=16, patched=1.0, overwrite=True)
    assert build_targets(run, open_images(str(data / "ood")), CPU, config).results["num_patched"]
    np.testing.assert_array_equal(auxiliary(), before)


@pytest.mark.parametrize("neighbours", [None, 7, 1000])
def test_k_is_stored_and_is_what_the_scores_were_made_with(data, run, neighbours):
    config = replace(CONFIG, neighbours=neighbours, overwrite=True)
    results = evaluate(run, open_images(str(data / "test")), sets_of(data), CPU, config).results
    index = open_index(run)
    wanted = {None: choose_neighbours(index.results.class_counts), 7: 7, 1000: 80}[neighbours]
    assert table(run)[0]["methods"]["knn"]["neighbours"] == wanted
    paths = sorted((data / "far").iterdir())
    detector = HeatmapDetector.load(run, "cpu")
    transform = detector.classifier.config.transform
    pixels = torch.from_numpy(np.stack([transform(Image.open(path)) for path in paths]))
    queries = unit_length(detector.classifier(pixels).features.numpy())
    distance = np.sort(np.linalg.norm(queries[:, None] - bank_of(run), axis=2), axis=1)
    np.testing.assert_allclose(scores(run, "far")["knn"], distance[:, wanted - 1], rtol=1e-4)
    counts = index.results.class_counts
    too_small = [count for count in counts if 0 < count <= wanted]
    warned = any(text.startswith("knn: ") for text in results["warnings"])
    assert warned == (len(too_small) > 0.1 * len(counts) and wanted > 1)


def test_the_knn_score_searches_a_sample_for_which_k_is_chosen(data, run, monkeypatch):
    """By brute force in float64; the detector reads the sample, and no feature of the index."""
    monkeypatch.setattr(fitting, "_MAX_BANK", 30)
    config = replace(CONFIG, neighbours=None, overwrite=True)
    evaluate(run, open_images(str(data / "test")), sets_of(data), CPU, config)
    index, saved = open_index(run), scores(run, "far")
    drawn = np.sort(np.random.default_rng(config.seed).choice(80, 30, replace=False))
    features, prediction = (
        index.columns[name].read()[drawn] for name in ("features", "prediction")
    )
    k = choose_neighbours(np.bincount(prediction).tolist())
    assert k == table(run)[0]["methods"]["knn"]["neighbours"]
    assert k < choose_neighbours(index.results.class_counts)
    bank = load_file(run / "evaluation" / "combination.safetensors")["bank"]
    assert bank.dtype == torch.float16
    np.testing.assert_allclose(bank.double(), unit(features), rtol=1e-3, atol=1e-7)
    monkeypatch.setattr("ood_heatmap.pipeline.run.map_index", None)
    detector = HeatmapDetector.load(run, "cpu")
    images = [Image.open(path) for path in sorted((data / "far").iterdir())]
    pixels = np.stack([detector.transform(image) for image in images])
    result, output = detector.detect(pixels)
    queries = unit(output.features.numpy().astype(np.float64))
    distance = np.linalg.norm(queries[:, None] - bank.double().numpy(), axis=2)
    np.testing.assert_allclose(saved["knn"], np.sort(distance, axis=1)[:, k - 1], rtol=1e-4)
    np.testing.assert_allclose(saved["combined"], result.score, rtol=1e-4, atol=1e-4)
    # a picture's nearest ID image is one of all
    assert not set(saved["nearest"]) <= set(drawn)


def test_a_combined_score_without_a_bank_is_refused_with_the_way_out(run):
    path = run / "evaluation" / "combination.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    del tensors["bank"]
    save_file(tensors, path, metadata)
    manifest = read_manifest(run, "evaluation")
    files = {**manifest.files, path.name: FileRecord.from_file(path)}
    write_manifest(run / "evaluation", replace(manifest, files=files))
    way_out = r"an earlier version wrote it .*Remove .*evaluation and run `ood-heatmap evaluate"
    with pytest.raises(OodHeatmapError, match=way_out):
        HeatmapDetector.load(run, "cpu")


def test_without_feature_maps_image_and_pixels_agree_on_what_is_ood(data, run):
    detector = HeatmapDetector.load(run, "cpu", 0.4)
    for name in ("far", "ood", "test"):
        result = detector(sorted(map(str, (data / name).rglob("*.png"))))
        flagged = (result.pixel_score > detector.pixel_threshold).any(axis=(1, 2))
        np.testing.assert_array_equal(flagged, result.is_ood)


def test_the_largest_pixel_is_what_the_score_or_the_place_says(data, run):
    """The heatmap's maximum, from the scores, the decoder's log-odds and the held-out images."""
    config = TrainConfig(epochs=2, batch_size=32, width=32, feature_maps=2, overwrite=True)
    train_decoder(run, CPU, config)
    settings = replace(CONFIG, overwrite=True)
    evaluate(run, open_images(str(data / "test")), sets_of(data), CPU, settings)
    detector = HeatmapDetector.load(run, "cpu", 0.4)
    assert detector.color_max == 1
    held_out, found = scores(run, "calibration"), []
    for name in ("far", "ood", "test"):
        paths = sorted((data / name).rglob("*.png"))
        result = detector(list(map(str, paths)))
        places = [
            run_decoder(detector.decoder, output, output.logits.argmax(1))[0].max().item()
            for path in paths
            for output in [detector.detect(detector.transform(Image.open(path))[None])[1]]
        ]
        wanted = []
        for values, reference, share in (
            (result.score, held_out["combined"], 0.95),
            (np.array(places), held_out["place"], 0.99),
        ):
            median, high = np.quantile(reference.astype(float), (0.5, share))
            wanted.append(3 * (values - high) / (high - median))
        largest = 1 / (1 + np.exp(-np.maximum(*wanted)))
        np.testing.assert_allclose(result.pixel_score.max(axis=(1, 2)), largest, rtol=2e-2)
        found += [(wanted[0] > wanted[1]).any(), (wanted[0] < wanted[1]).any()]
    assert any(found[::2])
    assert any(found[1::2])


def test_a_method_that_is_computed_is_shown(finished_run):
    shown = {method for method, _ in table(finished_run)[1]}
    computed = set(scores(finished_run, "id").files)
    assert computed - shown == {
        *("peak", "place", "prediction", "label", "row", "content"),
        *("pixel_hash", "nearest", "difference"),
    }
    assert shown <= computed
    content = table(finished_run)[0]
    assert set(content["methods"]) == shown - {"heatmap"}
    page = (finished_run / "evaluation" / "report.html").read_text()
    for method in content["methods"].values():
        assert f'<th scope="row">{method["label"]}</th>' in page
    assert content["methods"]["knn"]["label"] == "kNN (k = 5)"


def test_pictures_and_sources_are_there(data, finished_run):
    folder = finished_run / "evaluation"
    for name in ("histograms", "roc", "examples"):
        with Image.open(folder / "figures" / f"{name}.png") as picture:
            assert picture.width > 300
    sets = table(finished_run)[0]["sets"]
    assert sets["far"]["num_images"] == 25
    assert len({entry["content"] for entry in sets.values()}) == 4
    names = (folder / sets["far"]["names"]).read_bytes()
    assert names.decode().split() == [path.name for path in sorted((data / "far").iterdir())]
    assert sets["far"]["names_sha256"] == hashlib.sha256(names).hexdigest()
    manifest = json.loads((folder / "manifest.json").read_text())
    on_disk = {
        path.relative_to(folder).as_posix() for path in folder.rglob("[!.]*") if path.is_file()
    }
    assert on_disk == {*manifest["files"], "manifest.json", "report.html"}


def cards_of(run):
    """Return the cards of the report."""
    return read_result(run, "evaluation", "report.json")["cards"]


def test_the_report_shows_images_at_even_steps_of_the_score(data, finished_run):
    calibration = Calibration.from_bytes((finished_run / CALIBRATION_FILE).read_bytes(), "")
    cards = cards_of(finished_run)
    # what a reader looks for first
    assert [card["set"] for card in cards] == ["far"] * 25 + ["near"] * 40 + ["id"] * 27
    paths = sorted((data / "ood").iterdir())
    saved = scores(finished_run, "near")["combined"]
    shown = [card for card in cards if card["set"] == "near"]
    wanted = np.argsort(saved, kind="stable")[np.linspace(0, 49, 40).round().astype(int)][::-1]
    assert [card["name"] for card in shown] == [paths[row].name for row in wanted]
    np.testing.assert_array_equal([card["score"] for card in shown], saved[wanted])
    for card in cards:
        (p_value,) = calibration.p_value(np.array([card["score"]], np.float32))
        assert card["p_value"] == p_value
    # the photo at its own size, and the ID image that the classifier saw
    assert (shown[0]["photo"]["width"], shown[0]["nearest"]["width"]) == (20, 16)


def test_the_page_is_drawn_with_what_the_run_is_about(data, finished_run):
    page = unescape((finished_run / "evaluation" / "report.html").read_text())
    page = page.replace("\u00a0", " ")
    manifests = {name: read_manifest(finished_run, name) for name in ("index", "evaluation")}
    for fact in (
        f"<dd>{finished_run}</dd>",
        manifests["index"].inputs["classifier"]["weights"],
        f"<dd>{data / 'id'}, 80 images",
        f"<dd>{data / 'ood'}, 50 images</dd>",
        f"<dd>{data / 'far'}, 25 images</dd>",
        manifests["evaluation"].speed["time"].replace("T", " "),
        f"ood-heatmap {__version__}",
        verdict(table(finished_run)[0]),
    ):
        assert fact in page, fact
    assert verdict(table(finished_run)[0]).startswith("On the mean of 2 OOD sets, the combined")


def test_a_lost_page_is_drawn_again_without_the_images(data, run):
    path = run / "evaluation" / "report.html"
    before = path.read_text()
    path.unlink()
    evaluate(run, open_images(str(data / "test")), sets_of(data), CPU, CONFIG)
    after = path.read_text()
    # the run was copied
    assert after.replace(f"<dd>{run}</dd>", "") == re.sub(r"<dd>[^<]*runs\d*/run</dd>", "", before)


def test_held_out_images_are_in_no_figure(data, finished_run):
    _, rows = table(finished_run)
    held_out, kept = (scores(finished_run, name)["row"] for name in ("calibration", "id"))
    assert sorted([*held_out, *kept]) == list(range(30))
    assert len(held_out) == 3
    assert rows["heatmap", "far"]["num_id"] == 27
    manifest = json.loads((finished_run / "evaluation" / "manifest.json").read_text())
    assert manifest["results"]["num_calibration"] == 3
    assert manifest["results"]["false_alarm"] == 0.05


def test_without_a_threshold_there_is_no_decision(finished_run):
    """Three held-out images are too few for 5 %: nothing is called OOD, and nothing ID."""
    content, _ = table(finished_run)
    decisions = content["decisions"]
    assert decisions["num_needed"] == 19
    for key in ("threshold", "pixel_threshold", "false_alarm", "pixel_false_alarm", "detection"):
        assert decisions[key] is None
    decision = format_decisions(decisions)
    assert decision.endswith("too few for a level of 0.05, which needs 19")
    (warning,) = [text for text in content["warnings"] if text.startswith("no threshold")]
    manifest = json.loads((finished_run / "evaluation" / "manifest.json").read_text())
    assert warning in manifest["results"]["warnings"]
    assert warning not in manifest["results"]["suspicious"]


def test_decisions_are_what_the_calibration_says_of_unseen_images(data, run):
    config = replace(CONFIG, false_alarm=0.2, overwrite=True)
    held_out = open_images(str(data / "id"))
    test = open_images(str(data / "test"))
    evaluate(run, test, sets_of(data), CPU, config, calibration_images=held_out)
    found = table(run)[0]["decisions"]
    detector = HeatmapDetector.load(run, "cpu")
    results = {
        name: detector([Image.open(path) for path in sorted((data / name).rglob("*.png"))])
        for name in ("id", "test", "far", "ood")
    }
    peaks = {name: result.pixel_score.max(axis=(1, 2)) for name, result in results.items()}
    # of 80 held-out images and the new one, 16 may be above
    threshold = np.sort(results["id"].score)[-16]
    assert found["threshold"] == pytest.approx(threshold, rel=1e-4)
    assert found["pixel_threshold"] == pytest.approx(np.sort(peaks["id"])[-16], rel=1e-4)
    assert found["num_calibration"] == 80
    assert found["level"] == 0.2
    # counted in the saved scores: another batch rounds otherwise, and one may lie at the threshold
    above = {
        name: scores(run, name)["combined"] > found["threshold"] for name in ("id", "far", "near")
    }
    count = int(above["id"].sum())
    assert found["false_alarm"]["rate"] == count / 30
    low, high = found["false_alarm"]["interval"]
    assert low == pytest.approx(beta.ppf(0.025, count, 31 - count) if count else 0)
    assert high == pytest.approx(beta.ppf(0.975, count + 1, 30 - count) if count < 30 else 1)
    for name in ("far", "near"):
        assert found["detection"][name]["rate"] == pytest.approx(above[name].mean())
    assert "threshold" in format_decisions(found)
    calibration = Calibration.from_bytes((run / CALIBRATION_FILE).read_bytes(), "")
    wanted = np.sort(results["id"].score)
    np.testing.assert_allclose(calibration.scores, wanted, rtol=1e-4, atol=1e-4)


def in_class_folders(data, root, names):
    """Copy the test images into class folders, in turn; return the folder."""
    for number, path in enumerate(sorted((data / "test").iterdir())):
        folder = root / names[number % len(names)]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder)
    return root


@pytest.mark.parametrize(
    "names", [("class3", "class1"), ("class0", "class1", "class2", "class3"), ("class2", "dog")]
)
def test_labels_go_by_the_name_of_the_class_never_by_its_position(data, run, tmp_path, names):
    folder = in_class_folders(data, tmp_path / "named", names)
    config = replace(CONFIG, calibration_share=0, overwrite=True)
    results = evaluate(run, open_images(str(folder)), sets_of(data), CPU, config).results
    detector = HeatmapDetector.load(run, "cpu")
    right = []
    for name in set(names) - {"dog"}:
        result = detector([Image.open(path) for path in sorted((folder / name).iterdir())])
        right += [detector.classes[one] == name for one in result.prediction]
    content, _ = table(run)
    assert content["id_accuracy"] == pytest.approx(np.mean(right))
    assert content["id_labelled"] == len(right)
    unknown = [text for text in results["warnings"] if "run does not have: 'dog'" in text]
    assert len(unknown) == ("dog" in names)


def test_ood_classes_named_as_id_classes_are_said(data, run, tmp_path):
    folder = in_class_folders(data, tmp_path / "ood", ("class3", "bus"))
    config = replace(CONFIG, overwrite=True)
    sets = {"far": open_images(str(folder))}
    results = evaluate(
        run, open_images(str(data / "far")), sets, CPU, replace(config, near=())
    ).results
    assert any("with names of ID classes: 'class3'." in text for text in results["warnings"])


def test_no_share_held_out_means_no_thresholds(data, run):
    config = replace(CONFIG, calibration_share=0, overwrite=True)
    manifest = evaluate(run, open_images(str(data / "test")), sets_of(data), CPU, config)
    content, rows = table(run)
    assert rows["heatmap", "far"]["num_id"] == 30
    assert "decisions" not in content
    assert manifest.results["num_calibration"] is None
    assert not (run / "evaluation" / "calibration.safetensors").exists()
    assert "p-value</dt>" not in (run / "evaluation" / "report.html").read_text()


def test_a_set_too_small_to_share_is_refused(data, run, tmp_path):
    one = tmp_path / "one"
    one.mkdir()
    shutil.copy(next((data / "far").iterdir()), one)
    with pytest.raises(UsageError, match="no image left beside those held out"):
        evaluate(run, open_images(str(one)), sets_of(data), CPU, CONFIG)


# ---- the table, on scores made by hand


def hand_made(near, far, **id_scores):
    """Return score sets in which every method but those named has the heatmap's scores."""
    sets = {"id": id_scores["heatmap"], "near": near, "far": far}
    return {
        name: dict.fromkeys([*METHODS, *id_scores], np.array(values, dtype=np.float32))
        for name, values in sets.items()
    }


def by_counting(id_scores, ood_scores):
    """Return the figures by their definitions, pair by pair and threshold by threshold."""
    ids, oods = np.array(id_scores, float), np.array(ood_scores, float)
    levels = sorted({*ids, *oods})

    def precision_recall(positive, negative, levels):
        total = before = 0.0
        for level in levels:
            recall = np.mean(positive >= level)
            precision = np.sum(positive >= level) / np.sum(np.r_[positive, negative] >= level)
            total, before = total + (recall - before) * precision, recall
        return total

    def fpr(positive, negative, levels):
        return next(
            np.mean(negative >= level)
            for level in levels
            if np.sum(positive >= level) >= 0.95 * len(positive) - 1e-9
        )

    up, down = [-level for level in levels], levels[::-1]
    return {
        "auroc": np.mean([(ood > one) + (ood == one) / 2 for ood in oods for one in ids]),
        "aupr_in": precision_recall(-ids, -oods, up),
        "aupr_out": precision_recall(oods, ids, down),
        "fpr95_id_pos": fpr(-ids, -oods, up),
        "fpr95_ood_pos": fpr(oods, ids, down),
    }


TIED = {"heatmap": [1, 1, 2, 2, 3, 3, 4, 5, 6, 6]}
TINY = {"heatmap": [2]}


@pytest.mark.parametrize(
    ("id_scores", "near", "far"),
    [(TIED, [3, 3, 6], [6, 7, 7, 9]), (TINY, [2], [3]), (TINY, [1], [2, 2])],
)
@pytest.mark.parametrize("protocol", ["all", "paper", "openood"])
def test_every_protocol_counts_as_defined_with_ties_and_tiny_sets(id_scores, near, far, protocol):
    config = EvaluateConfig(near=("near",), protocol=protocol, resamples=3)
    rows = {
        row.set: row.metrics
        for row in metrics_table(hand_made(near, far, **id_scores), config)
        if row.method == "heatmap"
    }
    wanted = {
        "near": by_counting(id_scores["heatmap"], near),
        "far": by_counting(id_scores["heatmap"], far),
    }
    for key in METRICS:
        mean = (wanted["near"][key] + wanted["far"][key]) / 2
        assert rows["near"][key] == pytest.approx(wanted["near"][key], abs=1e-12)
        assert rows["mean far"][key] == pytest.approx(wanted["far"][key], abs=1e-12)
        assert rows["mean all"][key] == pytest.approx(mean, abs=1e-12)


def test_the_conventions_on_a_set_counted_by_hand():
    """Accepting 95 % of ten tied ID images takes all, up to 6: OOD at 6 and below comes in.

    Flagging 95 % of four OOD images takes all, from 3 up: six of the ID images are there too.
    """
    rows = metrics_table(
        hand_made([3, 6, 7, 9], [7], **TIED), EvaluateConfig(near=("near",), resamples=3)
    )
    (row,) = [row for row in rows if (row.method, row.set) == ("heatmap", "near")]
    assert row.metrics["fpr95_id_pos"] == 2 / 4
    assert row.metrics["fpr95_ood_pos"] == 6 / 10
    # 4 + 1, 8 + 1, 10 and 10 of 10 pairs, ties half
    assert row.metrics["auroc"] == (5 + 9 + 10 + 10) / 40


@pytest.mark.parametrize(
    ("protocol", "near", "means"),
    [
        ("all", (), ["mean all"]),
        ("all", ("near",), ["mean near", "mean far", "mean all"]),
        ("all", ("near", "far"), ["mean near", "mean all"]),
        ("openood", (), ["mean far", "mean all"]),
    ],
)
def test_means_that_are_shown(protocol, near, means):
    config = EvaluateConfig(near=near, protocol=protocol, resamples=2)
    rows = metrics_table(hand_made([1], [2], **TINY), config)
    assert [row.set for row in rows if row.method == "heatmap"] == ["near", "far", *means]


def test_intervals_are_those_of_images_drawn_again():
    """Of the mean of 400 images at 0 or 1, against OOD images at 1/2, the deviation is known."""
    flags = np.arange(400) % 4 == 0
    made = hand_made([0.5], [0.5], heatmap=flags)
    rows = metrics_table(made, EvaluateConfig(near=("near",)))
    deviation = np.sqrt(0.75 * 0.25 / 400)
    for row in rows[:5]:
        assert row.metrics["auroc"] == 0.75
        # near and far meet the same ID images: their mean is as uncertain as either
        low, high = row.intervals["auroc"]
        assert low == pytest.approx(0.75 - 1.96 * deviation, abs=0.01)
        assert high == pytest.approx(0.75 + 1.96 * deviation, abs=0.01)


def test_intervals_are_the_same_every_time_and_for_every_method():
    made = hand_made([3, 3, 6], [6, 7, 9], **TIED)
    first, again = (metrics_table(made, EvaluateConfig(resamples=60)) for _ in range(2))
    assert first == again
    assert len({str(row.intervals) for row in first if row.set == "far"}) == 1
    other = metrics_table(made, EvaluateConfig(resamples=60, seed=1))
    assert other[0].metrics == first[0].metrics
    assert other[0].intervals != first[0].intervals


def test_the_lead_is_that_on_the_same_drawn_images():
    """Where the other method is right, so is the default score, and on a tenth of the images more.

    The lead is a binomial share then, with a narrower interval than the AUROC of either.
    """
    number = np.arange(400)
    flagged = number % 4 == 0
    flags = {"heatmap": flagged, "worse": flagged | (number % 10 == 1), "same": flagged}
    made = {
        "id": {name: np.asarray(values, np.float32) for name, values in flags.items()},
        "far": {name: np.array([0.5], np.float32) for name in flags},
    }
    rows = {row.method: row for row in metrics_table(made, EvaluateConfig()) if row.set == "far"}
    share, deviation = 0.1, np.sqrt(0.1 * 0.9 / 400)
    assert rows["worse"].lead["auroc"] == pytest.approx(share)
    low, high = rows["worse"].lead["intervals"]["auroc"]
    assert low == pytest.approx(share - 1.96 * deviation, abs=0.007)
    assert high == pytest.approx(share + 1.96 * deviation, abs=0.007)
    assert rows["same"].lead["intervals"]["auroc"] == (0, 0)
    assert rows["heatmap"].lead == {}


def test_several_runs_give_mean_and_spread():
    made = hand_made([3, 5], [6, 7], **TIED)
    for name, shift in (("heatmap-2", 1), ("heatmap-3", -2)):
        for of_set in made.values():
            of_set[name] = of_set["heatmap"]
        made["far"][name] = made["far"]["heatmap"] + shift
        made["near"][name] = made["near"]["heatmap"] + shift
    config = EvaluateConfig(near=("near",), resamples=30)
    rows = {(row.method, row.set): row for row in metrics_table(made, config)}
    wanted = [
        [by_counting(TIED["heatmap"], np.array(far) + shift)["auroc"] for far in ([3, 5], [6, 7])]
        for shift in (0, 1, -2)
    ]
    row = rows["heatmap, 3 runs", "mean all"]
    np.testing.assert_allclose(row.runs["auroc"], np.mean(wanted, axis=1))
    assert row.metrics["auroc"] == pytest.approx(np.mean(wanted))
    assert row.spread["auroc"] == pytest.approx(statistics.stdev(np.mean(wanted, axis=1).tolist()))
    assert rows["heatmap", "near"].metrics["auroc"] == pytest.approx(wanted[0][0])
    assert not rows["heatmap", "near"].spread
    low, high = row.intervals["auroc"]
    assert low <= row.metrics["auroc"] <= high


# ---- protocols, runs, and starting again


def test_the_papers_protocol_takes_one_ood_image_for_five_id_images(data, run, caplog):
    config = replace(CONFIG, protocol="paper", calibration_share=0.5, overwrite=True)
    few = open_images(str(data / "far"))
    some = replace(few, names=few.names[:2], labels=few.labels[:2])
    evaluate(run, open_images(str(data / "test")), {**sets_of(data), "few": some}, CPU, config)
    content, rows = table(run)
    assert rows["heatmap", "far"]["num_id"] == 15
    assert rows["heatmap", "far"]["num_ood"] == rows["heatmap", "near"]["num_ood"] == 3
    assert rows["heatmap", "few"]["num_ood"] == 2
    assert "few has 2 images, fewer than the 3 of ID:OOD = 5:1" in caplog.text
    assert content["headline"] == ["auroc", "aupr_in", "fpr95_id_pos"]
    drawn = scores(run, "far")["row"]
    np.testing.assert_array_equal(drawn, np.sort(np.random.default_rng(0).choice(25, 3, False)))
    names = (run / "evaluation" / content["sets"]["far"]["names"]).read_text().split()
    assert names == [few.names[row] for row in drawn]


@pytest.fixture
def other_run(run, tmp_path):
    """Return a run that differs from ``run`` in the seed of training."""
    other = Path(shutil.copytree(run, tmp_path / "other"))
    config = TrainConfig(epochs=2, batch_size=32, width=32, feature_maps=0, seed=5, overwrite=True)
    train_decoder(other, CPU, config)
    return other


def test_other_seeds_are_scored_by_their_own_decoders(data, run, other_run):
    config = replace(CONFIG, overwrite=True)
    test = open_images(str(data / "test"))
    evaluate(run, test, sets_of(data), CPU, config, more_runs=[other_run])
    content, rows = table(run)
    pictures = [Image.open(path) for path in sorted((data / "far").iterdir())]
    for name, folder in {"heatmap": run, "heatmap-2": other_run}.items():
        detector = HeatmapDetector.load(folder, "cpu")
        detector.scorer = HeatmapScorer()
        wanted = detector(pictures).score
        np.testing.assert_allclose(scores(run, "far")[name], wanted, rtol=1e-5)
    ids, oods = scores(run, "id"), scores(run, "far")
    each = [by_counting(ids[name], oods[name])["auroc"] for name in ("heatmap", "heatmap-2")]
    row = rows["heatmap, 2 runs", "far"]
    assert row["runs"]["auroc"] == pytest.approx(each)
    assert row["spread"]["auroc"] == pytest.approx(statistics.stdev(each))
    assert [one["seed"] for one in content["runs"]] == [0, 5]
    report = (run / "evaluation" / "report.html").read_text()
    assert f"± {100 * row['spread']['auroc']:.2f}" in report


def test_the_same_seed_twice_is_refused(data, run, tmp_path):
    twin = shutil.copytree(run, tmp_path / "twin")
    with pytest.raises(UsageError, match="twin has the seed of another run"):
        evaluate(run, open_images(str(data / "test")), sets_of(data), CPU, CONFIG, more_runs=[twin])


def test_a_run_that_was_trained_otherwise_is_refused_by_name(data, run, other_run):
    config = TrainConfig(epochs=1, batch_size=32, width=32, feature_maps=0, seed=5, overwrite=True)
    train_decoder(other_run, CPU, config)
    test = open_images(str(data / "test"))
    message = r"other has a different decoder options\.epochs \(1, "
    with pytest.raises(OodHeatmapError, match=message):
        evaluate(run, test, sets_of(data), CPU, CONFIG, more_runs=[other_run])


def test_a_run_of_another_classifier_is_refused_by_name(data, spec, run, tmp_path):
    weights = load_file(data / "weights.safetensors")
    save_file({name: 2 * value for name, value in weights.items()}, tmp_path / "w.safetensors")
    other = tmp_path / "other"
    classifier = load_classifier(spec, weights=tmp_path / "w.safetensors")
    build_index(other, open_images(str(data / "id")), classifier, IndexConfig())
    shutil.copytree(run / "targets", other / "targets")
    shutil.copytree(run / "decoder", other / "decoder")
    test = open_images(str(data / "test"))
    with pytest.raises(OodHeatmapError, match=r"other has a different index classifier\.weights"):
        evaluate(run, test, sets_of(data), CPU, CONFIG, more_runs=[other])


def test_started_again_it_is_finished_and_lost_files_come_back_the_same(data, run, tree):
    before = tree(run / "evaluation")
    evaluate(run, open_images(str(data / "test")), sets_of(data), CPU, CONFIG)
    assert tree(run / "evaluation") == before
    lost = ("manifest.json", "scores-near.npz", "figures/roc.png", "metrics.json", "report.html")
    for name in (*lost, "calibration.safetensors", "images-far.txt"):
        (run / "evaluation" / name).unlink()
    evaluate(run, open_images(str(data / "test")), sets_of(data), CPU, CONFIG)
    assert tree(run / "evaluation") == before


def test_stopped_between_two_sets_it_ends_byte_for_byte_the_same(data, run, tree, monkeypatch):
    folder, test = run / "evaluation", open_images(str(data / "test"))
    wanted = tree(folder)
    shutil.rmtree(folder)

    def stop_at_near(stage, name, *rest):
        if name == "near":
            raise KeyboardInterrupt
        return score_set(stage, name, *rest)

    with monkeypatch.context() as patched:
        patched.setattr("ood_heatmap.pipeline.evaluate.score_set", stop_at_near)
        with pytest.raises(KeyboardInterrupt):
            evaluate(run, test, sets_of(data), CPU, CONFIG)
    assert (folder / "scores-far.npz").is_file()
    assert not (folder / "manifest.json").is_file()
    evaluate(run, test, sets_of(data), CPU, CONFIG)
    assert tree(folder) == wanted


@pytest.fixture
def copied_data(data, tmp_path):
    """Return a copy of the image sets, to be changed."""
    return Path(shutil.copytree(data, tmp_path / "data"))


def change_pixels(path):
    """Write another image of the same name, size and number of bytes."""
    with Image.open(path) as image:
        pixels = np.array(image)
    Image.fromarray(pixels).save(path.with_suffix(".bmp"))
    before = path.with_suffix(".bmp").read_bytes()
    Image.fromarray(255 - pixels).save(path.with_suffix(".bmp"))
    assert len(before) == path.with_suffix(".bmp").stat().st_size
    return before


@pytest.mark.parametrize("unfinished", [False, True])
def test_images_that_changed_with_the_same_size_are_noticed(copied_data, run, unfinished):
    folder = run / "evaluation"
    first = sorted((copied_data / "far").iterdir())[7]
    now = change_pixels(first)
    first.unlink()
    other = first.with_suffix(".bmp").read_bytes()
    first.with_suffix(".bmp").write_bytes(now)

    def again(**options):
        test = open_images(str(copied_data / "test"))
        return evaluate(run, test, sets_of(copied_data), CPU, replace(CONFIG, **options))

    before = again(overwrite=True)
    first.with_suffix(".bmp").write_bytes(other)
    if unfinished:
        (folder / "unfinished.json").write_text(
            json.dumps({"format": before.format, "inputs": dict(before.inputs)})
        )
        lines = [
            json.dumps({"name": name, "sha256": one.sha256, "num_bytes": one.num_bytes})
            for name, one in before.files.items()
        ]
        (folder / "checksums-00000.jsonl").write_text("\n".join(lines))
        (folder / "manifest.json").unlink()
    with pytest.raises(
        StaleCacheError, match=r"other images \(images\.far\.content differs in .*far\)"
    ):
        again()
    after = again(overwrite=True)
    assert after.content != before.content
    assert len(scores(run, "far")["row"]) == 25
    assert again().content == after.content


def test_the_content_hash_does_not_depend_on_the_batch_size(data, run, monkeypatch):
    monkeypatch.setattr("ood_heatmap.pipeline.scoring._CHUNK", 10)
    test = open_images(str(data / "test"))
    contents = {
        evaluate(
            run, test, sets_of(data), CPU, replace(CONFIG, batch_size=size, overwrite=True)
        ).content
        for size in (3, 64)
        if not shutil.rmtree(run / "evaluation")
    }
    assert len(contents) == 1


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_damaged_scores_of_a_stopped_evaluation_are_made_again(
    data, run, tree, monkeypatch, damage
):
    folder, test = run / "evaluation", open_images(str(data / "test"))
    wanted = tree(folder)
    shutil.rmtree(folder)
    with monkeypatch.context() as patched:
        patched.setattr("ood_heatmap.pipeline.evaluate.metrics_table", raise_keyboard_interrupt)
        with pytest.raises(KeyboardInterrupt):
            evaluate(run, test, sets_of(data), CPU, CONFIG)
    path = folder / "scores-far.npz"
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    path.write_bytes({"flip": content, "cut": content[:-50], "empty": b""}[damage])
    evaluate(run, test, sets_of(data), CPU, CONFIG)
    assert tree(folder) == wanted


def raise_keyboard_interrupt(*_):
    raise KeyboardInterrupt


def test_another_test_set_is_refused_by_name(data, run):
    with pytest.raises(StaleCacheError, match=r"different images\.id\."):
        evaluate(run, open_images(str(data / "far")), sets_of(data), CPU, CONFIG)


@pytest.mark.parametrize(
    ("sets", "near", "words"),
    [
        ((), (), "no OOD set"),
        (("far",), ("fur",), r"--near fur is not one of the OOD sets \(far\)"),
        (("id",), (), "cannot be named 'id'"),
        (("calibration",), (), "cannot be named 'calibration'"),
        (("mixtures",), (), "cannot be named 'mixtures'"),
        (("../far",), (), r"cannot be named '\.\./far'"),
    ],
)
def test_wrong_names_of_sets_are_refused(data, run, sets, near, words):
    images = open_images(str(data / "far"))
    with pytest.raises(UsageError, match=words):
        evaluate(run, images, dict.fromkeys(sets, images), CPU, EvaluateConfig(near=near))


def test_the_report_begins_with_the_warnings_of_all_stages(finished_run):
    """The test classifier is random, so that index and evaluate have something to say."""
    manifests = {
        name: json.loads((finished_run / name / "manifest.json").read_text())
        for name in ("index", "targets", "decoder", "evaluation")
    }
    warnings = [text for one in manifests.values() for text in one["results"]["warnings"]]
    assert manifests["index"]["results"]["warnings"]
    assert manifests["evaluation"]["results"]["warnings"]
    page = (finished_run / "evaluation" / "report.html").read_text()
    box = page[page.index('class="warnings"') : page.index("<main>")].partition("</section>")[0]
    items = [unescape(text) for text in re.findall("<li>(.*?)</li>", box)]
    assert items == list(dict.fromkeys(warnings))


def test_test_images_are_read_again_only_if_size_or_time_differ(copied_data, run, monkeypatch):
    def again(**options):
        test = open_images(str(copied_data / "test"))
        return evaluate(run, test, sets_of(copied_data), CPU, replace(CONFIG, **options))

    made = again(overwrite=True)
    read = []
    compute = scoring.current_content

    def count(subset, rows):
        read.append(Path(subset.images.source).name)
        return compute(subset, rows)

    monkeypatch.setattr("ood_heatmap.pipeline.evaluate.current_content", count)
    assert again() == made
    assert read == []
    for path in (copied_data / "far").iterdir():
        os.utime(path, (10**9, 10**9))
    assert again() == made
    assert read == ["far"]
