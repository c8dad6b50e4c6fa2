"""The manual: pages and links exist, commands have their options, snippets run as printed."""

import re
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import pytest
import torch
import torchvision
import yaml
from click.testing import CliRunner
from PIL import Image

import ood_heatmap
from ood_heatmap.cli import main
from ood_heatmap.cli_stages import plan

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
_LINK = re.compile(r"\]\(([^)\s]+)\)")
# a command, or a snippet of Python
_STEP = re.compile(r"^    ood-heatmap ([^\n]+)$|^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def pages_of(nav: Any) -> list[str]:
    """Return the files that a navigation names."""
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav
    return [name for part in parts for name in pages_of(part)]


def anchors(page: Path) -> set[str]:
    """Return the anchors of the headings of a page, as Python-Markdown makes them."""
    text = _FENCED.sub("", page.read_text("utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    plain = (re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings)
    return {re.sub(r"[-\s]+", "-", heading) for heading in plain}


def test_the_navigation_has_pages_once_that_exist():
    nav = pages_of(yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))["nav"])
    # `make docs` finds pages that are missing in it
    assert len(nav) == len(set(nav))
    assert set(nav) <= {page.name for page in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_the_manual_lead_to_pages_and_headings(page):
    for link in _LINK.findall(_FENCED.sub("", page.read_text("utf-8"))):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = DOCS / name if name else page
        # a page outside docs/ is not in the site
        assert target.resolve().is_relative_to(DOCS), link
        assert target.is_file(), link
        if anchor:
            assert anchor in anchors(target), link


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
    text = (DOCS / "python.md").read_text("utf-8")
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
