"""The detector in a user's hands."""

import copy
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from math import inf
from pathlib import Path

import cloudpickle
import numpy as np
import pandas
import pytest
import torch
from joblib import Parallel, delayed
from PIL import Image
from scipy.stats import binomtest

from ood_heatmap import HeatmapDetector, Result
from ood_heatmap.cache import manifest as manifest_module
from ood_heatmap.cache.manifest import FileRecord, write_manifest
from ood_heatmap.calibration import Calibration
from ood_heatmap.classifier import Classifier
from ood_heatmap.detector import _rebuild
from ood_heatmap.errors import DamagedCacheError, OodHeatmapError, StaleCacheError, UsageError
from ood_heatmap.images import UnreadableImageError
from ood_heatmap.pipeline import load
from ood_heatmap.pipeline.config import EvaluateConfig
from ood_heatmap.pipeline.run import open_decoder, open_index, read_manifest
from ood_heatmap.scorer import HeatmapScorer


@pytest.fixture(scope="module")
def detector(finished_run) -> HeatmapDetector:
    return HeatmapDetector.load(finished_run, device="cpu")


def test_every_kind_of_input_means_the_same(detector):
    array = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3)).astype(np.uint8)
    wanted = detector(array)
    pictures = [Image.fromarray(item) for item in array]
    for images in (
        array.transpose(0, 3, 1, 2),
        torch.from_numpy(array),
        torch.from_numpy(array).permute(0, 3, 1, 2),
        pictures,
    ):
        np.testing.assert_array_equal(detector(images).score, wanted.score)
    np.testing.assert_allclose(detector(pictures[1]).score, wanted.score[1:2], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(detector(array[1]).score, wanted.score[1:2], rtol=1e-5, atol=1e-5)


def test_the_decoders_score_is_read_off_the_heatmap(detector):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 30, 20, 3)).astype(np.uint8)
    result = detector(pixels)
    assert result.heatmap.shape == (3, 1, 16, 16)
    np.testing.assert_array_equal(result.pixel_score, result.heatmap[:, 0])
    detector.scorer = HeatmapScorer()
    result = detector(pixels)
    log_odds = np.log(result.heatmap / (1 - result.heatmap.astype(np.float64)))
    level = np.log(np.exp(log_odds).mean(axis=(1, 2, 3)))
    np.testing.assert_allclose(result.score, level, rtol=1e-4, atol=1e-5)
    assert result.prediction.shape == (3,)


