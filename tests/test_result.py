"""Results: indexing, conversion to plain values, and what they say of themselves."""

import json
import pickle
from dataclasses import replace
from math import nan

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from ood_heatmap.detector import HeatmapDetector
from ood_heatmap.errors import UsageError
from ood_heatmap.nearest import Nearest
from ood_heatmap.result import Result, Scale


def make_result(count: int = 4, **changed) -> Result:
    rng = np.random.default_rng(0)
    columns = {
        "score": rng.random(count, np.float32),
        "heatmap": rng.random((count, 3, 5, 5), np.float32),
        "prediction": np.arange(count) % 3,
        "p_value": rng.random(count),
        "is_ood": np.arange(count) % 2 == 1,
        "confidence": rng.random(count, np.float32),
        "scale": Scale(("cat", "dog", "eel"), threshold=0.5, pixel_threshold=0.7),
    }
    return Result(**{**columns, **changed})


def test_a_result_is_a_sequence_of_detections():
    result = make_result()
    assert len(result) == 4
    for number, found in enumerate(result):
        assert found.score == float(result.score[number])
        assert found.is_ood is (number % 2 == 1)
        assert found.class_name == ("cat", "dog", "eel", "cat")[number]
        np.testing.assert_array_equal(found.heatmap, result.heatmap[number])
    for last in (-1, np.int64(3), np.array(3), torch.tensor(3)):
        assert result[last].score == float(result.score[3])
    for outside in (4, -5):
        with pytest.raises(IndexError):
            result[outside]
    for other in ("score", 1.0, None):
        with pytest.raises(TypeError):
            result[other]


def test_the_pixel_scores_of_all_images_are_computed_once():
    """A loop that takes those of one image after another must not compute all each time."""
    result = make_result()
    np.testing.assert_array_equal(result.pixel_score, np.abs(result.heatmap).max(axis=1))
    assert result.pixel_score is result.pixel_score
    np.testing.assert_array_equal(result[2:].pixel_score, result.pixel_score[2:])


@pytest.mark.parametrize(
    ("selected", "rows"),
    [
        (slice(1, 3), [1, 2]),
        (np.array([True, False, False, True]), [0, 3]),
        ([True, False, False, True], [0, 3]),
        ([3, 0], [3, 0]),
        (slice(0, 0), []),
        ([], []),
        (np.zeros(4, bool), []),
        (torch.tensor([2, 1]), [2, 1]),
    ],
)
def test_a_part_of_a_result_is_a_result(selected, rows):
    nearest = Nearest(np.arange(8).reshape(4, 2), np.arange(8.0).reshape(4, 2))
    images = [Image.new("RGB", (6, 6), (value, 0, 0)) for value in range(4)]
    result = make_result(nearest=nearest, images=images)
    part = result[selected]
    assert len(part) == len(rows)
    for name in ("score", "heatmap", "prediction", "p_value", "is_ood", "confidence"):
        np.testing.assert_array_equal(getattr(part, name), getattr(result, name)[rows])
    np.testing.assert_array_equal(part.nearest.row, nearest.row[rows])
    assert [part.image(row).getpixel((0, 0))[0] for row in range(len(part))] == rows


def test_joined_results_are_the_rows_of_all():
    nearest = Nearest(np.arange(8).reshape(4, 2), np.arange(8.0).reshape(4, 2))
    images = [Image.new("RGB", (6, 6), (value, 0, 0)) for value in range(4)]
    result = make_result(nearest=nearest, images=images)
    # a level without a threshold, from another process
    result = replace(result, scale=replace(result.scale, threshold=float("nan")))
    parts = [result[:1], pickle.loads(pickle.dumps(result[1:1])), result[1:]]
    joined = Result.concatenate(parts)
    for name in ("score", "heatmap", "prediction", "p_value", "is_ood", "confidence"):
        np.testing.assert_array_equal(getattr(joined, name), getattr(result, name))
    np.testing.assert_array_equal(joined.nearest.row, nearest.row)
    np.testing.assert_array_equal(joined.nearest.distance, nearest.distance)
    assert joined.to_dict() == result.to_dict()
    assert joined.image(3).getpixel((0, 0)) == (3, 0, 0)


