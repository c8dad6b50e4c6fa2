"""Model code runs only on the user's word, and is hashed with all that it imports."""

import hashlib
import shutil
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import nn

from ood_heatmap.classifier import ClassifierConfig, load_classifier, restore_classifier
from ood_heatmap.cli import main
from ood_heatmap.detector import HeatmapDetector
from ood_heatmap.errors import OodHeatmapError, StaleCacheError, UsageError
from ood_heatmap.images import Transform
from ood_heatmap.networks import build
from ood_heatmap.user_code import UserCode, trusting_code

LINEAR = "nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))"
SIMPLE = f"from torch import nn\n\ndef network():\n    return {LINEAR}\n"


@pytest.fixture(autouse=True)
def nothing_is_trusted(tmp_path, monkeypatch):
    """Begin without anything remembered."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def write(folder: Path, **sources: str) -> UserCode:
    """Write modules into a folder, and return the code of the function ``network`` of ``net``."""
    folder.mkdir(exist_ok=True)
    for name, source in sources.items():
        (folder / f"{name}.py").write_text(source)
    return UserCode(str(folder / "net.py"), "network")


def test_the_hash_of_a_file_without_imports_is_that_of_its_bytes(tmp_path):
    code = write(tmp_path, net=SIMPLE)
    assert code.hash == hashlib.sha256(SIMPLE.encode()).hexdigest()


@pytest.mark.parametrize(
    "line",
    [
        "import helper",
        "import helper as other",
        "from helper import SCALE",
        "from helper import *",
        "import package.inner",
        "from package import inner",
        "from package.inner import SCALE",
        "def late():\n    import helper",
    ],
)
def test_the_hash_knows_what_the_file_imports(tmp_path, line):
    sources = {"net": f"{line}\n{SIMPLE}", "unrelated": "SCALE = 1"}
    write(tmp_path / "package", inner="from ..helper import SCALE\nfrom . import more\n", more="")
    before = write(tmp_path, helper="SCALE = 1.0", **sources).hash
    assert write(tmp_path, helper="SCALE = 1.0", **sources, other="").hash == before
    changed = tmp_path / "package" / "more.py" if "package" in line else tmp_path / "helper.py"
    changed.write_text("SCALE = 0.5")
    assert write(tmp_path, **sources).hash != before


def test_a_module_is_hashed_by_its_source_with_its_package_and_without_libraries(
    tmp_path, monkeypatch
):
    write(tmp_path / "mynets", __init__="", net=f"import numpy\nfrom . import layers\n{SIMPLE}")
    write(tmp_path / "mynets", layers="WIDTH = 1")
    monkeypatch.syspath_prepend(str(tmp_path))
    code = UserCode("mynets.net", "network")
    assert sorted(code.sources) == ["", "mynets", "mynets.layers"]
    write(tmp_path / "mynets", layers="WIDTH = 2")
    assert UserCode("mynets.net", "network").hash != code.hash
    assert "mynets" not in sys.modules


def test_the_source_of_a_library_module_is_hashed_alone():
    import json

    source = Path(json.__file__).read_bytes()
    assert UserCode("json", "dumps").sources == {"": source}


def test_packages_in_a_folder_of_pythonpath_are_libraries(tmp_path, monkeypatch):
    """``pip install --target`` leaves the metadata of what it installs beside it."""
    target, own = tmp_path / "target", tmp_path / "own"
    (target / "nets-1.0.dist-info").mkdir(parents=True)
    write(target / "nets", __init__="from nets.layers import WIDTH", layers="WIDTH = 1")
    write(own, helper="", net=f"import helper\nimport nets\n{SIMPLE}")
    monkeypatch.syspath_prepend(str(target))
    assert sorted(UserCode(str(own / "net.py"), "network").sources) == ["", "helper"]


def test_a_file_imports_its_neighbours_whatever_else_has_their_names(tmp_path, monkeypatch):
    mine = ModuleType("layers")
    monkeypatch.setitem(sys.modules, "layers", mine)
    networks = []
    for width in (3, 5):
        source = "from layers import WIDTH\nfrom torch import nn\n\ndef network():\n"
        source += "    import late\n    return nn.Linear(WIDTH, late.CLASSES)\n"
        code = write(
            tmp_path / str(width), net=source, layers=f"WIDTH = {width}", late="CLASSES = 2"
        )
        networks.append(code.make(None))
    assert [network.in_features for network in networks] == [3, 5]
    assert sys.modules["layers"] is mine
    assert str(tmp_path / "5") not in sys.path


def test_a_missing_import_is_one_line_that_names_the_place(tmp_path):
    code = write(tmp_path, net=f"import no_such_module_here\n{SIMPLE}")
    with pytest.raises(UsageError, match=r"ModuleNotFoundError.*no_such_module_here.*net.py line"):
        code.make(None)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("def network():\n    raise KeyError('depth')\n", r"KeyError: 'depth', .*net.py line 2"),
        ("import sys\nsys.exit(2)\n", "SystemExit"),
        ("def network(\n", "SyntaxError"),
        ("from torch.nn import Linear as network\n", "is defined in torch.nn.modules.linear"),
        ("from os import system as network\n", "is defined in posix"),
        ("network = 3\n", "has no function network"),
        ("def other(): pass\n", "has no function network"),
        ("def network(width): pass\n", "cannot be called"),
    ],
)
def test_code_that_cannot_be_used_is_one_line(tmp_path, body, words):
    with pytest.raises(UsageError, match=words) as caught:
        write(tmp_path, net=body).make(None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("signature", "classes"),
    [
        ("width=16, num_classes=10", 7),
        ("pretrained=False, num_classes=10", 7),
        ("*, num_classes=10", 7),
        ("num_classes", 7),
        ("**options", 7),
        ("width=10", None),
        ("", None),
    ],
)
def test_the_number_of_classes_goes_by_its_name(tmp_path, signature, classes):
    body = f"def network({signature}):\n    return dict(locals())\n"
    found = write(tmp_path, net=body).make(7)
    assert found.get("options", found).get("num_classes") == classes
    assert found.get("width", 16) in (16, 10)
    assert not found.get("pretrained")


def test_kept_sources_run_after_the_files_are_gone(tmp_path):
    helper = "from pathlib import Path\nSCALE = 3.0\nPLACE = Path(__file__)\n"
    (tmp_path / "lib").mkdir()
    inner = "from . import more\nVALUE = more.SCALE\n"
    write(tmp_path / "lib" / "deep", inner=inner, more="SCALE = 5.0")
    body = (
        "import helper\nfrom lib.deep.inner import VALUE\nfrom torch import nn\n\n"
        f"def network():\n    net = {LINEAR}\n"
        "    net.found = (helper.SCALE, VALUE, helper.PLACE)\n    return net\n"
    )
    code = write(tmp_path, net=body, helper=helper)
    kept = code.keep()
    files = kept.kept_files()
    assert sorted(files) == [
        "imports/helper.py",
        "imports/lib.deep.inner.py",
        "imports/lib.deep.more.py",
        "net.py",
    ]
    again = UserCode(str(tmp_path / "net.py"), "network").from_kept_files(files, None)
    assert again.hash == code.hash
    (tmp_path / "helper.py").write_text("SCALE = 4.0")
    shutil.rmtree(tmp_path / "lib")
    (tmp_path / "net.py").unlink()
    for item in (again, kept):
        assert item.make(None).found == (3.0, 5.0, tmp_path / "helper.py")


def test_what_no_import_statement_names_is_not_kept_and_that_is_said(tmp_path):
    body = f"import importlib\nhelper = importlib.import_module('helper')\n{SIMPLE}"
    code = write(tmp_path, net=body.replace("helper", "unseen"), unseen="")
    with pytest.raises(UsageError, match=r"named 'unseen'.*import statement") as caught:
        code.keep().make(None)
    assert "\n" not in str(caught.value)


def test_a_module_in_a_package_is_kept_with_it_and_a_library_is_not(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    write(tmp_path / "mine", net="from .part import SCALE\n" + SIMPLE, part="SCALE = 2.0")
    (tmp_path / "mine" / "__init__.py").write_text("NAME = 'mine'")
    kept = UserCode("mine.net", "network").keep()
    assert sorted(kept.kept_files()) == ["imports/mine.part.py", "imports/mine.py", "mine.net.py"]
    shutil.rmtree(tmp_path / "mine")
    again = UserCode("mine.net", "network").from_kept_files(kept.kept_files(), None)
    assert isinstance(again.make(None), nn.Module)
    assert UserCode("torchvision.models", "resnet18").keep().kept_files() == {}


def test_a_dataclass_with_postponed_annotations_works_in_a_model_file(tmp_path):
    body = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n\n"
        "@dataclass\nclass Config:\n    width: int = 3\n\n"
        "def network():\n    return Config()\n"
    )
    assert write(tmp_path, net=body).make(None).width == 3


def leaves_a_mark(tmp_path: Path) -> str:
    """Return a model file that leaves a file behind when it runs."""
    return f"open({str(tmp_path / 'it-ran')!r}, 'w').close()\n{SIMPLE}"


def described(spec: UserCode | str) -> ClassifierConfig:
    """Return what a run says of its classifier."""
    return ClassifierConfig(str(spec), None, Transform(8), (0.0,) * 3, (1.0,) * 3)


@pytest.fixture
def saved(tmp_path) -> Path:
    """Return weights that fit ``SIMPLE``."""
    path = tmp_path / "w.safetensors"
    save_file(nn.Sequential(nn.Identity(), nn.Identity(), nn.Linear(3, 2)).state_dict(), path)
    return path


def test_code_that_the_user_has_not_named_does_not_run(tmp_path, saved):
    code = write(tmp_path, net=leaves_a_mark(tmp_path))
    with pytest.raises(OodHeatmapError, match=r"function network of .*net\.py.*--trust-code"):
        restore_classifier(described(code), saved)
    assert not (tmp_path / "it-ran").exists()
    with trusting_code():
        restore_classifier(described(code), saved)
    assert (tmp_path / "it-ran").exists()
    # trusted inside the block alone
    with pytest.raises(OodHeatmapError, match="--trust-code"):
        restore_classifier(described(code), saved)


def test_code_that_the_user_has_named_runs_for_any_run(tmp_path, saved):
    code = write(tmp_path, net=SIMPLE)
    load_classifier(str(code), size=8)
    restore_classifier(described(code), saved)
    # another function, other text or another place is not what was named
    others = [
        UserCode(code.module, "other"),
        write(tmp_path / "copy", net=SIMPLE),
        write(tmp_path, net=f"{SIMPLE}\n"),
    ]
    for other in others:
        with pytest.raises(OodHeatmapError, match="--trust-code"):
            restore_classifier(described(other), saved)


def test_changed_code_does_not_run_even_if_it_is_trusted(tmp_path, saved):
    code = write(tmp_path, net=SIMPLE)
    fingerprint = load_classifier(str(code), size=8).fingerprint()
    changed = write(tmp_path, net=leaves_a_mark(tmp_path))
    with trusting_code(), pytest.raises(StaleCacheError, match="source was"):
        restore_classifier(described(changed), saved, fingerprint)
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.parametrize("home", ["unwritable", "a file"])
def test_without_a_place_to_remember_only_the_flag_works(
    tmp_path, saved, monkeypatch, home, caplog
):
    state = tmp_path / "home"
    state.write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(state if home == "a file" else "/proc/none"))
    code = write(tmp_path, net=SIMPLE)
    load_classifier(str(code), size=8)
    assert "later commands need --trust-code" in caplog.text
    with pytest.raises(OodHeatmapError, match="--trust-code"):
        restore_classifier(described(code), saved)
    with trusting_code():
        restore_classifier(described(code), saved)


def test_an_index_is_finished_without_a_place_to_remember(data, spec, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", "/proc/none")
    arguments = ["--id", data / "far", "--classifier", spec, "--device", "cpu"]
    arguments += ["--weights", data / "weights.safetensors", "--ignore-labels"]
    command = [str(item) for item in ["index", tmp_path / "run", *arguments]]
    result = CliRunner().invoke(main, [*command, "--allow-suspicious"])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "run" / "index" / "manifest.json").is_file()


def test_what_is_remembered_lies_where_the_system_says(tmp_path, monkeypatch):
    code = write(tmp_path, net=SIMPLE)
    for variable in ("XDG_STATE_HOME", "HOME"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
        load_classifier(str(code), size=8)
        monkeypatch.delenv(variable)
    folders = [tmp_path / "XDG_STATE_HOME", tmp_path / "HOME" / ".local" / "state"]
    for folder in folders:
        (marker,) = (folder / "ood_heatmap" / "trusted").iterdir()
        assert marker.read_text() == f"{code}\n"


@pytest.mark.parametrize(
    "spec", ["torchvision/resnet18", "cifar-resnet18", "ood_heatmap.demo:digits_network"]
)
def test_networks_of_libraries_and_of_this_package_need_no_trust(spec, saved):
    # it gets as far as the weights
    with pytest.raises(OodHeatmapError, match="does not fit"):
        restore_classifier(described(spec), saved)


def test_a_name_without_a_function_of_its_own_is_not_code():
    with pytest.raises(UsageError, match="there is no classifier"):
        build("os.system", None, pretrained=False)


def downloaded(run: Path, tmp_path: Path, monkeypatch) -> Path:
    """Return a run of which nothing is remembered, as on another computer."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "other"))
    return run