def test_a_list_may_mix_sizes_kinds_and_layouts(detector, tmp_path):
    rng = np.random.default_rng(0)
    array = rng.integers(0, 256, (40, 25, 3)).astype(np.uint8)
    grey = rng.integers(0, 256, (20, 33)).astype(np.uint8)
    Image.fromarray(array).save(tmp_path / "a.png")
    Image.fromarray(grey).save(tmp_path / "grey.png")
    wanted = [detector(Image.fromarray(item)).score[0] for item in (array, grey)]
    kinds = {
        0: [
            array,
            Image.fromarray(array),
            torch.from_numpy(array),
            torch.from_numpy(array).permute(2, 0, 1),
            array.transpose(2, 0, 1),
            tmp_path / "a.png",
            str(tmp_path / "a.png"),
        ],
        1: [grey, grey[:, :, None], grey[None], torch.from_numpy(grey), tmp_path / "grey.png"],
    }
    listed = kinds[0] + kinds[1]
    expected = [wanted[0]] * len(kinds[0]) + [wanted[1]] * len(kinds[1])
    for images in (listed, tuple(listed), iter(listed)):
        np.testing.assert_allclose(detector(images).score, expected, rtol=1e-5)
    for image, score in zip(listed, expected, strict=True):
        np.testing.assert_allclose(detector(image).score, [score], rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_images_on_a_gpu_are_what_they_are_on_the_cpu(finished_run):
    detector = HeatmapDetector.load(finished_run, device="cuda")
    images = torch.from_numpy(noise(0, 3)).cuda()
    for given in (images, images.permute(0, 3, 1, 2), list(images)):
        wanted = detector(images.cpu()).score
        np.testing.assert_allclose(detector(given).score, wanted, rtol=1e-5)


@pytest.mark.parametrize(
    ("images", "named"),
    [
        (np.zeros((2, 16, 16, 3), np.float32), r"float32.*pass normalized=True"),
        (torch.zeros(2, 3, 16, 16), r"torch\.float32.*pass normalized=True"),
        ([np.ones((3, 16, 16))], r"float64.*pass normalized=True"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.bfloat16), "torch.bfloat16"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.int64), "torch.int64"),
        ([np.zeros((16, 16, 3), bool)], "bool"),
        (np.zeros((2, 16, 16), np.uint8), r"shape \(2, 16, 16\)"),
        (np.zeros(5, np.uint8), r"shape \(5,\)"),
        (np.zeros((2, 2, 3, 16, 16), np.uint8), "shape"),
        (np.zeros((2, 4, 16, 16), np.uint8), r"shape \(4, 16, 16\)"),
        ([np.zeros((2, 16, 16, 3), np.uint8)], r"shape \(2, 16, 16, 3\)"),
        (np.zeros((0, 16, 3), np.uint8), r"no pixels: its shape is \(0, 16, 3\)"),
        (Image.new("RGB", (0, 5)), "no pixels: its size is 0 x 5"),
        ([], "there is no image"),
        (np.zeros((0, 16, 16, 3), np.uint8), "there is no image"),
        (None, "got NoneType"),
        (7, "got int"),
        ([7], "got int for one of them"),
        ([[1, 2], [3, 4]], "got list for one of them"),
        ({"images": 1}, "got dict"),
        (b"abc", "got bytes"),
        (str(Path(__file__).parent), r"is a folder: pass its images, such as sorted\(Path\("),
        (iter([torch.zeros(2, 3, 16, 16, dtype=torch.uint8)]), "with each batch, and join"),
    ],
)
def test_anything_else_is_refused_in_one_line(detector, images, named):
    with pytest.raises(UsageError, match=named) as caught:
        detector(images)
    assert "\n" not in str(caught.value)


def standardize(detector: HeatmapDetector, images: np.ndarray) -> np.ndarray:
    """Normalize uint8 ``(B, H, W, 3)`` as torchvision's ToTensor and Normalize."""
    config = detector.classifier.config
    pixels = images.astype(np.float64) / 255
    return ((pixels - config.mean) / config.std).transpose(0, 3, 1, 2).astype(np.float32)


@pytest.fixture(scope="module")
def normalizing(finished_run) -> HeatmapDetector:
    """Return a detector whose classifier has a mean and std for each channel."""
    detector = HeatmapDetector.load(finished_run, device="cpu")
    config = detector.classifier.config
    config = replace(config, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
    return HeatmapDetector(Classifier(detector.classifier.network, config), detector.decoder)


def test_normalized_batches_score_as_the_images_they_were_made_from(normalizing):
    images = noise(0, 5)
    wanted = normalizing(images)
    batch = standardize(normalizing, images)
    for given in (batch, torch.from_numpy(batch), list(torch.from_numpy(batch)), iter(batch)):
        found = normalizing(given, normalized=True, batch_size=2)
        np.testing.assert_allclose(found.score, wanted.score, rtol=1e-5)
        np.testing.assert_allclose(found.heatmap, wanted.heatmap, atol=1e-5)
        for row in range(5):
            np.testing.assert_array_equal(np.asarray(found.image(row)), images[row])
    alone = normalizing(torch.from_numpy(batch[3]), normalized=True)
    np.testing.assert_allclose(alone.score, wanted.score[3:4], rtol=1e-5)
    for dtype in (torch.float64, torch.bfloat16):
        rounded = normalizing(torch.from_numpy(batch).to(dtype), normalized=True)
        np.testing.assert_allclose(rounded.score, wanted.score, rtol=0.05)


@pytest.mark.parametrize(
    ("images", "named"),
    [
        (
            np.zeros((2, 3, 16, 16), np.uint8),
            "normalized=True is for float images, got torch.uint8",
        ),
        (np.zeros((2, 3, 20, 20), np.float32), r"\(3, 16, 16\).*got shape \(2, 3, 20, 20\)"),
        (np.zeros((2, 16, 16, 3), np.float32), r"got shape \(2, 16, 16, 3\)"),
        (torch.zeros(16, 16), r"got one of shape \(16, 16\)"),
        (torch.full((1, 3, 16, 16), 200.0), "not normalized with mean .* and std"),
        (torch.full((1, 3, 16, 16), torch.nan), "not normalized with mean .* and std"),
        (Image.new("RGB", (16, 16)), "normalized=True.*got Image: leave it out"),
        (["a.png"], "normalized=True.*got str"),
        ([], "there is no image"),
    ],
)
def test_what_is_not_a_normalized_batch_is_refused_in_one_line(normalizing, images, named):
    with pytest.raises(UsageError, match=named) as caught:
        normalizing(images, normalized=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"batch_size": "8"}, "batch_size must be at least 1, got '8'"),
        ({"output": "jax"}, "got 'jax'"),
    ],
)
def test_arguments_of_a_call_are_checked(detector, argument, named):
    with pytest.raises(UsageError, match=named):
        detector(noise(0, 1), **argument)


