"""``predict``: tables, pictures, and what becomes of bad input."""

import csv
import io
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from ood_heatmap import HeatmapDetector, figures
from ood_heatmap import images as images_module
from ood_heatmap.calibration import Calibration
from ood_heatmap.cli import main
from ood_heatmap.errors import OodHeatmapError
from ood_heatmap.figures import add_legend, overlay, truncated
from ood_heatmap.pipeline import predict as predict_module
from ood_heatmap.pipeline.config import PredictConfig
from ood_heatmap.pipeline.predict import list_images, names_for, predict

CALIBRATION = Calibration.fit(np.linspace(0, 1, 99), np.linspace(0, 1, 99))


@pytest.fixture(scope="module")
def detector(finished_run) -> HeatmapDetector:
    return HeatmapDetector.load(finished_run, device="cpu").calibrated(CALIBRATION, 0.6)


@pytest.fixture(scope="module")
def paths(data):
    return sorted((data / "far").iterdir())


def read_csv(out) -> list[dict[str, str]]:
    with (out / "scores.csv").open() as file:
        return list(csv.DictReader(file))


def test_it_writes_overlays_raw_heatmaps_and_a_table(detector, paths, tmp_path):
    assert predict(detector, paths, tmp_path / "out", PredictConfig(batch_size=7)) == (25, [])
    wanted = detector([Image.open(path) for path in paths])
    lines = read_csv(tmp_path / "out")
    assert [line["image"] for line in lines] == [str(path) for path in paths]
    assert {line["is_ood"] for line in lines} <= {"true", "false"}
    for i, line in enumerate(lines):
        assert float(line["score"]) == pytest.approx(wanted.score[i], abs=1e-5)
        assert float(line["p_value"]) == pytest.approx(wanted.p_value[i], abs=0.0101)
        assert (line["is_ood"] == "true") == (float(line["p_value"]) <= 0.6)
        assert line["prediction"] == f"class{wanted.prediction[i]}"
        raw = np.load(tmp_path / "out" / line["heatmap"])
        np.testing.assert_allclose(raw, wanted.heatmap[i], atol=1e-5)
        with Image.open(tmp_path / "out" / line["overlay"]) as picture:
            assert picture.width == 224
            assert picture.height > 224  # the legend


def test_json_lines_say_the_same_as_csv(detector, paths, tmp_path):
    for kind in ("csv", "jsonl"):
        predict(detector, paths, tmp_path / "out", PredictConfig(format=kind, pictures=False))
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["scores.csv", "scores.jsonl"]  # no pictures
    text = (tmp_path / "out" / "scores.jsonl").read_text()
    for line, record in zip(read_csv(tmp_path / "out"), text.splitlines(), strict=True):
        record = json.loads(record)
        assert record["score"] == float(line["score"])
        assert record["p_value"] == float(line["p_value"])
        assert json.dumps(record["is_ood"]) == line["is_ood"]
        assert record["overlay"] is record["heatmap"] is None


def test_without_a_calibration_the_decision_is_empty(detector, paths, tmp_path):
    for kind in ("csv", "jsonl"):
        plain = detector.calibrated(None, 0.05)
        predict(plain, paths[:1], tmp_path, PredictConfig(format=kind, pictures=False))
    (line,) = read_csv(tmp_path)
    assert (line["p_value"], line["is_ood"]) == ("", "")
    record = json.loads((tmp_path / "scores.jsonl").read_text())
    assert record["p_value"] is record["is_ood"] is None


def test_corrupt_images_are_named_with_the_reason_and_skipped(detector, paths, tmp_path, caplog):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"broken")
    (folder / "b.png").write_bytes(paths[0].read_bytes()[:-60])
    Image.open(paths[0]).save(folder / "c.png")
    Image.fromarray(np.zeros((20, 20), np.float32)).save(folder / "d.tif")
    files = [*list_images([folder], tmp_path / "out"), folder / "gone.png"]
    bad = [folder / name for name in ("a.png", "b.png", "d.tif", "gone.png")]
    for batch_size in (1, 64):
        config = PredictConfig(batch_size=batch_size)
        assert predict(detector, files, tmp_path / "out", config) == (1, bad)
        assert [line["image"] for line in read_csv(tmp_path / "out")] == [str(folder / "c.png")]
    said = [line for line in caplog.messages if line.startswith("skipped ")]
    assert len(said) == 2 * len(bad)
    for words in ("a.png: not an image", "floating-point", "gone.png: No such file"):
        assert any(words in line for line in said)


