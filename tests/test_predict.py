"""``predict``: tables, pictures, and what becomes of bad input."""

import csv
import io
import json
import os
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from ood_heatmap import HeatmapDetector, pictures, source_folder
from ood_heatmap.cache import files
from ood_heatmap.cache.files import locked
from ood_heatmap.calibration import Calibration
from ood_heatmap.classifier import Output
from ood_heatmap.cli import main
from ood_heatmap.errors import OodHeatmapError, UsageError
from ood_heatmap.images import to_rgb
from ood_heatmap.pictures import ColorScale, draw_overlay
from ood_heatmap.pipeline import picture_writer, predict_inputs
from ood_heatmap.pipeline.config import PredictConfig
from ood_heatmap.pipeline.predict import predict
from ood_heatmap.pipeline.predict_inputs import list_images, open_inputs
from ood_heatmap.pipeline.run import open_index

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


def test_it_writes_pictures_raw_heatmaps_and_a_table(detector, paths, tmp_path):
    results = predict(detector, paths, tmp_path / "out", PredictConfig(batch_size=7))
    assert (results.num_images, results.problems) == (25, [])
    assert results.table == tmp_path / "out" / "scores.csv"
    wanted = detector([Image.open(path) for path in paths])
    lines = read_csv(tmp_path / "out")
    assert [line["image"] for line in lines] == [str(path) for path in paths]
    assert {line["is_ood"] for line in lines} <= {"true", "false"}
    assert results.pictures == tmp_path / "out" / "pictures"
    for i, line in enumerate(lines):
        assert float(line["score"]) == pytest.approx(wanted.score[i], abs=1e-5)
        assert float(line["p_value"]) == pytest.approx(wanted.p_value[i], abs=1e-6)
        assert (line["is_ood"] == "true") == (float(line["p_value"]) <= 0.6)
        assert line["prediction"] == f"class{wanted.prediction[i]}"
        assert float(line["confidence"]) == pytest.approx(wanted.confidence[i], abs=1e-5)
        raw = np.load(tmp_path / "out" / line["heatmap"])
        np.testing.assert_allclose(raw, wanted.heatmap[i], atol=1e-5)
        assert line["picture"] == f"pictures/{paths[i].name}"
        with Image.open(tmp_path / "out" / line["picture"]) as picture:
            # photo and overlay, enlarged from 24 pixels, above the decision
            assert picture.width > 2 * 240
            assert picture.height > 240


def test_json_lines_say_the_same_as_csv(detector, paths, tmp_path):
    for kind in ("csv", "jsonl"):
        predict(detector, paths, tmp_path / kind, PredictConfig(format=kind, pictures="none"))
        names = sorted(path.name for path in (tmp_path / kind).iterdir())
        assert names == [".lock", f"scores.{kind}"]  # no pictures
    text = (tmp_path / "jsonl" / "scores.jsonl").read_text()
    for line, text_line in zip(read_csv(tmp_path / "csv"), text.splitlines(), strict=True):
        record = json.loads(text_line)
        assert record["score"] == float(line["score"])
        assert record["p_value"] == float(line["p_value"])
        assert json.dumps(record["is_ood"]) == line["is_ood"]
        assert record["picture"] is record["heatmap"] is None


def test_without_a_calibration_the_decision_is_empty(detector, paths, tmp_path):
    for kind in ("csv", "jsonl"):
        plain = detector.calibrated(None, 0.05)
        predict(plain, paths[:1], tmp_path / kind, PredictConfig(format=kind, pictures="none"))
    (line,) = read_csv(tmp_path / "csv")
    assert (line["p_value"], line["is_ood"]) == ("", "")
    record = json.loads((tmp_path / "jsonl" / "scores.jsonl").read_text())
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
        config = PredictConfig(batch_size=batch_size, overwrite=True)
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
    predict(detector, [tmp_path / "grey.png"], tmp_path, PredictConfig(pictures="none"))
    wanted = detector(Image.open(tmp_path / "grey.png")).score[0]
    assert float(read_csv(tmp_path)[0]["score"]) == pytest.approx(wanted, abs=2e-5)