def test_a_column_of_a_data_frame_is_a_list_of_images(detector, data):
    paths = sorted(str(path) for path in (data / "far").iterdir())[:3]
    wanted = detector(paths)
    for given in (np.array(paths), np.array(paths, object), pandas.Series(paths).to_numpy()):
        found = detector(given)
        np.testing.assert_array_equal(found.score, wanted.score)
        assert found.to_dict()["image"] == paths


def test_an_iterator_of_paths_keeps_their_names_and_photos(detector, data, tmp_path):
    path = tmp_path / "wide.png"
    photo = Image.fromarray(noise(0, 1)[0]).resize((90, 30))
    photo.save(path)
    wanted = detector([path, photo])
    found = detector(item for item in [path, photo])
    np.testing.assert_array_equal(found.score, wanted.score)
    assert found.to_dict()["image"] == [str(path), None]
    assert found.image(0).size == (90, 30)
    assert found.overlay(0).tobytes() == wanted.overlay(0).tobytes()
    joined = Result.concatenate([found, detector([path])])
    assert joined.overlay(2).tobytes() == wanted.overlay(0).tobytes()
    assert joined.image(1).size == (16, 16)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "auto"])
def test_a_device_that_is_not_there_is_one_line_and_moves_nothing(detector, device):
    before = detector(noise(0, 1)).score
    with pytest.raises(UsageError, match=f"there is no device '{device}' here") as caught:
        detector.to(device)
    assert "\n" not in str(caught.value)
    np.testing.assert_array_equal(detector(noise(0, 1)).score, before)


def test_the_size_of_a_batch_does_not_matter(detector, monkeypatch):
    images = noise(0, 7)
    sizes = []
    classify = HeatmapDetector._classify

    def record(self, pixels):
        sizes.append(len(pixels))
        return classify(self, pixels)

    monkeypatch.setattr(HeatmapDetector, "_classify", record)
    wanted = detector(images)
    for given in (images, list(images), (Image.fromarray(image) for image in images)):
        sizes.clear()
        found = detector(given, batch_size=3)
        assert sizes == [3, 3, 1]
        np.testing.assert_allclose(found.score, wanted.score, rtol=1e-5)
        np.testing.assert_array_equal(found.prediction, wanted.prediction)
        np.testing.assert_array_equal(np.stack([found.image(row) for row in range(7)]), images)


def test_tensors_on_request(detector):
    images = noise(0, 5)
    calibrated = detector.calibrated(calibrate(detector, noise(1, 30)), 0.2)
    wanted, found = calibrated(images), calibrated(images, output="torch", batch_size=2)
    assert len(found) == 5
    for name in ("score", "heatmap", "prediction", "p_value", "is_ood", "confidence"):
        tensor = getattr(found, name)
        assert isinstance(tensor, torch.Tensor)
        assert tensor.device == detector.device
        np.testing.assert_allclose(tensor.numpy(), getattr(wanted, name), rtol=1e-5)
    # an inference tensor could not be modified
    found.score.add_(1)
    assert detector(images, output="torch").is_ood is None


