"""The detector under scikit-learn's conventions for outlier detectors."""

import pickle

import numpy as np
import pytest
from PIL import Image
from sklearn.base import clone, is_outlier_detector
from sklearn.exceptions import NotFittedError
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.estimator_checks import check_estimator
from sklearn.utils.validation import check_is_fitted

from ood_heatmap import HeatmapDetector
from ood_heatmap.adapters.sklearn import HeatmapOutlierDetector
from ood_heatmap.errors import UsageError


def noise(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 16, 16, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def fitted(finished_run) -> HeatmapOutlierDetector:
    """Return the estimator after a fit on 39 held-out images, in several batches."""
    return HeatmapOutlierDetector(finished_run, false_alarm=0.1, device="cpu", batch_size=16).fit(
        noise(0, 39)
    )


def test_scores_and_decisions_are_the_detectors_with_the_other_sign(fitted, finished_run):
    images = noise(1, 30)
    detector = HeatmapDetector.load(finished_run, "cpu")
    score = detector(images).score
    np.testing.assert_allclose(fitted.score_samples(images), -score, rtol=1e-5)
    # the fourth highest of 39 is exceeded by at most a tenth of 39 + 1
    threshold = np.sort(detector(noise(0, 39)).score)[-4]
    np.testing.assert_allclose(fitted.offset_, -threshold, rtol=1e-5)
    np.testing.assert_allclose(fitted.decision_function(images), threshold - score, atol=1e-6)
    wanted = np.where(score > threshold, -1, 1)
    np.testing.assert_array_equal(fitted.predict(images), wanted)
    assert set(wanted) == {-1, 1}


def test_no_more_held_out_images_than_the_level_are_outliers(fitted):
    assert (fitted.fit_predict(noise(0, 39)) == -1).sum() == 3


def test_all_that_the_detector_takes_is_taken(fitted, tmp_path):
    images = noise(1, 3)
    wanted = fitted.score_samples(images)
    paths = []
    for number, image in enumerate(images):
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(image).save(paths[-1])
    for given in ([*map(Image.fromarray, images)], paths, np.array([*map(str, paths)], object)):
        np.testing.assert_allclose(fitted.score_samples(given), wanted, rtol=1e-5)


def test_without_images_the_threshold_is_that_of_the_run(run):
    # 30 test images, a third of them held out: enough for one in three
    detector = HeatmapDetector.load(run, "cpu", false_alarm=0.3)
    fitted = HeatmapOutlierDetector(run, false_alarm=0.3).fit()
    assert fitted.offset_ == -detector.threshold


def test_a_threshold_that_cannot_be_set_is_one_line(finished_run):
    with pytest.raises(UsageError, match=r"level of 0\.01 needs 99 held-out ID images"):
        HeatmapOutlierDetector(finished_run, false_alarm=0.01).fit(noise(0, 39))
    with pytest.raises(UsageError, match="no image"):
        HeatmapOutlierDetector(finished_run).fit([])


def test_it_is_an_estimator(fitted, finished_run):
    assert is_outlier_detector(fitted)
    check_is_fitted(fitted)
    copy = clone(fitted)
    assert (
        copy.get_params()
        == fitted.get_params()
        == {
            "run": finished_run,
            "false_alarm": 0.1,
            "device": "cpu",
            "batch_size": 16,
        }
    )
    with pytest.raises(NotFittedError):
        copy.predict(noise(1, 2))
    assert copy.set_params(false_alarm=0.5).false_alarm == 0.5
    assert "false_alarm=0.1" in repr(fitted)
    assert pickle.loads(pickle.dumps(copy)).get_params() == copy.get_params()


@pytest.mark.filterwarnings("ignore:Can't test estimator:sklearn.exceptions.SkipTestWarning")
def test_scikit_learns_own_checks_pass():
    # those for 2-D arrays of numbers are skipped by the tag
    check_estimator(HeatmapOutlierDetector())


def test_in_a_pipeline_and_with_its_metrics(finished_run):
    images = noise(1, 10)
    darken = FunctionTransformer(lambda batch: batch // 4)
    pipeline = make_pipeline(darken, HeatmapOutlierDetector(finished_run, false_alarm=0.1))
    pipeline.fit(noise(0, 39))
    detector = HeatmapDetector.load(finished_run, "cpu")
    score = detector(images // 4).score
    np.testing.assert_allclose(pipeline.score_samples(images), -score, rtol=1e-5)
    assert set(pipeline.predict(images)) <= {-1, 1}
    labels = np.repeat([1, -1], 5)
    auroc = roc_auc_score(labels == -1, score)
    assert roc_auc_score(labels, pipeline.decision_function(images)) == pytest.approx(auroc)
