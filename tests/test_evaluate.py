"""Stage 4: the table equals scikit-learn recomputed from the saved scores."""

import json

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from ood_heatmap.detector import HeatmapDetector
from ood_heatmap.errors import StaleCacheError, UsageError
from ood_heatmap.images import open_images
from ood_heatmap.pipeline.config import EvaluateConfig
from ood_heatmap.pipeline.evaluate import METHODS, evaluate, format_table

CPU = torch.device("cpu")
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
    np.testing.assert_allclose(saved["heatmap"], result.score, rtol=1e-5)
    np.testing.assert_array_equal(saved["prediction"], result.prediction)


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
    with h5py.File(finished_run / "index" / "images-00000.h5") as file:
        bank = file["features"][...].astype(np.float64)
    query = output.features.numpy().astype(np.float64)
    bank /= np.linalg.norm(bank, axis=1, keepdims=True)
    query /= np.linalg.norm(query, axis=1, keepdims=True)
    distance = np.sort(np.linalg.norm(query[:, None] - bank, axis=2), axis=1)
    np.testing.assert_allclose(saved["knn"], distance[:, 4], atol=1e-3)


def test_pictures_and_sources_are_there(data, finished_run):
    folder = finished_run / "evaluation" / "figures"
    for name in ("histograms", "roc", "examples"):
        with Image.open(folder / f"{name}.png") as picture:
            assert picture.width > 300
    sets = table(finished_run)[0]["sets"]
    assert sets["far"]["num_images"] == 25
    assert len({entry["content"] for entry in sets.values()}) == 3


def test_started_again_it_is_finished_and_lost_files_come_back_the_same(data, run):
    def tree():
        return {
            path: path.read_bytes() for path in (run / "evaluation").rglob("*") if path.is_file()
        }

    before = tree()
    evaluate(run, open_images(str(data / "test")), sets_of(data), CPU, CONFIG)
    assert tree() == before
    for name in ("manifest.json", "scores-near.npz", "figures/roc.png", "metrics.json"):
        (run / "evaluation" / name).unlink()
    evaluate(run, open_images(str(data / "test")), sets_of(data), CPU, CONFIG)
    assert tree() == before


def test_another_test_set_is_refused_by_name(data, run):
    with pytest.raises(StaleCacheError, match=r"another images\.id\."):
        evaluate(run, open_images(str(data / "far")), sets_of(data), CPU, CONFIG)


@pytest.mark.parametrize(
    ("sets", "near", "words"),
    [
        ((), (), "no OOD set"),
        (("far",), ("fur",), r"--near fur is none of the OOD sets \(far\)"),
        (("id",), (), "cannot be called 'id'"),
        (("../far",), (), r"cannot be called '\.\./far'"),
    ],
)
def test_wrong_names_of_sets_are_refused(data, run, sets, near, words):
    images = open_images(str(data / "far"))
    with pytest.raises(UsageError, match=words):
        evaluate(run, images, dict.fromkeys(sets, images), CPU, EvaluateConfig(near=near))


def test_the_terminals_table_names_both_conventions(finished_run):
    text = format_table(table(finished_run)[0])
    assert "FPR95 ID+" in text
    assert "FPR95 OOD+" in text
    assert len(text.splitlines()) == 1 + len(METHODS) * 5