def test_the_confidence_is_the_softmax_of_the_predicted_class(detector):
    images = noise(0, 5)
    result, output = detector.detect(images.transpose(0, 3, 1, 2))
    softmax = np.exp(output.logits.double().numpy())
    softmax /= softmax.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(result.confidence, softmax.max(axis=1), rtol=1e-5)
    np.testing.assert_array_equal(result.prediction, softmax.argmax(axis=1))


def test_many_threads_get_the_scores_of_one(detector):
    batches = [noise(seed, 3) for seed in range(40)]
    wanted = [detector(batch).score for batch in batches]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda batch: detector(batch).score, 5 * batches))
    np.testing.assert_allclose(np.stack(found), np.stack(5 * wanted), rtol=1e-5)


def test_a_deep_copy_is_another_detector_with_the_same_scores(detector):
    images = noise(0, 3)
    copied = copy.deepcopy(detector)
    np.testing.assert_array_equal(copied(images).score, detector(images).score)
    with torch.no_grad():
        for parameter in copied.classifier.network.parameters():
            parameter.zero_()
    assert not np.array_equal(copied(images).score, detector(images).score)


LOAD_AND_SCORE = """
import pickle, sys
from pathlib import Path
import numpy as np
if __name__ == "__main__":
    folder = Path(sys.argv[1])
    detector = pickle.loads((folder / "detector.pickle").read_bytes())
    result = detector(np.load(folder / "images.npy"))
    np.savez(folder / "found.npz", score=result.score, is_ood=result.is_ood)
"""


@pytest.mark.parametrize("dumps", [pickle.dumps, cloudpickle.dumps])
def test_a_pickled_detector_works_in_a_process_without_its_run(run, tmp_path, dumps, data):
    images = noise(2, 6)
    loaded = HeatmapDetector.load(run, "cpu")
    detector = loaded.calibrated(calibrate(loaded, noise(1, 30)), 0.2)
    (tmp_path / "detector.pickle").write_bytes(dumps(detector))
    np.save(tmp_path / "images.npy", images)
    network = data / "network.py"
    hidden = network.rename(tmp_path / "hidden.py")
    try:
        subprocess.run([sys.executable, "-c", LOAD_AND_SCORE, tmp_path], check=True)
    finally:
        hidden.rename(network)
    wanted, found = detector(images), np.load(tmp_path / "found.npz")
    np.testing.assert_allclose(found["score"], wanted.score, rtol=1e-5)
    np.testing.assert_array_equal(found["is_ood"], wanted.is_ood)


def test_a_pickle_keeps_level_names_and_colours(detector):
    strict = detector.calibrated(calibrate(detector, noise(1, 30)), 0.2)
    again = pickle.loads(pickle.dumps(strict))
    assert again.scale == strict.scale
    assert again.fingerprint == strict.fingerprint
    assert repr(again) == repr(strict)
    assert again.classifier.fingerprint() == strict.classifier.fingerprint()


def test_a_pickle_from_a_gpu_opens_on_the_cpu_of_another_machine(detector, caplog):
    _, (classifier, decoder, arguments, _) = detector.__reduce__()
    again = _rebuild(classifier, decoder, arguments, "cuda:99")
    assert again.device.type == "cpu"
    assert "no cuda:99" in caplog.text


