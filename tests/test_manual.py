"""The manual: commands have their options, snippets run as printed; `make docs` has the links."""

import json
import re
import runpy
from http.server import ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from unittest.mock import create_autospec
from urllib.error import HTTPError
from urllib.request import urlopen

import numpy as np
import pytest
import torch
import torchvision
from click.testing import CliRunner
from PIL import Image

import ood_heatmap
from ood_heatmap.classifier import load_classifier
from ood_heatmap.cli import main
from ood_heatmap.cli_stages import plan

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
# a command, or a snippet of Python
_STEP = re.compile(r"^    ood-heatmap ([^\n]+)$|^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_links_of_the_readme_lead_to_files():
    # `make docs` finds broken links of the manual
    links = re.findall(r"\]\(([^)\s]+)\)", (ROOT / "README.md").read_text("utf-8"))
    inside = [link.partition("#")[0] for link in links if "://" not in link]
    assert "docs/photographs.md" in inside
    assert [link for link in inside if not (ROOT / link).is_file()] == []


def test_the_notebook_is_kept_without_outputs():
    # `make docs` runs it
    notebook = json.loads((DOCS / "notebook.ipynb").read_text("utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) > 5
    assert [cell["source"] for cell in cells if cell["outputs"] or cell["execution_count"]] == []


def test_commands_are_described_with_options_that_they_have():
    text = (DOCS / "commands.md").read_text("utf-8")
    parts = re.split(r"^### `(\w+)`$", text, flags=re.MULTILINE)
    described = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert set(described) == set(main.commands)
    for name, section in described.items():
        known = [main.commands[name]]
        if name == "plan":
            known = list(plan.commands.values())
        flags = {flag for command in known for option in command.params for flag in option.opts}
        assert set(re.findall(r"--[a-z][a-z-]*", section)) <= flags, name


def test_the_model_file_of_the_manual_is_one_that_index_takes(tmp_path):
    text = (DOCS / "photographs.md").read_text("utf-8")
    (model,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    (tmp_path / "model.py").write_text(model)
    classifier = load_classifier(f"{tmp_path}/model.py:make_model", num_classes=3, size=64)
    assert classifier.num_classes == 3


@pytest.fixture
def workplace(run, tmp_path, monkeypatch) -> Path:
    """Return a folder with the files that the page on Python names, as the working directory."""
    (tmp_path / "runs").mkdir()
    run.rename(tmp_path / "runs" / "c10")
    for name in ("a", "b"):
        folder = tmp_path / "photos" / "test" / name
        folder.mkdir(parents=True)
        Image.new("RGB", (40, 30), "teal").save(folder / "000.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_snippets_on_python_run_as_printed(workplace, monkeypatch):
    for name in ("build_index", "build_targets", "train", "evaluate"):
        # the stages have their own tests: here their arguments are checked
        checked = create_autospec(getattr(ood_heatmap, name))
        monkeypatch.setattr(ood_heatmap, name, checked, raising=False)
    monkeypatch.setattr(torchvision.models, "resnet18", lambda weights: torch.nn.Identity())
    servers: list[ThreadingHTTPServer] = []
    serve = ThreadingHTTPServer.serve_forever

    def start(server: ThreadingHTTPServer) -> None:
        servers.append(server)
        Thread(target=serve, args=[server], daemon=True).start()

    monkeypatch.setattr(ThreadingHTTPServer, "serve_forever", start)
    # any free port
    text = (
        (DOCS / "python.md").read_text("utf-8").replace('("127.0.0.1", 8000)', '("127.0.0.1", 0)')
    )
    scope: dict[str, Any] = {}
    for command, snippet in _STEP.findall(text):
        if command:
            done = CliRunner().invoke(main, command.split())
            assert done.exit_code == 0, done.output
        else:
            exec(compile(snippet, "python.md", "exec"), scope)
    with Image.open(workplace / "overlay.png") as overlay:
        # small images are enlarged by a whole factor
        assert overlay.width % 40 == overlay.height % 30 == 0
    assert scope["strict"].false_alarm == 0.01
    for name in ("build_index", "build_targets", "train", "evaluate"):
        assert getattr(ood_heatmap, name).call_count == 1
    (server,) = servers
    with server:
        check_service(server, workplace / "photos" / "test" / "a" / "000.png", scope["detector"])
        server.shutdown()


def check_service(server, photo, detector):
    """Post a photo and something else."""
    url = f"http://127.0.0.1:{server.server_address[1]}"
    with urlopen(url, photo.read_bytes()) as answer:
        assert json.load(answer) == {**detector(str(photo))[0].to_dict(), "image": None}
    with pytest.raises(HTTPError, match="400: cannot identify image file") as refused:
        urlopen(url, b"no photo")
    refused.value.close()


def _opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def test_the_pictures_of_the_manual_are_the_panels_of_predict(workplace):
    photos = ["photos/test/a/000.png", "photos/test/b/001.png"]
    Image.new("RGB", (90, 60), "tan").save(photos[1])
    script = runpy.run_path(str(DOCS / "images" / "make.py"))
    done = CliRunner().invoke(script["main"], ["runs/c10", *photos, "--out", "panels.jpg"])
    assert done.exit_code == 0, done.output
    arguments = ["predict", "runs/c10", *photos, "--out", "results", "--nearest", "1"]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    top, bottom = (_opened(path) for path in sorted(Path("results").rglob("*.png")))
    drawn = _opened(Path("panels.jpg"))
    assert drawn.size == (max(top.width, bottom.width), top.height + bottom.height)
    below = drawn.crop((0, top.height, bottom.width, drawn.height))
    difference = np.abs(np.asarray(below, np.float32) - np.asarray(bottom, np.float32))
    # a JPEG of it
    assert difference.mean() < 4