def test_an_interruption_leaves_nothing_and_keeps_earlier_results(
    detector, paths, tmp_path, monkeypatch, tree
):
    decode, calls = detector.decode, []

    def interrupted(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return decode(*arguments, **options)

    for earlier in (paths[:0], paths[:2]):
        if earlier:
            predict(detector, earlier, tmp_path, PredictConfig())
        before = tree(tmp_path)
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(detector, "decode", interrupted)
            with pytest.raises(KeyboardInterrupt):
                predict(detector, paths, tmp_path, PredictConfig(batch_size=4, overwrite=True))
        assert {**tree(tmp_path), ".lock": b""} == {**before, ".lock": b""}
    assert predict(detector, paths, tmp_path, PredictConfig(overwrite=True)).num_images == 25


def test_results_of_two_runs_are_never_mixed(detector, paths, tmp_path, tree):
    """Without --overwrite the second is refused, with it nothing of the first is left."""
    for name in ("out", "over"):
        predict(detector, paths, tmp_path / name, PredictConfig())
    before = tree(tmp_path / "out")
    for config in (PredictConfig(), PredictConfig(format="jsonl"), PredictConfig(pictures="none")):
        with pytest.raises(OodHeatmapError, match=r"earlier run \(scores\.csv\).*--overwrite"):
            predict(detector, paths[:3], tmp_path / "out", config)
        assert tree(tmp_path / "out") == before
        new = tmp_path / f"new-{config.format}-{config.pictures}"
        predict(detector, paths[:3], new, config)
        predict(detector, paths[:3], tmp_path / "over", replace(config, overwrite=True))
        assert tree(tmp_path / "over") == tree(new)


def test_folders_that_are_not_of_predict_are_left_alone(detector, paths, tmp_path, tree):
    for name in ("pictures", "heatmaps"):
        out = tmp_path / name
        (out / name).mkdir(parents=True)
        (out / name / "mine.png").write_bytes(b"mine")
        with pytest.raises(OodHeatmapError, match=f"{name} was not written by predict"):
            predict(detector, paths[:1], out, PredictConfig(overwrite=True))
        assert (out / name / "mine.png").read_bytes() == b"mine"
    out, elsewhere = tmp_path / "linked", tmp_path / "elsewhere"
    predict(detector, paths[:1], elsewhere, PredictConfig())
    out.mkdir()
    (out / "pictures").symlink_to(elsewhere / "pictures")
    before = tree(elsewhere)
    with pytest.raises(OodHeatmapError, match="not written by predict"):
        predict(detector, paths[:1], out, PredictConfig(overwrite=True))
    assert tree(elsewhere) == before


def test_what_a_killed_run_leaves_is_replaced(detector, paths, tmp_path, tree):
    """Killed while the results are put in place: folders, but no table."""
    predict(detector, paths[:2], tmp_path / "new", PredictConfig())
    predict(detector, paths, tmp_path / "out", PredictConfig())
    (tmp_path / "out" / "scores.csv").unlink()
    (tmp_path / "out" / ".unfinished" / "pictures").mkdir(parents=True)
    predict(detector, paths[:2], tmp_path / "out", PredictConfig())
    assert tree(tmp_path / "out") == tree(tmp_path / "new")


def test_memory_holds_a_few_batches_however_many_images_there_are(
    detector, paths, tmp_path, monkeypatch
):
    read: list[int] = []
    written: list[int] = []

    def read_bytes(path):
        read.append(path)
        # two threads and what waits on both sides; of an image in progress both reads count
        assert len(read) - 2 * len(written) <= 2 * 2 + 3 + 2
        return Path(path).read_bytes()

    def draw_panel(*arguments):
        written.append(1)
        return pictures.draw_panel(*arguments)

    monkeypatch.setattr(source_folder, "_read_bytes", read_bytes)
    monkeypatch.setattr(picture_writer, "draw_panel", draw_panel)
    predict(detector, paths * 4, tmp_path, PredictConfig(batch_size=1, workers=2))
    # each once for its score and once for its picture
    assert len(read) == 2 * len(written) == 200


def test_a_device_without_memory_gets_smaller_batches_and_the_table_is_the_same(
    detector, paths, tmp_path, monkeypatch, caplog
):
    predict(detector, paths, tmp_path / "wanted", PredictConfig(batch_size=16))
    wanted = read_csv(tmp_path / "wanted")
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


@pytest.mark.parametrize("orientation", [1, 6])
def test_an_overlay_is_drawn_from_the_raw_heatmap_at_the_size_of_the_upright_photo(
    detector, tmp_path, orientation
):
    coarse = np.random.default_rng(0).integers(0, 256, (6, 8, 3)).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(coarse).resize((400, 300))
    stored.save(tmp_path / "photo.png", exif=exif)
    out = tmp_path / "out"
    predict(detector, [tmp_path / "photo.png"], out, PredictConfig(pictures="overlay"))
    (line,) = read_csv(out)
    heatmap = np.load(out / line["heatmap"])
    photo = to_rgb(Image.open(tmp_path / "photo.png"))
    assert photo.size == ((400, 300) if orientation == 1 else (300, 400))
    wanted = draw_overlay(
        photo,
        np.abs(heatmap).max(axis=0),
        detector.classifier.config.transform.seen_box(*photo.size),
        ColorScale(detector.color_max, detector.pixel_threshold),
    )
    with Image.open(out / line["picture"]) as picture:
        np.testing.assert_array_equal(np.asarray(picture), np.asarray(wanted))


def test_pictures_of_jpeg_files_are_jpeg_and_mirror_the_tree(detector, tmp_path):
    photo = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (3, 4, 3)).astype(np.uint8)
    ).resize((320, 240))
    root = tmp_path / "in"
    names = ["a.jpg", "only/deep/b.JPEG", "only/c.webp", "only/a.jpg", "only/a.png"]
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        photo.save(root / name)
    out = tmp_path / "out"
    paths = list_images([root], out)
    predict(detector, paths, out, PredictConfig(pictures="overlay"), root=root)
    lines = {line["image"]: line for line in read_csv(out)}
    for name in names:
        line, suffix = lines[str(root / name)], ".png" if name.endswith(".webp") else ""
        assert line["picture"] == f"pictures/{name}{suffix}"
        assert line["heatmap"] == f"heatmaps/{name}{suffix}.npy"
        with Image.open(out / line["picture"]) as picture:
            assert picture.size == (320, 240)
            assert picture.format == ("JPEG" if ".jp" in name.lower() else "PNG")