def test_nearest_id_images_are_those_of_brute_force(detector, finished_run, monkeypatch, tmp_path):
    images = noise(0, 4)
    copied = pickle.loads(pickle.dumps(detector.at(0.4)))
    monkeypatch.chdir(tmp_path)
    result = copied(images, nearest=3, batch_size=3)
    index = open_index(finished_run)
    bank, classes = (index.columns[name].read() for name in ("features", "prediction"))
    _, output = detector.detect(images.transpose(0, 3, 1, 2))
    for i, query in enumerate(output.features.double().numpy()):
        of_class = np.flatnonzero(classes == result.prediction[i])
        distance = np.linalg.norm(query - bank[of_class].astype(np.float64), axis=1)
        wanted = np.argsort(distance)[:3]
        assert result[i].nearest == tuple(index.row[of_class[wanted]].tolist())
        np.testing.assert_allclose(result[i].distance, distance[wanted], rtol=1e-5)
        found = result.nearest.neighbours(i)
        assert [item.distance for item in found] == list(result[i].distance)
        for item, position in zip(found, of_class[wanted], strict=True):
            pixels = np.asarray(item.image).transpose(2, 0, 1)
            np.testing.assert_array_equal(pixels, index.columns["images"].read()[position])
    assert result[2:].to_dict()["nearest"] == [list(result[i].nearest) for i in (2, 3)]
    assert result.plot(0).width > detector(images).plot(0).width


def test_a_class_with_few_id_images_has_few_nearest_and_nan_has_none(detector, finished_run):
    index = open_index(finished_run)
    features = index.columns["features"].read()[:2].copy()
    features[1] = np.nan
    size, small = min(
        (count, label) for label, count in enumerate(index.results.class_counts) if count
    )
    found = detector.id_images.search(features, np.array([small, small]), size + 2)
    assert (found.row >= 0).tolist() == [[True] * size + [False] * 2, [False] * (size + 2)]
    assert np.isinf(found.distance[found.row < 0]).all()
    assert len(found.neighbours(0)) == size
    assert found.neighbours(1) == []


def test_threads_share_the_search_of_nearest_images(finished_run):
    detector = HeatmapDetector.load(finished_run, "cpu")
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda seed: detector(noise(seed, 3), nearest=2), range(8)))
    for seed, result in enumerate(found):
        wanted = detector(noise(seed, 3), nearest=2)
        np.testing.assert_array_equal(result.nearest.row, wanted.nearest.row)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"nearest": 6}, "nearest must be 0 to 5, got 6"),
        ({"nearest": -1}, "nearest must be 0 to 5, got -1"),
        ({"nearest": "3"}, "nearest must be 0 to 5, got '3'"),
        ({"nearest": 1, "output": "torch"}, "needs output='numpy'"),
    ],
)
def test_nearest_images_that_cannot_be_had_are_refused(detector, arguments, named):
    with pytest.raises(UsageError, match=named):
        detector(noise(0, 1), **arguments)


def test_nearest_images_need_the_index_they_were_loaded_with(run):
    detector = HeatmapDetector.load(run, "cpu")
    in_memory = HeatmapDetector(detector.classifier, detector.decoder)
    with pytest.raises(UsageError, match="neither a bundle nor a detector made in memory"):
        in_memory(noise(0, 1), nearest=1)
    index = read_manifest(run, "index")
    write_manifest(run / "index", replace(index, inputs={**index.inputs, "x": 1}, fingerprint=""))
    with pytest.raises(StaleCacheError, match="was indexed again: load the detector again"):
        detector(noise(0, 1), nearest=1)
    shutil.rmtree(run)
    with pytest.raises(OodHeatmapError, match="index"):
        detector(noise(0, 1), nearest=1)
    assert len(detector(noise(0, 1))) == 1


def test_joblib_workers_score_alike(detector):
    batches = [noise(seed, 2) for seed in range(4)]
    found = [found.score for found in Parallel(n_jobs=2)(map(delayed(detector), batches))]
    wanted = [detector(batch).score for batch in batches]
    np.testing.assert_allclose(np.stack(found), np.stack(wanted), rtol=1e-5)


def test_a_data_loader_may_use_the_transform_of_the_detector(detector):
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 25, 3)).astype(np.uint8))
    pixels = pickle.loads(pickle.dumps(detector.transform))(photo)
    np.testing.assert_array_equal(detector(pixels).score, detector(photo).score)


@pytest.mark.parametrize("images", ["nowhere.png", ["nowhere.png"], Image.new("F", (20, 20))])
def test_an_unreadable_image_is_named(detector, images):
    with pytest.raises(UnreadableImageError, match=r"nowhere\.png|image 0"):
        detector(images)


