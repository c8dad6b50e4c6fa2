"""Export: the file, run by another runtime, says what the detector says."""

import builtins
import errno
import io
import json
import math
import os
import zipfile
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner

from ood_heatmap import HeatmapDetector
from ood_heatmap.calibration import Calibration
from ood_heatmap.cli import main
from ood_heatmap.decoder import DecoderConfig, make_decoder
from ood_heatmap.detector import decode
from ood_heatmap.errors import OodHeatmapError
from ood_heatmap.pipeline import export as export_module
from ood_heatmap.pipeline.export import export
from ood_heatmap.pipeline.run import read_manifest

CALIBRATION = Calibration.fit(*np.linspace((0, 0), (1, 1), 200, dtype=np.float32).T)


def make_detector(
    classifier, target: Literal["signed", "magnitude"], num_maps: int
) -> HeatmapDetector:
    """Return a detector whose decoder is drawn wide enough for its heatmaps to differ."""
    shapes = classifier.map_shapes[:num_maps]
    config = DecoderConfig(8, 4, 16, target, width=32, map_shapes=shapes, stack="dcgan")
    torch.manual_seed(0)
    decoder = make_decoder(config, (0.0, 2.0)).eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(3)
    classifier.maps = classifier.maps[:num_maps]
    calibration = CALIBRATION if target == "magnitude" else None
    return HeatmapDetector(classifier, decoder, classes="abcd", calibration=calibration)


def run_file(path, kind: str, images: np.ndarray) -> dict[str, np.ndarray]:
    """Run an exported file with nothing of the package."""
    if kind == "onnx":
        session = onnxruntime.InferenceSession(path)
        names = [item.name for item in session.get_outputs()]
        return dict(zip(names, session.run(None, {"images": images}), strict=True))
    program = torch.export.load(io.BytesIO(path.read_bytes())).module()
    return {key: item.detach().numpy() for key, item in program(torch.from_numpy(images)).items()}


@pytest.mark.parametrize("kind", ["onnx", "torch"])
@pytest.mark.parametrize("num_maps", [0, 2])
@pytest.mark.parametrize("target", ["signed", "magnitude"])
def test_the_file_and_pytorch_agree(classifier, tmp_path, kind, num_maps, target):
    detector = make_detector(classifier, target, num_maps)
    path = tmp_path / "detector"
    differences = export(detector, path, kind)
    assert max(differences.score, differences.heatmap) <= 1e-4
    assert [item.name for item in tmp_path.iterdir()] == ["detector"]  # one file
    for count in (1, 2, 7, 33):
        images = np.random.default_rng(count).integers(0, 256, (count, 3, 16, 16)).astype(np.uint8)
        wanted, found = detector.detect(images)[0], run_file(path, kind, images)
        assert list(found) == ["score", "heatmap", "prediction", "p_value"]
        assert wanted.heatmap.std() > 0.01
        np.testing.assert_allclose(found["score"], wanted.score, rtol=0, atol=1e-4)
        np.testing.assert_allclose(found["heatmap"], wanted.heatmap, rtol=0, atol=1e-4)
        np.testing.assert_array_equal(found["prediction"], wanted.prediction)
        if target == "signed":  # not calibrated
            assert np.isnan(found["p_value"]).all()
        else:
            high = (CALIBRATION.scores >= found["score"][:, None]).sum(axis=1)
            np.testing.assert_allclose(found["p_value"], (high + 1) / 201, rtol=1e-12)


@pytest.mark.parametrize("kind", ["onnx", "torch"])
def test_feature_maps_are_rounded_to_float16_as_in_training(classifier, tmp_path, kind):
    """On the average over pixels: now and then the two round a number to different neighbours."""
    detector = make_detector(classifier, "magnitude", 2)
    with torch.no_grad():  # the maps outweigh the features, whose float32 rounding is no part of it
        for parameter in detector.decoder.maps.parameters():
            parameter.mul_(30)
    export(detector, tmp_path / "detector", kind)
    images = np.random.default_rng(0).integers(0, 256, (8, 3, 16, 16)).astype(np.uint8)
    output = classifier(torch.from_numpy(images))
    found = run_file(tmp_path / "detector", kind, images)["heatmap"]
    with torch.inference_mode():
        exact, rounded = (
            detector.decoder(output.features, output.logits.argmax(dim=1), maps).numpy()
            for maps in (output.maps, [item.half().float() for item in output.maps])
        )
    assert np.abs(found - rounded).mean() < np.abs(exact - rounded).mean() / 5


def test_ties_have_the_p_value_of_the_calibration(classifier):
    detector = make_detector(classifier, "magnitude", 0)
    held_out = np.array([0.25, 0.5, 0.5, 0.75], np.float32)
    module = export_module._ExportedDetector(
        detector.calibrated(Calibration.fit(held_out, held_out), 0.1)
    )
    scores = torch.tensor([0.1, 0.25, 0.5, 0.6, 0.75, 0.8])
    assert module.p_value(scores).tolist() == [1.0, 1.0, 0.8, 0.4, 0.4, 0.2]