def test_a_downloaded_run_is_opened_only_on_the_users_word(run, tmp_path, monkeypatch, data):
    run = downloaded(run, tmp_path, monkeypatch)
    with pytest.raises(OodHeatmapError, match=r"network\.py.*trust_code=True"):
        HeatmapDetector.load(run, "cpu")
    detector = HeatmapDetector.load(run, "cpu", trust_code=True)
    assert detector.classifier.num_classes == 4
    arguments = ["predict", str(run), str(data / "far" / "000.png"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert "--trust-code" in result.output
    assert not (tmp_path / "out").exists()
    result = CliRunner().invoke(main, [*arguments, "--trust-code"])
    assert result.exit_code == 0, result.output
    # the word is for one command
    assert CliRunner().invoke(main, arguments).exit_code == 1


@pytest.mark.parametrize(
    "command",
    ["targets", "evaluate", "predict", "localize", "export", "bundle", "plan targets"],
)
def test_every_command_that_opens_a_classifier_has_the_flag(command):
    result = CliRunner().invoke(main, [*command.split(), "--help"])
    assert "--trust-code" in result.output


def test_a_model_file_that_changes_later_is_said_and_not_used(make_run, data, tmp_path, caplog):
    shutil.copy(data / "network.py", tmp_path)
    spec = f"{tmp_path / 'network.py'}:network"
    run = make_run(
        tmp_path / "run",
        classifier=load_classifier(spec, weights=data / "weights.safetensors"),
    )
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3)).astype(np.uint8)
    wanted = HeatmapDetector.load(run, "cpu")(images).score
    assert "has changed" not in caplog.text
    (tmp_path / "network.py").write_text("raise ValueError")
    np.testing.assert_array_equal(HeatmapDetector.load(run, "cpu")(images).score, wanted)
    assert f"{tmp_path / 'network.py'} has changed since the run was made" in caplog.text