def test_a_damaged_decoder_is_refused(run):
    path = run / "decoder" / "decoder.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(DamagedCacheError, match=r"decoder\.safetensors has changed"):
        HeatmapDetector.load(run)


def noise(seed: int, count: int) -> np.ndarray:
    """Return images that are drawn alike, whatever the seed."""
    return np.random.default_rng(seed).integers(0, 256, (count, 16, 16, 3)).astype(np.uint8)


def calibrate(detector: HeatmapDetector, images: np.ndarray) -> Calibration:
    result = detector(images)
    return Calibration.fit(result.score, result.pixel_score.max(axis=(1, 2)))


def test_without_a_calibration_there_is_no_decision(detector):
    result = detector.calibrated(None, 0.05)(noise(0, 2))
    assert np.isnan(result.p_value).all()
    assert result.is_ood is None
    assert np.isnan([detector.calibrated(None, 0.05).threshold]).all()


def test_p_values_count_the_held_out_images_and_decide(detector):
    held_out, images = noise(1, 19), noise(2, 10)
    calibrated = detector.calibrated(calibrate(detector, held_out), 0.2)
    known, result = detector(held_out).score, calibrated(images)
    wanted = [(1 + (known >= score).sum()) / 20 for score in result.score]
    np.testing.assert_allclose(result.p_value, wanted)
    assert result.is_ood.tolist() == [p <= 0.2 for p in wanted]
    assert calibrated.threshold == np.sort(known)[-4]
    assert (
        calibrated.pixel_threshold == np.sort(detector(held_out).pixel_score.max(axis=(1, 2)))[-4]
    )


def test_the_level_changes_without_fitting_again(detector):
    images = noise(2, 50)
    strict = detector.calibrated(calibrate(detector, noise(1, 200)), 0.05)
    loose = strict.at(0.5)
    assert loose.calibration is strict.calibration
    assert loose(images).is_ood.sum() > strict(images).is_ood.sum()
    for level in (0, 1, -0.1):
        with pytest.raises(UsageError, match="between 0 and 1"):
            strict.at(level)


def test_a_level_too_fine_for_the_calibration_gives_no_decision_and_a_warning(detector, caplog):
    images = noise(2, 5)
    calibrated = detector.calibrated(calibrate(detector, noise(1, 60)), 0.05)
    assert calibrated(images).is_ood is not None
    assert not caplog.messages
    strict = calibrated.at(0.01)
    (message,) = caplog.messages
    assert "a false-alarm level of 0.01 needs at least 99 held-out ID images" in message
    assert "has 60" in message
    assert not strict.decides
    assert strict.threshold == strict.pixel_threshold == inf
    result = strict(images)
    assert result.is_ood is None
    np.testing.assert_array_equal(result.p_value, calibrated(images).p_value)


def test_the_default_level_is_that_of_an_evaluation(detector):
    own = HeatmapDetector(detector.classifier, detector.decoder)
    assert own.false_alarm == EvaluateConfig.false_alarm


def test_classes_without_names_are_called_by_number(detector):
    assert detector.class_name(1) == "class1"
    assert HeatmapDetector(detector.classifier, detector.decoder).class_name(1) == "1"


def test_a_detector_in_memory_imports_no_run_and_no_training():
    code = (
        "import sys, ood_heatmap.detector;"
        "print(*(name for name in sys.modules if name.startswith('ood_heatmap.')))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not [
        name for name in found if name.startswith(("ood_heatmap.pipeline", "ood_heatmap.cache"))
    ]


def test_false_alarms_on_fresh_id_images_stay_within_the_binomial_interval(detector):
    flagged = total = 0
    for seed in range(100):  # the promise is about both draws, of held-out and of fresh images
        calibrated = detector.calibrated(calibrate(detector, noise(2 * seed, 49)), 0.1)
        result = calibrated(noise(2 * seed + 1, 3))
        flagged, total = flagged + int(result.is_ood.sum()), total + 3
    interval = binomtest(flagged, total).proportion_ci(0.999)
    assert interval.low <= 0.1 <= interval.high


