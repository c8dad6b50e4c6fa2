"""``predict``: tables, pictures, and what becomes of bad input."""

import csv
import io
import json
import os
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from ood_heatmap import HeatmapDetector, figures, source_folder
from ood_heatmap.cache.files import locked
from ood_heatmap.calibration import Calibration
from ood_heatmap.classifier import Output
from ood_heatmap.cli import main
from ood_heatmap.errors import OodHeatmapError
from ood_heatmap.figures import _truncate, add_legend, overlay
from ood_heatmap.pipeline import predict as predict_module
from ood_heatmap.pipeline.config import PredictConfig
from ood_heatmap.pipeline.predict import _make_output_names, list_images, open_inputs, predict

CALIBRATION = Calibration.fit(*np.linspace((0, 0), (1, 1), 99, dtype=np.float32).T)


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
    results = predict(detector, paths, tmp_path / "out", PredictConfig(batch_size=7))
    assert (results.num_images, results.problems) == (25, [])
    assert results.table == tmp_path / "out" / "scores.csv"
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
    assert names == [".lock", "scores.csv", "scores.jsonl"]  # no pictures
    text = (tmp_path / "out" / "scores.jsonl").read_text()
    for line, text_line in zip(read_csv(tmp_path / "out"), text.splitlines(), strict=True):
        record = json.loads(text_line)
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
        results = predict(detector, files, tmp_path / "out", config)
        assert [image.name for image in results.skipped] == [str(path) for path in bad]
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
    decode, calls = detector.decode, []

    def interrupted(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return decode(*arguments, **options)

    monkeypatch.setattr(detector, "decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        predict(detector, paths, tmp_path, PredictConfig(batch_size=4))
    written = sorted(path.name for path in tmp_path.iterdir() if path.name != ".lock")
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
    read: list[int] = []
    written: list[int] = []

    def read_bytes(path):
        read.append(path)
        assert len(read) - len(written) <= 2 * 2 + 3  # two threads and what waits on both sides
        return Path(path).read_bytes()

    def add_legend(*arguments):
        written.append(1)
        return figures.add_legend(*arguments)

    monkeypatch.setattr(source_folder, "_read_bytes", read_bytes)
    monkeypatch.setattr(predict_module, "add_legend", add_legend)
    predict(detector, paths * 4, tmp_path, PredictConfig(batch_size=1, workers=2))
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
    assert "batch size reduced to 4" in caplog.text
    for line, other in zip(read_csv(tmp_path), wanted, strict=True):
        assert float(line.pop("score")) == pytest.approx(float(other.pop("score")), abs=2e-6)
        assert line == other
    with Image.open(tmp_path / wanted[9]["overlay"]) as picture:
        shown = np.asarray(picture)[:4, :4]
    heatmap = np.load(tmp_path / wanted[9]["heatmap"])
    pixels = detector.classifier.config.transform(Image.open(paths[9]))
    own = overlay(pixels, np.abs(heatmap).max(axis=0), detector.color_max)
    np.testing.assert_array_equal(shown, np.asarray(own)[:4, :4])


def test_without_pictures_the_heatmaps_stay_on_the_device(detector, paths, tmp_path, monkeypatch):
    decode, shapes = detector.decode, []

    def watched(output, **settings):
        result = decode(output, **settings)
        shapes.append(result.heatmap.shape)
        return result

    monkeypatch.setattr(detector, "decode", watched)
    predict(detector, paths[:4], tmp_path / "with", PredictConfig())
    predict(detector, paths[:4], tmp_path / "without", PredictConfig(pictures=False))
    assert shapes == [(4, 3, 16, 16), (0, 3, 16, 16)]
    for line, other in zip(
        read_csv(tmp_path / "with"), read_csv(tmp_path / "without"), strict=True
    ):
        assert line["score"] == other["score"]


def test_missing_places_are_named(tmp_path):
    with pytest.raises(OodHeatmapError, match=r"no image or folder .*nowhere\.png"):
        list_images([tmp_path / "nowhere.png"], tmp_path / "out")
    with pytest.raises(OodHeatmapError, match="contains no images"):
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

    list_images_argument = [predict_module._STANDARD_INPUT]
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
    wanted = "images without a score: 1, nowhere.png first (No such file or directory)."
    assert wanted in result.output
    assert len(read_csv(tmp_path / "out")) == 1


def test_images_of_one_name_do_not_overwrite_each_other(tmp_path):
    paths = [
        tmp_path / name
        for name in ("a/x.png", "b/x.png", "x_png-2", "c/x.png", "x.jpg", "X.PNG", "x_png")
    ]
    assert len({name.casefold() for name in _make_output_names(paths)}) == len(paths)


ODD_NAMES = [
    "a" * 248 + ".png",
    "猫" * 83 + ".png",
    "line\nbreak.png",
    "tab\tand\x1b[2J.png",
    "=HYPERLINK(1).png",
    "-dash.png",
    "@at.png",
    "+plus.png",
    "back\\slash.png",
    " $x$ .png",
    b"caf\xe9.png".decode("utf-8", "surrogateescape"),
]


def test_any_file_name_gets_its_line_and_its_pictures(detector, paths, tmp_path):
    """Names of 252 bytes, the most a file can have, among them."""
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for name in ODD_NAMES:
        (folder / name).write_bytes(paths[0].read_bytes())
    assert max(len(os.fsencode(name)) for name in ODD_NAMES) >= 252
    files = [folder / name for name in ODD_NAMES]
    for kind in ("csv", "jsonl"):
        results = predict(detector, files, out, PredictConfig(format=kind, batch_size=4))
        assert (results.num_images, results.problems) == (len(files), [])
    with (out / "scores.csv").open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        lines = list(csv.DictReader(file))
    records = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    for path, line, record in zip(files, lines, records, strict=True):
        assert line["image"] == record["image"] == str(path)
        assert len(line["overlay"].encode()) <= 140
        assert line["overlay"].isprintable()
        assert line["overlay"][0] not in "=+-@"
        with Image.open(out / line["overlay"]) as picture:
            assert picture.width == 224
        assert np.load(out / line["heatmap"]).shape == (3, 16, 16)
    assert len({line["overlay"] for line in lines}) == len(files)


def test_text_that_a_spreadsheet_would_run_begins_with_an_apostrophe(
    detector, paths, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(detector, "classes", ("=1+1", "-2+3", "+cat", "@cat"))
    names = ["=HYPERLINK(1).png", "-a.png", "+a.png", "@a.png", "\ta.png", "\ra.png", "a=1.png"]
    for name in names:
        Path(name).write_bytes(paths[0].read_bytes())
    for kind in ("csv", "jsonl"):
        predict(detector, [Path(name) for name in names], Path("out"), PredictConfig(format=kind))
    with Path("out/scores.csv").open(newline="") as file:
        table = list(csv.reader(file))
    for row in table:
        for text in row:
            assert not text.startswith(("=", "+", "-", "@", "\t", "\r"))
    assert [row[0] for row in table[1:]] == [f"'{name}" for name in names[:-1]] + ["a=1.png"]
    records = [json.loads(line) for line in Path("out/scores.jsonl").read_text().splitlines()]
    assert [record["image"] for record in records] == names
    assert {record["prediction"] for record in records} <= set(detector.classes)


def test_a_level_too_fine_for_the_calibration_leaves_decisions_empty(
    run, detector, paths, tmp_path, caplog
):
    """In the table, on the overlays and in the one warning; p-values are valid all the same."""
    strict = detector.at(0.005)  # 99 held-out images are enough for 0.01
    (message,) = caplog.messages
    assert "needs at least 199 held-out ID images, the calibration has 99" in message
    for kind in ("csv", "jsonl"):
        predict(strict, paths[:3], tmp_path, PredictConfig(format=kind, pictures=False))
    assert [line["is_ood"] for line in read_csv(tmp_path)] == ["", "", ""]
    assert all(0 < float(line["p_value"]) <= 1 for line in read_csv(tmp_path))
    records = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert [record["is_ood"] for record in records] == [None] * 3
    assert len(caplog.messages) == 1


def test_overlays_say_id_or_ood_only_where_there_is_a_decision(
    detector, paths, tmp_path, monkeypatch
):
    drawn = []

    def add_legend(picture, lines, color_max):
        drawn.append(lines)
        return figures.add_legend(picture, lines, color_max)

    monkeypatch.setattr(predict_module, "add_legend", add_legend)
    scores = detector(paths).score
    calibration = Calibration.fit(scores, scores)
    for level, wanted in ((0.5, {"ID", "OOD"}), (0.005, set())):
        drawn.clear()
        predict(detector.calibrated(calibration, level), paths, tmp_path, PredictConfig())
        words = {word for lines in drawn for word in lines[1].split()}
        assert words & {"ID", "OOD"} == wanted
        assert "p" in words


def test_the_command_warns_once_when_the_level_is_too_fine(run, paths, tmp_path, caplog):
    arguments = ["predict", str(run), str(paths[0]), "--out", str(tmp_path), "--device", "cpu"]
    result = CliRunner().invoke(main, [*arguments, "--no-pictures", "--false-alarm", "0.001"])
    assert result.exit_code == 0, result.output
    assert caplog.text.count("needs at least 999 held-out ID images") == 1
    assert read_csv(tmp_path)[0]["is_ood"] == ""


def test_a_picture_that_cannot_be_written_costs_no_line(detector, paths, tmp_path):
    (tmp_path / "003_png.npy" / "in the way").mkdir(parents=True)
    (tmp_path / "005_png.png").mkdir()
    results = predict(detector, paths, tmp_path, PredictConfig(batch_size=4))
    assert results.num_images == len(paths)
    assert [image.row for image in results.not_drawn] == [3, 5]
    (problem,) = results.problems
    assert "images without an overlay and heatmap: 2" in problem
    assert "003_png.npy" in problem
    assert "Is a directory" in problem
    lines = read_csv(tmp_path)
    assert [i for i, line in enumerate(lines) if not line["overlay"]] == [3, 5]
    assert [i for i, line in enumerate(lines) if not line["heatmap"]] == [3, 5]
    assert not list(tmp_path.glob(".*.tmp"))


def test_an_image_for_which_the_classifier_returns_nan_costs_the_others_nothing(
    detector, paths, tmp_path, monkeypatch, caplog
):
    wanted = detector([Image.open(path) for path in paths]).score
    forward = detector.classifier.forward
    bad = detector.classifier.config.transform(Image.open(paths[5]))

    def poisoned(images):
        output = forward(images)
        hit = (images.cpu().numpy() == bad).all(axis=(1, 2, 3))
        features = output.features.clone()
        features[torch.from_numpy(hit)] = torch.nan
        return Output(features, output.logits, output.maps)

    monkeypatch.setattr(detector.classifier, "forward", poisoned)
    results = predict(detector, paths, tmp_path, PredictConfig(batch_size=4, pictures=False))
    assert [image.row for image in results.skipped] == [5]
    assert f"skipped {paths[5]}: the classifier returns NaN or infinity" in caplog.messages
    found = [float(line["score"]) for line in read_csv(tmp_path)]
    np.testing.assert_allclose(found, np.delete(wanted, 5), atol=1e-5)


def test_an_image_of_extreme_shape_costs_the_others_nothing(detector, paths, tmp_path):
    for name, size in (("thin.png", (1, 80_000)), ("wide.png", (60_000, 1))):
        Image.new("L", size).save(tmp_path / name)
    files = [paths[0], tmp_path / "thin.png", tmp_path / "wide.png", paths[1]]
    results = predict(detector, files, tmp_path / "out", PredictConfig(pictures=False))
    assert results.num_images + len(results.skipped) == 4
    named = [line["image"] for line in read_csv(tmp_path / "out")]
    assert {str(paths[0]), str(paths[1])} <= set(named)


def test_exif_orientation_is_applied(detector, paths, tmp_path):
    upright = Image.open(paths[0]).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    results = predict(detector, [tmp_path / "turned.png"], tmp_path, PredictConfig(pictures=False))
    assert results.num_images == 1
    found = float(read_csv(tmp_path)[0]["score"])
    assert found == pytest.approx(detector(upright).score[0], abs=2e-6)
    assert detector(tmp_path / "turned.png").score[0] == pytest.approx(found, abs=2e-6)


def test_a_second_process_is_refused_while_one_writes(detector, paths, tmp_path):
    (tmp_path / "scores.csv").write_text("of the other")
    with locked(tmp_path), pytest.raises(OodHeatmapError, match=r"is being written by process \d+"):
        predict(detector, paths[:2], tmp_path, PredictConfig())
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [".lock", "scores.csv"]
    assert (tmp_path / "scores.csv").read_text() == "of the other"
    assert predict(detector, paths[:2], tmp_path, PredictConfig()).num_images == 2


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
    wanted = figures._blend(np.full((1, 2, 3), 160, np.uint8), np.array([[0.0, 1.0]]))
    rows = [row for row in drawn[224:] if (row[6] == wanted[0, 0]).all()]
    assert rows
    assert (rows[0][217] == wanted[0, 1]).all()
    assert (drawn[224:, [0, -1]] == 255).all()  # long names are cut, nothing is cut off


def test_long_names_are_cut_at_the_width():
    font = figures._load_font(12)
    assert _truncate("cat", font, 200) == "cat"
    cut = _truncate("Cardigan Welsh corgi, Cardigan", font, 100)
    assert cut.endswith("…")
    assert font.getlength(cut) <= 100 < font.getlength(cut[:-1] + "xxx…")


def test_images_of_any_image_set_are_scored_as_their_files_are(detector, data, tmp_path):
    files = sorted((data / "far").iterdir())[:6]
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for path in files[:3]:
            tar.add(path, path.name)
    (tmp_path / "b.txt").write_text(f"{files[4]}\n{files[5]}\n")
    inputs = [tmp_path / "a.tar", files[3], tmp_path / "b.txt"]
    paths, images = open_inputs(inputs, tmp_path / "out")
    assert paths == [*(Path(f"a.tar/{path.name}") for path in files[:3]), *files[3:]]
    assert list(images.names) == list(map(str, paths))
    predict(detector, paths, tmp_path / "out", PredictConfig(), images)
    predict(detector, files, tmp_path / "wanted", PredictConfig())
    found, wanted = (
        list(csv.DictReader((tmp_path / name / "scores.csv").read_text().splitlines()))
        for name in ("out", "wanted")
    )
    assert [line.pop("image") for line in found] == list(map(str, paths))
    assert [line.pop("image") for line in wanted] == list(map(str, files))
    assert found == wanted


def test_files_and_folders_are_opened_by_their_paths(data, tmp_path):
    inputs = [data / "far", data / "ood" / "000.png"]
    paths, images = open_inputs(inputs, tmp_path)
    assert paths == list_images(inputs, tmp_path)
    assert list(images.names) == list(map(str, paths))
