"""The detector in a user's hands, and ``predict``."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image

from ood_heatmap import HeatmapDetector
from ood_heatmap.errors import DamagedCacheError, OodHeatmapError, UsageError
from ood_heatmap.figures import overlay
from ood_heatmap.pipeline.predict import list_images, names_for, predict


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
    np.testing.assert_allclose(detector(pictures[1]).score, wanted.score[1:2], rtol=1e-5)
    np.testing.assert_allclose(detector(array[1]).score, wanted.score[1:2], rtol=1e-5)


def test_the_score_is_read_off_the_heatmap(detector):
    result = detector(np.random.default_rng(0).integers(0, 256, (3, 30, 20, 3)).astype(np.uint8))
    assert result.heatmap.shape == (3, 3, 16, 16)
    np.testing.assert_array_equal(result.strength, np.abs(result.heatmap).max(axis=1))
    np.testing.assert_allclose(result.score, result.strength.mean(axis=(1, 2)), rtol=1e-6)
    assert result.prediction.shape == (3,)


@pytest.mark.parametrize(
    "images",
    [np.zeros((2, 16, 16, 3), np.float32), np.zeros((2, 16, 16), np.uint8), np.zeros(5, np.uint8)],
)
def test_other_arrays_are_refused(detector, images):
    with pytest.raises(UsageError, match="images must be"):
        detector(images)


def test_a_damaged_decoder_is_refused(run):
    path = run / "decoder" / "decoder.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(DamagedCacheError, match=r"decoder\.safetensors has changed"):
        HeatmapDetector.load(run)


def test_predict_writes_overlays_raw_heatmaps_and_a_table(data, detector, tmp_path):
    done, unreadable = predict(detector, [data / "far"], tmp_path / "out", batch_size=7)
    assert (done, unreadable) == (25, [])
    paths = sorted((data / "far").iterdir())
    wanted = detector([Image.open(path) for path in paths])
    with (tmp_path / "out" / "scores.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["image"] for line in lines] == [str(path) for path in paths]
    for i, line in enumerate(lines):
        assert float(line["score"]) == pytest.approx(wanted.score[i], abs=1e-5)
        assert line["prediction"] == f"class{wanted.prediction[i]}"
        raw = np.load(tmp_path / "out" / line["heatmap"])
        np.testing.assert_allclose(raw, wanted.heatmap[i], atol=1e-5)
        with Image.open(tmp_path / "out" / line["overlay"]) as picture:
            assert picture.size == (224, 224)


def test_predict_reports_corrupt_images_and_goes_on(data, detector, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"broken")
    Image.open(data / "far" / "000.png").save(folder / "b.png")
    done, unreadable = predict(detector, [folder], tmp_path / "out")
    assert done == 1
    assert unreadable == [folder / "a.png"]
    assert len((tmp_path / "out" / "scores.csv").read_text().splitlines()) == 2


def test_missing_places_are_named(tmp_path):
    with pytest.raises(OodHeatmapError, match=r"no image or folder .*nowhere\.png"):
        list_images([tmp_path / "nowhere.png"])
    with pytest.raises(OodHeatmapError, match="holds no images"):
        list_images([tmp_path])


def test_images_of_one_name_do_not_overwrite_each_other(tmp_path):
    names = names_for([tmp_path / "a" / "x.png", tmp_path / "b" / "x.png", tmp_path / "x.jpg"])
    assert len(set(names)) == 3


def test_an_overlay_shows_the_image_where_the_heatmap_is_zero():
    image = np.random.default_rng(0).integers(0, 256, (3, 8, 8)).astype(np.uint8)
    strength = np.zeros((8, 8), np.float32)
    strength[2, 3] = 0.4
    picture = np.asarray(overlay(image, strength, color_max=0.4, size=8))
    changed = (picture != image.transpose(1, 2, 0)).any(axis=2)
    assert np.argwhere(changed).tolist() == [[2, 3]]
    half = np.asarray(overlay(image, strength, color_max=0.8, size=8))
    assert (half[2, 3] != picture[2, 3]).any()  # one scale for all, not one for each image