def test_images_of_any_size_and_mode_go_through_the_transform(detector, tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 47)).astype(np.uint8))
    image.save(tmp_path / "grey.png")
    predict(detector, [tmp_path / "grey.png"], tmp_path, PredictConfig(pictures=False))
    wanted = detector(Image.open(tmp_path / "grey.png")).score[0]
    assert float(read_csv(tmp_path)[0]["score"]) == pytest.approx(wanted, abs=2e-6)


def test_an_interruption_leaves_whole_files_only(detector, paths, tmp_path, monkeypatch):
    decoded, calls = predict_module.decoded, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return decoded(*arguments)

    monkeypatch.setattr(predict_module, "decoded", interrupted)
    with pytest.raises(KeyboardInterrupt):
        predict(detector, paths, tmp_path, PredictConfig(batch_size=4))
    written = sorted(path.name for path in tmp_path.iterdir())
    assert written  # the batches before it
    for name in written:
        assert name.endswith((".png", ".npy"))
        if name.endswith(".png"):
            Image.open(tmp_path / name).load()
        else:
            np.load(tmp_path / name)


def test_memory_holds_a_few_batches_however_many_images_there_are(
    detector, paths, tmp_path, monkeypatch
):
    read, written = [], []
    reading, writing = images_module.decode, predict_module.write_batch

    def decode(*arguments, **more):
        read.append(1)
        assert len(read) - len(written) <= 2 * 2 + 3  # two threads and what waits on both sides
        return reading(*arguments, **more)

    def write_batch(*arguments):
        records = writing(*arguments)
        written.append(1)
        return records

    monkeypatch.setattr(images_module, "decode", decode)
    monkeypatch.setattr(predict_module, "write_batch", write_batch)
    config = PredictConfig(batch_size=1, workers=2, pictures=False)
    predict(detector, paths * 4, tmp_path, config)
    assert len(read) == len(written) == 100


def test_a_device_without_memory_gets_smaller_batches_and_the_table_is_the_same(
    detector, paths, tmp_path, monkeypatch, caplog
):
    predict(detector, paths, tmp_path, PredictConfig(batch_size=16))
    wanted = read_csv(tmp_path)
    forward = detector.classifier.forward

    def small(images):
        if len(images) > 4:
            raise torch.OutOfMemoryError("out of memory")
        return forward(images)

    monkeypatch.setattr(detector.classifier, "forward", small)
    predict(detector, paths, tmp_path, PredictConfig(batch_size=16))
    assert "going on with batches of 4" in caplog.text
    for line, other in zip(read_csv(tmp_path), wanted, strict=True):
        assert float(line.pop("score")) == pytest.approx(float(other.pop("score")), abs=2e-6)
        assert line == other
    with Image.open(tmp_path / wanted[9]["overlay"]) as picture:
        shown = np.asarray(picture)[:4, :4]
    heatmap = np.load(tmp_path / wanted[9]["heatmap"])
    pixels = detector.classifier.config.transform(Image.open(paths[9]))
    own = overlay(pixels, np.abs(heatmap).max(axis=0), detector.color_max)
    np.testing.assert_array_equal(shown, np.asarray(own)[:4, :4])


def test_missing_places_are_named(tmp_path):
    with pytest.raises(OodHeatmapError, match=r"no image or folder .*nowhere\.png"):
        list_images([tmp_path / "nowhere.png"], tmp_path / "out")
    with pytest.raises(OodHeatmapError, match="holds no images"):
        list_images([tmp_path], tmp_path / "out")


