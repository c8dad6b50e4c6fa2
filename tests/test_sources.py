"""What a user names; every fault ends in one line."""

import io
import json
import os
import re
import shlex
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ood_heatmap.cli import main
from ood_heatmap.decoding import decode
from ood_heatmap.errors import UsageError
from ood_heatmap.images import relabel
from ood_heatmap.pipeline.config import IndexConfig
from ood_heatmap.pipeline.index import build_index
from ood_heatmap.source_array import from_array
from ood_heatmap.sources import open_images, open_union


def test_an_unknown_source_lists_the_sets():
    with pytest.raises(UsageError, match=r"'nowhere'.*cifar10.*svhn"):
        open_images("nowhere")


@pytest.mark.parametrize("kind", ["folder", "npy", "npz"])
def test_size_and_time_of_the_file_of_each_image_are_known(tmp_path, kind):
    if kind == "folder":
        root = tmp_path / "set"
        paths = [root / "a" / "x.png", root / "b" / "y.png"]
        for path in paths:
            path.parent.mkdir(parents=True)
            path.write_bytes(b"-")
    else:
        root = tmp_path / f"set.{kind}"
        array = np.zeros((2, 3, 8, 8), np.uint8)
        np.save(root, array) if kind == "npy" else np.savez(root, images=array)
        paths = [root, root]
    for number, path in enumerate(paths):
        os.utime(path, ns=(0, 1_600_000_000_123_456_789 + number))
    wanted = [[path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
    stamps = open_images(str(root)).stamps
    assert stamps is not None
    assert stamps.tolist() == wanted
    assert from_array(np.zeros((2, 3, 8, 8), np.uint8)).stamps is None


def test_the_class_order_that_index_names_gives_the_accuracy_it_says(data, classifier, tmp_path):
    """Folders 2, 10, 30, 100 are the classifier's classes 0 to 3 in their natural order."""
    names = ["2", "10", "30", "100"]
    pictures = open_images(str(data / "id"))
    pixels = decode(pictures, np.arange(len(pictures)), classifier.config.transform).pixels
    prediction = classifier(torch.from_numpy(pixels)).logits.argmax(dim=1).tolist()
    for name in names:
        (tmp_path / "set" / name).mkdir(parents=True)
    for row, label in enumerate(prediction):
        shutil.copy(data / "id" / pictures.names[row], tmp_path / "set" / names[label])
    config = IndexConfig(batch_size=32)
    found = build_index(tmp_path / "a", open_images(str(tmp_path / "set")), classifier, config)
    assert found.results["accuracy"] < 0.9
    (warning,) = found.results["warnings"]
    assert "The natural order of the classes (2, 10, 30, ...) gives 100.00%" in warning
    assert warning.endswith("index the folders with --class-order natural.")
    images = open_images(str(tmp_path / "set"), class_order="natural")
    found = build_index(tmp_path / "b", images, classifier, config)
    assert found.results["accuracy"] == 1
    assert found.results["classes"] == names
    # a test set lists its folders in its own order, and is matched by name
    others = relabel(open_images(str(tmp_path / "set")), found.results["classes"])
    expected = [names.index(name.partition("/")[0]) for name in others.names]
    assert others.labels.tolist() == expected


def write_example_sources(root):
    """Write what docs/sources.md names, as it says that it looks on disk."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pixels = np.zeros((4, 8, 8, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels[0]).save(buffer, "jpeg")
    jpeg = buffer.getvalue()
    for name in (
        "photos/train/cat/1.jpg",
        "photos/train/cat/more/2.png",
        "photos/train/dog/1.jpg",
        "lists/textures/banded_0002.jpg",
        "lists/textures/dotted_0160.jpg",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(jpeg)
    table = "path,label\ntextures/banded_0002.jpg,banded\ntextures/dotted_0160.jpg,dotted\n"
    (root / "lists" / "textures.csv").write_text(table)
    (root / "shards").mkdir()
    for number in range(148):
        with tarfile.open(root / "shards" / f"train-{number:03}.tar", "w") as tar:
            for suffix, content in (("jpg", jpeg), ("cls", b"7")):
                member = tarfile.TarInfo(f"000000.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    (root / "arrays").mkdir()
    np.save(root / "arrays" / "noise.npy", pixels)
    rows = pa.table({"image": [{"bytes": jpeg, "path": None}] * 5, "label": [0] * 5})
    (root / "hub" / "data").mkdir(parents=True)
    for number in range(2):
        pq.write_table(rows, root / "hub" / "data" / f"train-{number:05}-of-00002.parquet")
    (root / "saved" / "validation").mkdir(parents=True)
    path = str(root / "saved" / "validation" / "data.arrow")
    with pa.OSFile(path, "wb") as file, pa.ipc.new_stream(file, rows.schema) as stream:
        stream.write_table(rows)
    state = {"_data_files": [{"filename": "data.arrow"}]}
    (root / "saved" / "validation" / "state.json").write_text(json.dumps(state))


def test_commands_of_the_sources_page_open_what_it_describes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_example_sources(tmp_path)
    (tmp_path / "runs" / "own").mkdir(parents=True)
    text = (Path(__file__).parent.parent / "docs" / "sources.md").read_text("utf-8")
    counts = {}
    for line in re.findall("^    ood-heatmap (.+)", text, re.MULTILINE):
        name, *arguments = shlex.split(line)
        with main.commands[name].make_context(name, arguments) as context:
            sources = context.params.get("id_sources") or context.params["ood_sources"]
        if "--download" not in line:
            counts[sources] = len(open_union(sources, need_labels=name == "index"))
    assert counts == {
        ("photos/train",): 3,
        ("lists/textures.csv",): 2,
        ("shards/train-{000..147}.tar",): 148,
        ("saved/validation",): 5,
        ("hub/data/train-*.parquet",): 10,
        ("arrays/noise.npy",): 4,
        ("saved/validation", "lists/textures.csv"): 7,
    }
