"""A detector in one file: the same scores anywhere, and nothing in it is believed."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ood_heatmap.bundle import _hash, to_bundle
from ood_heatmap.cli import main
from ood_heatmap.detector import HeatmapDetector
from ood_heatmap.errors import DamagedCacheError, OodHeatmapError, StaleCacheError

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def bundle(finished_run, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "detector.safetensors"
    arguments = ["bundle", str(finished_run), "--out", str(path), "--false-alarm", "0.4"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "MB" in result.output
    return path


@pytest.fixture
def copied(bundle, tmp_path) -> Path:
    return Path(shutil.copy(bundle, tmp_path / "copied.safetensors"))


def read(path: Path):
    with safe_open(path, "pt") as file:
        return load_file(path), json.loads(file.metadata()["ood_heatmap"])


def write(path: Path, tensors, about) -> None:
    """Write a bundle whose checksum is right, as someone with bad intentions would."""
    about = {name: value for name, value in about.items() if name != "sha256"}
    about["sha256"] = _hash(tensors, about)
    save_file(tensors, path, {"ood_heatmap": json.dumps(about)})


def test_a_bundle_scores_as_its_run(bundle, finished_run):
    wanted = HeatmapDetector.load(finished_run, "cpu", 0.4)
    found = HeatmapDetector.load(bundle, "cpu")
    assert found.false_alarm == 0.4
    assert found.scale == wanted.scale
    assert found.fingerprint == wanted.fingerprint
    np.testing.assert_array_equal(found(IMAGES).heatmap, wanted(IMAGES).heatmap)
    np.testing.assert_array_equal(found(IMAGES).score, wanted(IMAGES).score)
    assert HeatmapDetector.load(bundle, "cpu", false_alarm=0.3).false_alarm == 0.3


def test_commands_take_a_bundle_in_place_of_a_run(bundle, finished_run, data, tmp_path):
    tables = []
    for run in (finished_run, bundle):
        out = tmp_path / run.name
        arguments = ["predict", str(run), str(data / "far"), "--out", str(out)]
        result = CliRunner().invoke(main, [*arguments, "--false-alarm", "0.4"])
        assert result.exit_code == 0, result.output
        tables.append((out / "scores.csv").read_bytes())
    assert tables[0] == tables[1]
    arguments = ["predict", str(bundle), str(data / "far"), "--out", str(tmp_path / "near")]
    result = CliRunner().invoke(main, [*arguments, "--nearest", "1"])
    assert result.exit_code == 2
    assert "leave out --nearest" in result.output.splitlines()[-1]
    out = tmp_path / "detector.pt2"
    result = CliRunner().invoke(
        main, ["export", str(bundle), "--format", "torch", "--out", str(out)]
    )
    assert result.exit_code == 0, result.output
    assert out.is_file()


def test_a_bundle_is_small_and_has_no_image(bundle, finished_run):
    tensors, about = read(bundle)
    size = sum(path.stat().st_size for path in finished_run.rglob("*") if path.is_file())
    assert bundle.stat().st_size < size
    assert not [name for name, item in tensors.items() if item.shape[-3:] == (3, 16, 16)]
    assert about["code"].keys() == {"network.py"}


def strings(value) -> list[str]:
    """Return all strings in a JSON value, but for the text of the model file."""
    if isinstance(value, dict):
        return [text for name, item in value.items() if name != "code" for text in strings(item)]
    if isinstance(value, list):
        return [text for item in value for text in strings(item)]
    return [value] if isinstance(value, str) else []


def test_a_bundle_does_not_say_where_it_was_made(bundle, data, finished_run):
    content = bundle.read_bytes()
    for folder in (data, finished_run.parent, Path.home(), Path.cwd()):
        assert os.fsencode(folder) + b"/" not in content
    _, about = read(bundle)
    assert not [text for text in strings(about) if Path(text.partition(":")[0]).is_absolute()]
    assert about["classifier"]["spec"] == "network.py:network"
    again = to_bundle(HeatmapDetector.load(bundle, "cpu"))
    assert again == content


def test_code_in_a_bundle_runs_only_on_the_users_word(bundle, data, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another machine"))
    hidden = (data / "network.py").rename(tmp_path / "hidden.py")
    try:
        with pytest.raises(OodHeatmapError, match=r"code that you have not run.*trust_code=True"):
            HeatmapDetector.load(bundle, "cpu")
        assert len(HeatmapDetector.load(bundle, "cpu", trust_code=True)(IMAGES)) == 6
    finally:
        hidden.rename(data / "network.py")


def test_bundling_a_run_trusts_no_code_that_was_not_trusted_before(
    finished_run, monkeypatch, tmp_path
):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another machine"))
    path = tmp_path / "b.safetensors"
    path.write_bytes(to_bundle(HeatmapDetector.load(finished_run, "cpu", trust_code=True)))
    with pytest.raises(OodHeatmapError, match=r"function network of .*b.safetensors.network\.py"):
        HeatmapDetector.load(path, "cpu")


def test_other_code_than_recorded_does_not_run(copied):
    tensors, about = read(copied)
    about["code"]["network.py"] = "raise SystemExit('it ran')"
    write(copied, tensors, about)
    with pytest.raises(StaleCacheError, match="source was"):
        HeatmapDetector.load(copied, "cpu", trust_code=True)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda content: content[:-9], "not a bundle"),
        (lambda content: content[:-9] + b"x" * 9, "its checksum is another"),
        (lambda content: content.replace(b'\\"color_max\\": 1', b'\\"color_max\\": 2'), "checksum"),
        (lambda content: b"\x80\x04" + content, "not a bundle"),
        (lambda content: b"", "not a bundle"),
    ],
)
def test_a_damaged_bundle_is_refused_in_one_line(copied, change, named):
    content = copied.read_bytes()
    changed = change(content)
    assert changed != content
    copied.write_bytes(changed)
    with pytest.raises(DamagedCacheError, match=named) as caught:
        HeatmapDetector.load(copied, "cpu")
    assert "\n" not in str(caught.value)


def enlarge(_, about):
    about["classifier"]["transform"]["size"] = 10**6


def widen(_, about):
    about["decoder"]["width"] = 10**9


def add_classes(_, about):
    about["classifier"]["num_classes"] = 10**9


def change_dtype(tensors, _):
    tensors["calibration.scores"] = tensors["calibration.scores"].to(torch.int16)


def drop(tensors, _):
    del tensors["calibration.peaks"]


def drop_weights(tensors, _):
    del tensors["classifier.linear.weight"]


def shorten_names(_, about):
    about["classes"] = ["one"]


def forget(_, about):
    del about["decoder"]


@pytest.mark.parametrize(
    "change",
    [enlarge, widen, add_classes, change_dtype, drop, drop_weights, shorten_names, forget],
)
def test_a_bundle_that_asks_for_something_else_is_refused_in_one_line(copied, change):
    tensors, about = read(copied)
    change(tensors, about)
    write(copied, tensors, about)
    with pytest.raises(OodHeatmapError) as caught:
        HeatmapDetector.load(copied, "cpu", trust_code=True)
    assert "\n" not in str(caught.value)


def test_another_format_and_other_scores_are_refused(copied):
    tensors, about = read(copied)
    write(copied, tensors, {**about, "format": 2})
    with pytest.raises(StaleCacheError, match="another format"):
        HeatmapDetector.load(copied, "cpu")
    write(copied, tensors, {**about, "probe": [value + 1 for value in about["probe"]]})
    with pytest.raises(StaleCacheError, match="has other scores here"):
        HeatmapDetector.load(copied, "cpu")


def test_a_folder_that_is_not_there_is_named(finished_run, tmp_path):
    arguments = ["bundle", str(finished_run), "--out", str(tmp_path / "no" / "x.safetensors")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert "there is no folder" in result.output