def put_calibration(run, calibration: Calibration, false_alarm: float) -> None:
    """Write a calibration as the evaluation does."""
    path = run / "evaluation" / "calibration.safetensors"
    path.write_bytes(calibration.to_bytes())
    manifest = read_manifest(run, "evaluation")
    files = {**manifest.files, path.name: FileRecord.from_file(path)}
    results = {**manifest.results, "false_alarm": false_alarm}
    write_manifest(run / "evaluation", replace(manifest, files=files, results=results))


def test_a_run_is_loaded_with_its_calibration(run, detector):
    calibration = calibrate(detector, noise(1, 30))
    put_calibration(run, calibration, 0.2)
    (run / "evaluation" / "metrics.json").unlink()  # of no importance here
    loaded = HeatmapDetector.load(run, "cpu")
    assert loaded.false_alarm == 0.2
    np.testing.assert_array_equal(loaded.calibration.scores, calibration.scores)
    assert HeatmapDetector.load(run, "cpu", false_alarm=0.3).false_alarm == 0.3


def test_the_calibration_of_another_decoder_is_left_out_and_that_is_said(run, detector, caplog):
    put_calibration(run, calibrate(detector, noise(1, 30)), 0.2)
    manifest = read_manifest(run, "evaluation")
    other = replace(manifest, inputs={**manifest.inputs, "decoder": "0" * 64})
    write_manifest(run / "evaluation", other)
    assert HeatmapDetector.load(run, "cpu").calibration is None
    assert "not calibrated" in caplog.text
    with pytest.raises(OodHeatmapError, match=r"not calibrated.*ood-heatmap evaluate"):
        HeatmapDetector.load(run, "cpu", false_alarm=0.1)


def test_a_damaged_calibration_is_refused(run, detector):
    put_calibration(run, calibrate(detector, noise(1, 30)), 0.2)
    with (run / "evaluation" / "calibration.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    with pytest.raises(DamagedCacheError, match=r"calibration\.safetensors has changed"):
        HeatmapDetector.load(run, "cpu")


def test_a_calibration_that_appears_while_loading_is_not_mixed_with_the_old_decoder(
    run, detector, monkeypatch, caplog
):
    put_calibration(run, calibrate(detector, noise(1, 30)), 0.2)

    def open_then_train_again(*arguments):
        trained = open_decoder(*arguments)
        manifest = read_manifest(run, "decoder")
        retrained = replace(manifest, inputs={**manifest.inputs, "seed": 5}, fingerprint="")
        write_manifest(run / "decoder", retrained)
        evaluation = read_manifest(run, "evaluation")
        inputs = {**evaluation.inputs, "decoder": retrained.fingerprint}
        write_manifest(run / "evaluation", replace(evaluation, inputs=inputs, fingerprint=""))
        return trained

    monkeypatch.setattr(load, "open_decoder", open_then_train_again)
    assert HeatmapDetector.load(run, "cpu").calibration is None
    assert "not calibrated" in caplog.text


@pytest.mark.parametrize(
    "name", ["decoder/decoder.safetensors", "evaluation/calibration.safetensors"]
)
def test_the_bytes_that_are_loaded_are_those_that_were_checked(run, detector, monkeypatch, name):
    put_calibration(run, calibrate(detector, noise(1, 30)), 0.2)
    check_size = manifest_module.check_size

    def check_then_replace(path, record, *, command):
        check_size(path, record, command=command)
        if path == run / name:
            path.write_bytes(bytes(len(path.read_bytes())))

    monkeypatch.setattr(manifest_module, "check_size", check_then_replace)
    with pytest.raises(DamagedCacheError, match="has changed since it was written"):
        HeatmapDetector.load(run, "cpu")


def test_a_detector_knows_its_decoder(run, detector):
    fingerprint = read_manifest(run, "decoder").fingerprint
    assert detector.fingerprint == detector.at(0.5).fingerprint == fingerprint