def test_joined_results_lack_what_one_of_them_lacks():
    one = Nearest(np.zeros((4, 1), np.int64), np.zeros((4, 1)))
    full = make_result(nearest=one, images=["a.png"] * 4)
    lacking = replace(full, is_ood=None, nearest=None, images=(), heatmap=full.heatmap[:0])
    joined = Result.concatenate([full, lacking])
    assert len(joined) == 8
    assert (joined.is_ood, joined.nearest, joined.images) == (None, None, ())
    assert len(joined.heatmap) == 0
    assert len(list(joined)) == 8
    two = replace(full, nearest=Nearest(np.zeros((4, 2), np.int64), np.zeros((4, 2))))
    assert Result.concatenate([full, two]).nearest is None
    for other in ([], [full, replace(full, scale=Scale(("cat",)))]):
        with pytest.raises(UsageError, match="same detector"):
            Result.concatenate(other)


def test_a_result_becomes_json():
    columns = make_result(p_value=np.array([0.25, nan, 0.5, 1.0])).to_dict()
    assert json.loads(json.dumps(columns, allow_nan=False)) == columns
    assert columns["p_value"] == [0.25, None, 0.5, 1.0]
    assert columns["prediction"] == [0, 1, 2, 0]
    assert columns["class_name"] == ["cat", "dog", "eel", "cat"]
    assert columns.keys().isdisjoint({"heatmap", "nearest", "distance", "image"})
    nearest = Nearest(np.array([[7], [8]]), np.array([[0.5], [1.5]]))
    record = make_result(2, nearest=nearest, is_ood=None, images=["a.png", "b.png"])[1].to_dict()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["nearest"] == [8]
    assert record["distance"] == [1.5]
    assert record["is_ood"] is None
    assert record["image"] == "b.png"


def test_a_result_becomes_a_data_frame():
    pandas = pytest.importorskip("pandas")
    result = make_result(images=[f"{number}.png" for number in range(4)])
    frame = result.to_pandas()
    assert list(frame.columns)[:2] == ["image", "score"]
    np.testing.assert_array_equal(frame["score"].to_numpy(np.float32), result.score)
    assert frame["is_ood"].dtype == bool
    assert isinstance(frame, pandas.DataFrame)


def test_pandas_is_asked_for_in_one_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(UsageError, match="pip install pandas"):
        make_result().to_pandas()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, "2 OOD at false-alarm level 0.05"),
        ({"is_ood": None}, "no decision at false-alarm level 0.05"),
        ({"is_ood": None, "p_value": np.full(4, nan)}, "not calibrated"),
    ],
)
def test_what_a_result_says_of_itself(changed, said):
    score = np.array([0.5, 0.125, 0.25, 0.75], np.float32)
    text = repr(make_result(score=score, **changed))
    assert "4 images, score 0.1250 to 0.7500" in text
    assert said in text
    assert "heatmap 4 x 3 x 5 x 5" in text
    assert "0.125" in repr(make_result(score=score)[1])
    assert "0 images" in repr(make_result()[:0])


def test_the_images_of_a_result_are_upright_at_their_own_size(finished_run, tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 40, 3)).astype(np.uint8))
    photo.save(tmp_path / "a.png", exif=exif)
    detector = HeatmapDetector.load(finished_run, "cpu")
    upright = np.asarray(photo.transpose(Image.Transpose.ROTATE_270))
    for given in (tmp_path / "a.png", [Image.open(tmp_path / "a.png")]):
        np.testing.assert_array_equal(np.asarray(detector(given).image(0)), upright)
    # what an iterator yields is kept at the classifier's input size
    assert detector(iter([photo])).image(0).size == (16, 16)
    with pytest.raises(UsageError, match="has no images"):
        make_result().image(0)


def test_pictures_have_the_size_of_the_photo_and_mark_what_is_ood(finished_run):
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(0, 256, (300, 500, 3)).astype(np.uint8))
    result = HeatmapDetector.load(finished_run, "cpu")([photo, photo])
    result.heatmap[0], result.heatmap[1] = 0, 1
    result = replace(result, scale=replace(result.scale, pixel_threshold=0.5, threshold=0.5))
    seen = slice(150, 350)  # the square in the middle
    for row in range(2):
        assert result.overlay(row).size == photo.size
        assert result.plot(row).width > 2 * photo.width
    drawn = np.asarray(result.overlay(0))
    np.testing.assert_array_equal(drawn[:, seen], np.asarray(photo)[:, seen])
    assert np.asarray(result.overlay(1))[:, seen, 0].mean() > drawn[:, seen, 0].mean()
    assert drawn[:, :90].mean() < 0.5 * np.asarray(photo)[:, :90].mean()
    # what was kept at the input size is seen as a whole
    kept = HeatmapDetector.load(finished_run, "cpu")(iter([photo]))
    assert kept.is_transformed
    assert np.asarray(kept.overlay(0)).mean() > 60