def test_panels_have_the_nearest_images_of_the_index(finished_run, detector, paths, tmp_path):
    drawn = []

    def draw_panel(*arguments):
        drawn.append(arguments[-1])
        return pictures.draw_panel(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(picture_writer, "draw_panel", draw_panel)
        config = PredictConfig(nearest=3, workers=1, batch_size=4)
        predict(detector, paths, tmp_path / "out", config)
    index = open_index(finished_run)
    columns = {name: index.columns[name].read() for name in ("images", "features", "prediction")}
    _, output = detector.detect(
        np.stack([detector.classifier.config.transform(Image.open(path)) for path in paths])
    )
    prediction = output.logits.argmax(dim=1).numpy()
    for i, found in enumerate(drawn):
        of_class = np.flatnonzero(columns["prediction"] == prediction[i])
        difference = columns["features"][of_class].astype(np.float64) - output.features[i].numpy()
        distance = np.sqrt((difference**2).sum(axis=1))
        wanted = np.argsort(distance)[:3]
        assert [one.distance for one in found] == pytest.approx(distance[wanted].tolist(), rel=1e-4)
        for one, position in zip(found, of_class[wanted], strict=True):
            image = np.asarray(one.image).transpose(2, 0, 1)
            np.testing.assert_array_equal(image, columns["images"][position])
    config = PredictConfig(nearest=1, pictures="overlay")
    with pytest.raises(UsageError, match="panels only"):
        predict(detector, paths, tmp_path / "other", config)
    in_memory = HeatmapDetector(detector.classifier, detector.decoder)
    with pytest.raises(UsageError, match="has no ID images"):
        predict(in_memory, paths, tmp_path / "other", PredictConfig(nearest=1))
    assert not (tmp_path / "other").exists()


def test_the_command_draws_the_nearest_images(run, paths, tmp_path):
    sizes = []
    for number in (0, 5):
        out = tmp_path / str(number)
        arguments = ["predict", run, paths[0], "--out", out, "--device", "cpu"]
        result = CliRunner().invoke(main, [str(one) for one in (*arguments, "--nearest", number)])
        assert result.exit_code == 0, result.output
        with Image.open(out / "pictures" / paths[0].name) as picture:
            sizes.append(picture.width)
    assert sizes[1] > sizes[0] + 240


def test_a_photo_that_changes_after_its_score_is_not_drawn(detector, paths, tmp_path, monkeypatch):
    files = [tmp_path / path.name for path in paths[:3]]
    for path, copy in zip(paths, files, strict=False):
        copy.write_bytes(path.read_bytes())
    decode = detector.decode

    def change(*arguments, **options):
        files[1].write_bytes(paths[9].read_bytes())
        return decode(*arguments, **options)

    monkeypatch.setattr(detector, "decode", change)
    results = predict(detector, files, tmp_path / "out", PredictConfig())
    assert [image.reason for image in results.not_drawn] == ["changed since it was scored"]
    lines = read_csv(tmp_path / "out")
    assert [bool(line["picture"]) for line in lines] == [True, False, True]


def test_without_pictures_the_heatmaps_stay_on_the_device(detector, paths, tmp_path, monkeypatch):
    decode, shapes = detector.decode, []

    def watched(output, **settings):
        result = decode(output, **settings)
        shapes.append(result.heatmap.shape)
        return result

    monkeypatch.setattr(detector, "decode", watched)
    predict(detector, paths[:4], tmp_path / "with", PredictConfig())
    predict(detector, paths[:4], tmp_path / "without", PredictConfig(pictures="none"))
    assert shapes == [(4, 1, 16, 16), (0, 1, 16, 16)]
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

    list_images_argument = [predict_inputs._STANDARD_INPUT]
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
        return CliRunner().invoke(main, [*arguments, "--pictures", "none", *options], input=text)

    result = call("--format", "jsonl", text=f"{paths[0]}\n{paths[1]}\n")
    assert result.exit_code == 0, result.output
    assert "2 images, scores in" in result.output
    assert len((tmp_path / "out" / "scores.jsonl").read_text().splitlines()) == 2
    result = call("--overwrite", text=f"{paths[0]}\nnowhere.png\n")
    assert result.exit_code == 1
    wanted = "images without a score: 1, nowhere.png first (No such file or directory)."
    assert wanted in result.output
    assert "1 image, scores in" in result.output
    assert len(read_csv(tmp_path / "out")) == 1


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
        results = predict(detector, files, out / kind, PredictConfig(format=kind, batch_size=4))
        assert (results.num_images, results.problems) == (len(files), [])
    out = out / "csv"
    with (out / "scores.csv").open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        lines = list(csv.DictReader(file))
    records = [
        json.loads(line) for line in (tmp_path / "out/jsonl/scores.jsonl").read_text().splitlines()
    ]
    for path, line, record in zip(files, lines, records, strict=True):
        assert line["image"] == record["image"] == str(path)
        folder, name = line["picture"].split("/")
        assert folder == "pictures"
        assert len(name.encode()) <= 140
        assert name.isprintable()
        assert name[0] not in "=+-@."
        with Image.open(out / line["picture"]) as picture:
            assert picture.width > 480
        assert np.load(out / line["heatmap"]).shape == (1, 16, 16)
    assert len({line["picture"] for line in lines}) == len(files)


def test_text_that_a_spreadsheet_would_run_begins_with_an_apostrophe(
    detector, paths, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(detector, "classes", ("=1+1", "-2+3", "+cat", "@cat"))
    names = ["=HYPERLINK(1).png", "-a.png", "+a.png", "@a.png", "\ta.png", "\ra.png", "a=1.png"]
    for name in names:
        Path(name).write_bytes(paths[0].read_bytes())
    for kind in ("csv", "jsonl"):
        predict(detector, [Path(name) for name in names], Path(kind), PredictConfig(format=kind))
    with Path("csv/scores.csv").open(newline="") as file:
        table = list(csv.reader(file))
    scores = table[0].index("score")
    for row in table:
        for text in row[:scores] + row[scores + 1 :]:
            assert not text.startswith(("=", "+", "-", "@", "\t", "\r"))
    assert [row[0] for row in table[1:]] == [f"'{name}" for name in names[:-1]] + ["a=1.png"]
    records = [json.loads(line) for line in Path("jsonl/scores.jsonl").read_text().splitlines()]
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
        predict(strict, paths[:3], tmp_path / kind, PredictConfig(format=kind, pictures="none"))
    lines = read_csv(tmp_path / "csv")
    assert [line["is_ood"] for line in lines] == ["", "", ""]
    assert all(0 < float(line["p_value"]) <= 1 for line in lines)
    text = (tmp_path / "jsonl" / "scores.jsonl").read_text()
    records = [json.loads(line) for line in text.splitlines()]
    assert [record["is_ood"] for record in records] == [None] * 3
    assert len(caplog.messages) == 1


def test_panels_say_id_or_ood_only_where_there_is_a_decision(
    detector, paths, tmp_path, monkeypatch
):
    drawn = []

    def draw_panel(*arguments):
        drawn.append(arguments[4])
        return pictures.draw_panel(*arguments)

    monkeypatch.setattr(picture_writer, "draw_panel", draw_panel)
    scores = detector(paths).score
    calibration = Calibration.fit(scores, scores)
    for level in (0.5, 0.005):
        drawn.clear()
        config = PredictConfig(workers=1, overwrite=True)
        results = predict(detector.calibrated(calibration, level), paths, tmp_path, config)
        lines = read_csv(tmp_path)
        num_ood = sum(line["is_ood"] == "true" for line in lines)
        assert results.num_ood == num_ood
        assert (0 < num_ood < 25) == (level == 0.5)
        said = {"true": "OOD", "false": "ID", "": "no decision"}
        for decision, line in zip(drawn, lines, strict=True):
            title, explained = decision.words()
            assert title.partition(":")[0] == said[line["is_ood"]]
            assert any("p-value" in text for text in explained)
            assert any(line["prediction"] in text for text in explained)
    assert {line["is_ood"] for line in lines} == {""}


def test_the_command_warns_once_when_the_level_is_too_fine(run, paths, tmp_path, caplog):
    arguments = ["predict", str(run), str(paths[0]), "--out", str(tmp_path), "--device", "cpu"]
    result = CliRunner().invoke(main, [*arguments, "--pictures", "none", "--false-alarm", "0.001"])
    assert result.exit_code == 0, result.output
    assert caplog.text.count("needs at least 999 held-out ID images") == 1
    assert read_csv(tmp_path)[0]["is_ood"] == ""


def test_a_picture_that_cannot_be_written_costs_no_line(detector, paths, tmp_path, monkeypatch):
    def make_directory(path):
        files.make_directory(path)
        # in the way of a file
        for name in ("003.png.npy/x", "005.png/x"):
            files.make_directory(path / name)

    monkeypatch.setattr(picture_writer, "make_directory", make_directory)
    results = predict(detector, paths, tmp_path, PredictConfig(batch_size=4))
    assert results.num_images == len(paths)
    assert [image.row for image in results.not_drawn] == [3, 5]
    (problem,) = results.problems
    assert "images without a picture and heatmap: 2" in problem
    assert "003.png.npy" in problem
    assert "Is a directory" in problem
    lines = read_csv(tmp_path)
    assert [i for i, line in enumerate(lines) if not line["picture"]] == [3, 5]
    assert [i for i, line in enumerate(lines) if not line["heatmap"]] == [3, 5]
    assert not list(tmp_path.rglob(".*.tmp"))


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
    results = predict(detector, paths, tmp_path, PredictConfig(batch_size=4, pictures="none"))
    assert [image.row for image in results.skipped] == [5]
    assert f"skipped {paths[5]}: the classifier returns NaN or infinity" in caplog.messages
    found = [float(line["score"]) for line in read_csv(tmp_path)]
    np.testing.assert_allclose(found, np.delete(wanted, 5), atol=1e-5)


def test_an_image_of_extreme_shape_costs_the_others_nothing(detector, paths, tmp_path):
    for name, size in (("thin.png", (1, 80_000)), ("wide.png", (60_000, 1))):
        Image.new("L", size).save(tmp_path / name)
    files = [paths[0], tmp_path / "thin.png", tmp_path / "wide.png", paths[1]]
    results = predict(detector, files, tmp_path / "out", PredictConfig(pictures="none"))
    assert results.num_images + len(results.skipped) == 4
    named = [line["image"] for line in read_csv(tmp_path / "out")]
    assert {str(paths[0]), str(paths[1])} <= set(named)


def test_exif_orientation_is_applied(detector, paths, tmp_path):
    upright = Image.open(paths[0]).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    results = predict(detector, [tmp_path / "turned.png"], tmp_path, PredictConfig(pictures="none"))
    assert results.num_images == 1
    found = float(read_csv(tmp_path)[0]["score"])
    assert found == pytest.approx(detector(upright).score[0], abs=2e-5)
    assert detector(tmp_path / "turned.png").score[0] == pytest.approx(found, abs=2e-5)


def test_a_second_process_is_refused_while_one_writes(detector, paths, tmp_path):
    (tmp_path / "scores.csv").write_text("of the other")
    with locked(tmp_path), pytest.raises(OodHeatmapError, match=r"is being written by process \d+"):
        predict(detector, paths[:2], tmp_path, PredictConfig())
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [".lock", "scores.csv"]
    assert (tmp_path / "scores.csv").read_text() == "of the other"
    config = PredictConfig(overwrite=True)
    assert predict(detector, paths[:2], tmp_path, config).num_images == 2


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
    for line in (*found, *wanted):
        # at another place below the common folder
        assert line.pop("picture")
        assert line.pop("heatmap")
    assert found == wanted


def test_files_and_folders_are_opened_by_their_paths(data, tmp_path):
    inputs = [data / "far", data / "ood" / "000.png"]
    paths, images = open_inputs(inputs, tmp_path)
    assert paths == list_images(inputs, tmp_path)
    assert list(images.names) == list(map(str, paths))