def test_its_own_results_are_no_input(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image = tmp_path / "photos" / "a.png"
    (tmp_path / "photos" / "results").mkdir(parents=True)
    for path in (image, tmp_path / "photos" / "results" / "a_png.png"):
        path.write_bytes((data / "far" / "000.png").read_bytes())
    assert list_images([tmp_path / "photos"], tmp_path / "photos" / "results") == [image]
    relative = list_images([tmp_path / "photos"], tmp_path / "photos" / ".." / "photos" / "results")
    assert relative == [image]
    assert len(list_images([tmp_path / "photos"], tmp_path)) == 2


def test_standard_input_lists_files_and_folders(paths, tmp_path, monkeypatch):
    def type_in(text: bytes):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(text)))
        return list_images(list_images_argument, tmp_path / "out")

    list_images_argument = [predict_module.STANDARD_INPUT]
    folder = paths[0].parent
    found = type_in(f"{paths[3]}\r\n\nno/such.png\n{folder}".encode() + b"\n\xff.png\n")
    assert found[:2] == [paths[3], type(folder)("no/such.png")]
    assert found[2:-1] == paths
    assert bytes(found[-1]) == b"\xff.png"
    with pytest.raises(OodHeatmapError, match="standard input lists no images"):
        type_in(b"\n")


def test_the_command_reads_a_list_and_ends_in_1_when_some_were_skipped(run, paths, tmp_path):
    def call(*options: str, text: str):
        arguments = ["predict", str(run), "-", "--out", str(tmp_path / "out"), "--device", "cpu"]
        return CliRunner().invoke(main, [*arguments, "--no-pictures", *options], input=text)

    result = call("--format", "jsonl", text=f"{paths[0]}\n{paths[1]}\n")
    assert result.exit_code == 0, result.output
    assert "2 images, scores in" in result.output
    assert len((tmp_path / "out" / "scores.jsonl").read_text().splitlines()) == 2
    result = call(text=f"{paths[0]}\nnowhere.png\n")
    assert result.exit_code == 1
    assert "1 images could not be read, nowhere.png first" in result.output
    assert len(read_csv(tmp_path / "out")) == 1


def test_images_of_one_name_do_not_overwrite_each_other(tmp_path):
    paths = [tmp_path / name for name in ("a/x.png", "b/x.png", "x_png-2", "c/x.png", "x.jpg")]
    assert len(set(names_for(paths))) == 5


def test_an_overlay_shows_the_image_where_the_heatmap_is_zero():
    image = np.random.default_rng(0).integers(0, 256, (3, 8, 8)).astype(np.uint8)
    strength = np.zeros((8, 8), np.float32)
    strength[2, 3] = 0.4
    picture = np.asarray(overlay(image, strength, color_max=0.4, size=8))
    changed = (picture != image.transpose(1, 2, 0)).any(axis=2)
    assert np.argwhere(changed).tolist() == [[2, 3]]
    half = np.asarray(overlay(image, strength, color_max=0.8, size=8))
    assert (half[2, 3] != picture[2, 3]).any()  # one scale for all, not one for each image


@pytest.mark.parametrize(("size", "wanted"), [(32, 224), (64, 256), (224, 224), (300, 300)])
def test_every_pixel_of_an_image_is_equally_large_on_its_overlay(size, wanted):
    image, strength = np.zeros((3, size, size), np.uint8), np.zeros((size, size), np.float32)
    assert overlay(image, strength, 1.0).size == (wanted, wanted)


def test_a_legend_leaves_the_picture_as_it_is_and_its_bar_goes_up_the_scale():
    picture = Image.new("RGB", (224, 224), (10, 20, 30))
    drawn = np.asarray(add_legend(picture, ["a" * 200, "score 0.1"], 0.4))
    np.testing.assert_array_equal(drawn[:224], np.asarray(picture))
    wanted = figures.blend(np.full((1, 2, 3), 160, np.uint8), np.array([[0.0, 1.0]]))
    rows = [row for row in drawn[224:] if (row[6] == wanted[0, 0]).all()]
    assert rows
    assert (rows[0][217] == wanted[0, 1]).all()
    assert (drawn[224:, [0, -1]] == 255).all()  # long names are cut, nothing is cut off


def test_long_names_are_cut_at_the_width():
    font = figures.legend_font(12)
    assert truncated("cat", font, 200) == "cat"
    cut = truncated("Cardigan Welsh corgi, Cardigan", font, 100)
    assert cut.endswith("…")
    assert font.getlength(cut) <= 100 < font.getlength(cut[:-1] + "xxx…")