def test_a_moved_run_needs_neither_model_file_nor_weights(make_run, data, tmp_path, monkeypatch):
    original = tmp_path / "original"
    original.mkdir()
    (original / "layers.py").write_text((data / "network.py").read_text())
    (original / "model.py").write_text(
        "from layers import Network\n\ndef network():\n    return Network(4)\n"
    )
    shutil.copy(data / "weights.safetensors", original)
    spec = f"{original / 'model.py'}:network"
    classifier = load_classifier(spec, weights=original / "weights.safetensors", num_maps=1)
    run = make_run(original / "run", classifier=classifier)
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3)).astype(np.uint8)
    wanted = HeatmapDetector.load(run, "cpu")(images).score
    moved = run.rename(tmp_path / "moved")
    shutil.rmtree(original)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another machine"))
    kept = moved / "index" / "code" / "model.py"
    with pytest.raises(OodHeatmapError, match=f"function network of {kept}"):
        HeatmapDetector.load(moved, "cpu")
    detector = HeatmapDetector.load(moved, "cpu", trust_code=True)
    np.testing.assert_array_equal(detector(images).score, wanted)
    kept.write_text(kept.read_text() + "# changed\n")
    with pytest.raises(OodHeatmapError, match=r"code/model\.py"):
        HeatmapDetector.load(moved, "cpu", trust_code=True)