def test_the_onnx_model_says_what_it_is(run, tmp_path):
    out = tmp_path / "detector.onnx"
    result = CliRunner().invoke(main, ["export", str(run), "--format", "onnx", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "differs from the detector by at most" in result.output
    model = onnx.load(out)
    onnx.checker.check_model(model, full_check=True)
    about = {item.key: item.value for item in model.metadata_props}
    assert json.loads(about["class_names"]) == [f"class{label}" for label in range(4)]
    assert (about["input_size"], about["target"]) == ("16", "presence")
    assert about["fingerprint"] == read_manifest(run, "decoder").fingerprint
    # two held-out images are too few for the level: JSON has no infinity
    assert HeatmapDetector.load(run, "cpu").threshold == math.inf
    assert (about["threshold"], about["pixel_threshold"]) == ("null", "null")
    batch = [item.type.tensor_type.shape.dim[0].dim_param for item in model.graph.input]
    assert batch == ["batch"]
    content = out.read_bytes()
    for place in (str(tmp_path), "site-packages", ".py"):  # nothing of this machine
        assert place.encode() not in content
    CliRunner().invoke(main, ["export", str(run), "--format", "onnx", "--out", str(out)])
    assert out.read_bytes() == content


def test_the_torch_program_says_what_it_is(run, tmp_path):
    out = tmp_path / "detector.pt2"
    result = CliRunner().invoke(main, ["export", str(run), "--format", "torch", "--out", str(out)])
    assert result.exit_code == 0, result.output
    extra = {"metadata.json": ""}
    torch.export.load(out, extra_files=extra)
    assert json.loads(extra["metadata.json"])["target"] == "presence"


@pytest.mark.parametrize("kind", ["onnx", "torch"])
def test_a_file_does_not_say_where_it_was_made(run, data, tmp_path, kind):
    path = tmp_path / "exported"
    export(HeatmapDetector.load(run, "cpu"), path, kind)
    contents = [path.read_bytes()]
    if kind == "torch":
        with zipfile.ZipFile(path) as file:
            contents = [file.read(name) for name in file.namelist()]
    package = Path(export_module.__file__).parent.parent
    for folder in (data, run, Path.home(), package, Path(torch.__file__).parent):
        assert not [content for content in contents if os.fsencode(folder) in content]


def test_the_metadata_has_the_thresholds_where_there_are_any(classifier):
    detector = make_detector(classifier, "magnitude", 0)
    about = export_module._metadata(detector)
    assert json.loads(about["threshold"]) == detector.threshold
    assert json.loads(about["pixel_threshold"]) == detector.pixel_threshold
    about = export_module._metadata(detector.calibrated(None, 0.05))
    assert (about["threshold"], about["pixel_threshold"]) == ("null", "null")


@pytest.mark.parametrize("kind", ["onnx", "torch"])
def test_a_file_that_differs_is_not_left_behind(classifier, tmp_path, monkeypatch, kind):
    detector = make_detector(classifier, "magnitude", 0)

    def other(*given):
        heatmap, score = decode(*given)
        return heatmap, score + heatmap.mean(dim=(1, 2, 3))

    monkeypatch.setattr(export_module, "decode", other)
    with pytest.raises(OodHeatmapError, match="would differ from the detector"):
        export(detector, tmp_path / "detector", kind)
    assert list(tmp_path.iterdir()) == []


def test_a_classifier_that_cannot_be_exported_is_one_line(classifier, tmp_path):
    detector = make_detector(classifier, "magnitude", 0)
    forward = classifier.network.forward
    classifier.network.forward = lambda images: (
        forward(images) if float(images.mean()) > -99 else images
    )
    with pytest.raises(OodHeatmapError, match="cannot be exported") as caught:
        export(detector, tmp_path / "detector", "torch")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def without(monkeypatch, *missing: str) -> None:
    """Make the import of some packages fail."""
    real = builtins.__import__

    def guarded(name, *arguments, **more):
        if name in missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", guarded)


@pytest.mark.parametrize("code", [errno.EROFS, errno.ENOSPC])
@pytest.mark.parametrize("kind", ["onnx", "torch"])
def test_a_refused_write_is_one_line_also_when_the_cleanup_is_refused(
    classifier, tmp_path, monkeypatch, kind, code
):
    def refuse(*_, **__):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    monkeypatch.setattr(os, "unlink", refuse)
    with pytest.raises(OodHeatmapError, match=r"(cannot write|no space left for) .*detector"):
        export(make_detector(classifier, "magnitude", 0), tmp_path / "detector", kind)


def test_a_missing_folder_is_found_before_the_work(classifier, tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "_metadata", None)
    with pytest.raises(OodHeatmapError, match=r"cannot write .*there is no folder .*gone"):
        export(make_detector(classifier, "magnitude", 0), tmp_path / "gone" / "d.onnx", "onnx")


def test_networks_too_large_for_onnx_are_refused_before_the_work(classifier, tmp_path, monkeypatch):
    detector = make_detector(classifier, "magnitude", 0)
    monkeypatch.setattr(export_module, "_MAX_ONNX_BYTES", 10)
    with pytest.raises(OodHeatmapError, match=r"is limited to .* GB\. Use --format torch"):
        export(detector, tmp_path / "detector", "onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_a_missing_package_is_one_line_with_the_way_out(classifier, tmp_path, monkeypatch, package):
    detector = make_detector(classifier, "magnitude", 0)
    without(monkeypatch, package)
    with pytest.raises(OodHeatmapError, match=rf"{package} is not installed: pip install"):
        export(detector, tmp_path / "detector", "onnx")
    assert list(tmp_path.iterdir()) == []


def test_without_onnx_runtime_the_file_is_written_and_not_compared(
    classifier, tmp_path, monkeypatch
):
    detector = make_detector(classifier, "magnitude", 0)
    without(monkeypatch, "onnxruntime")
    assert export(detector, tmp_path / "detector", "onnx") is None
    assert (tmp_path / "detector").is_file()
