"""What FiftyOne's importer reads: samples with scores, decisions and heatmaps of whole photos."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ood_heatmap import HeatmapDetector
from ood_heatmap.adapters.fiftyone import _place, export_fiftyone
from ood_heatmap.errors import UsageError
from ood_heatmap.images import Transform
from ood_heatmap.pictures import ColorScale


@pytest.fixture(scope="module")
def detector(finished_run) -> HeatmapDetector:
    return HeatmapDetector.load(finished_run, "cpu", false_alarm=0.3)


@pytest.fixture
def photos(tmp_path) -> list[Path]:
    """Return three photos, the last in portrait by its EXIF orientation only."""
    rng = np.random.default_rng(0)
    paths = [tmp_path / "photos" / name for name in ("a.png", "b.png", "c.jpg")]
    paths[0].parent.mkdir()
    for path in paths:
        exif = Image.Exif()
        exif[0x0112] = 6 if path.suffix == ".jpg" else 1
        pixels = rng.integers(0, 256, (20, 40, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(path, exif=exif)
    return paths


def read(out: Path) -> tuple[dict, list[dict]]:
    metadata = json.loads((out / "metadata.json").read_text("utf-8"))
    return metadata, json.loads((out / "samples.json").read_text("utf-8"))["samples"]


def test_samples_say_what_the_detector_says(detector, photos, tmp_path):
    out = tmp_path / "dataset"
    assert export_fiftyone(detector, photos, out, batch_size=2) == 3
    metadata, samples = read(out)
    # its importer takes a dataset with a version for a dump of its database
    assert "version" not in metadata
    assert metadata["media_type"] == "image"
    assert metadata["info"]["threshold"] == detector.threshold
    result = detector(photos)
    assert [sample["filepath"] for sample in samples] == [str(path.absolute()) for path in photos]
    np.testing.assert_allclose([sample["ood_score"] for sample in samples], result.score, rtol=1e-5)
    assert [sample["p_value"] for sample in samples] == result.p_value.tolist()
    labels = ["OOD" if is_ood else "ID" for is_ood in result.is_ood]
    assert [sample["ood"]["label"] for sample in samples] == labels
    names = [detector.class_name(label) for label in result.prediction]
    assert [sample["prediction"]["label"] for sample in samples] == names
    confidence = [sample["prediction"]["confidence"] for sample in samples]
    np.testing.assert_allclose(confidence, result.confidence, rtol=1e-5)
    assert {sample["prediction"]["_cls"] for sample in samples} == {"Classification"}
    for sample, path in zip(samples, photos, strict=True):
        assert sample["heatmap"]["_cls"] == "Heatmap"
        assert sample["heatmap"]["map_path"].startswith("fields/heatmap/")
        with Image.open(out / sample["heatmap"]["map_path"]) as heatmap:
            assert heatmap.mode == "L"
            assert heatmap.size == ((20, 40) if path.suffix == ".jpg" else (40, 20))


def test_heatmaps_have_one_scale(detector, photos, tmp_path):
    export_fiftyone(detector, photos, tmp_path / "dataset")
    metadata, samples = read(tmp_path / "dataset")
    top = metadata["info"]["heatmap_max"]
    assert top == ColorScale(detector.color_max, detector.pixel_threshold).top
    for score, sample in zip(detector(photos).pixel_score, samples, strict=True):
        with Image.open(tmp_path / "dataset" / sample["heatmap"]["map_path"]) as picture:
            values = np.asarray(picture)
        # enlarged from 16 to the 20 pixels that the classifier sees
        seen = values[10:30] if values.shape == (40, 20) else values[:, 10:30]
        wanted = Image.fromarray(score).resize((20, 20), Image.Resampling.BILINEAR)
        wanted = 255 * np.clip(np.asarray(wanted) / top, 0, 1)
        np.testing.assert_allclose(seen, wanted, atol=0.51)
        assert values.sum(dtype=int) == seen.sum(dtype=int)


@pytest.mark.parametrize("mode", ["center", "border", "squash"])
@pytest.mark.parametrize("size", [(300, 200), (200, 300), (16, 16), (3000, 1000)])
def test_a_pixel_of_the_heatmap_is_where_the_photo_shows_it(mode, size):
    transform = Transform(16, crop_mode=mode)
    for row, column in ((7, 6), (8, 9)):
        # where the transform puts a bright dot of the photo
        box = transform.seen_box(*size)
        x = box[0] + (column + 0.5) * (box[2] - box[0]) / 16
        y = box[1] + (row + 0.5) * (box[3] - box[1]) / 16
        share = np.zeros((16, 16), np.float32)
        share[row, column] = 1
        placed = np.asarray(_place(share, box, size)).astype(float)
        factor = placed.shape[1] / size[0]
        rows, columns = np.indices(placed.shape) + 0.5
        center = (placed * columns).sum() / placed.sum(), (placed * rows).sum() / placed.sum()
        np.testing.assert_allclose(center, (factor * x, factor * y), atol=1.5)


def test_without_a_calibration_there_is_no_decision(detector, photos, tmp_path):
    export_fiftyone(detector.calibrated(None, 0.05), photos, tmp_path / "dataset")
    metadata, samples = read(tmp_path / "dataset")
    assert "threshold" not in metadata["info"]
    assert not {"p_value", "ood"} & set(samples[0])
    # NaN and infinity are not JSON
    json.loads((tmp_path / "dataset" / "samples.json").read_text(), parse_constant=pytest.fail)


def test_what_cannot_be_read_is_skipped_and_named(detector, photos, tmp_path, caplog):
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png"))
    odd.write_bytes(photos[0].read_bytes())
    count = export_fiftyone(detector, [tmp_path / "broken.jpg", odd, *photos], tmp_path / "out")
    assert count == 3
    assert "broken.jpg: not an image" in caplog.text
    assert r"\udcff.png: its name is not UTF-8" in caplog.text
    with pytest.raises(UsageError, match="no image that can be read"):
        export_fiftyone(detector, [tmp_path / "broken.jpg"], tmp_path / "none")
    assert not (tmp_path / "none" / "samples.json").exists()


def test_a_folder_with_files_is_left_alone(detector, photos, tmp_path):
    with pytest.raises(UsageError, match="has files: name a new folder"):
        export_fiftyone(detector, photos, photos[0].parent)
