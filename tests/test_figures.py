"""Figures: text is drawn literally, nothing touches a notebook's backend."""

import io
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.patches import Rectangle
from PIL import Image
from torch.nn.functional import interpolate

from ood_heatmap.errors import printable
from ood_heatmap.figures import (
    Card,
    example_grid,
    resize_scores,
    roc_curves,
    roc_points,
    score_histograms,
    to_png,
)

NAMES = [r"$\foo{$", "a\nb", "\x07bell", "\udcff", "猫", "_hidden", "a$b$c"]


def make_card(name: str) -> Card:
    image, pixel_score = np.zeros((3, 8, 8), np.uint8), np.zeros((8, 8), np.float32)
    return Card(name, name, image, pixel_score, image, 0.1, 1.0, name, None)


def title_png(title: str) -> bytes:
    figure = Figure(figsize=(3, 1))
    figure.subplots().set_title(title)
    return to_png(figure)


def test_the_score_is_named_by_its_label():
    scores = np.array([0.0, 1.0], np.float32)
    (axes,) = score_histograms(scores, {"far": scores}, "combined").axes
    assert axes.get_xlabel().startswith("combined score")
    methods = {"combined": scores, "heatmap": scores}
    (axes,) = roc_curves(methods, {"far": methods}, "combined").axes
    combined, heatmap = axes.get_lines()[:2]
    assert combined.get_linewidth() > heatmap.get_linewidth()


@pytest.mark.parametrize("name", NAMES)
def test_any_class_name_can_be_drawn(name):
    figure = example_grid([make_card(name), make_card("cat")], 0.5)
    assert Image.open(io.BytesIO(to_png(figure))).width > 100


def test_no_tick_of_the_example_grid_is_measured():
    """They are not drawn, and took half of the time of the figure."""
    *panels, colorbar = example_grid([make_card("cat"), make_card("dog")], 0.5).axes
    assert len(panels) == 6
    assert [len(axes.get_xticks()) + len(axes.get_yticks()) for axes in panels] == [0] * 6
    assert len(colorbar.get_yticks()) > 1


def test_a_dollar_sign_is_no_mathematics():
    assert title_png("$x$") != title_png("x")
    assert title_png("a\nb") == title_png(r"a\nb")


def test_the_same_figure_gives_the_same_bytes():
    scores = np.linspace(0, 1, 50, dtype=np.float32)
    assert to_png(score_histograms(scores, {"far": scores})) == to_png(
        score_histograms(scores, {"far": scores})
    )


def test_every_set_is_in_the_legend_of_the_histograms():
    scores = np.linspace(0, 1, 50, dtype=np.float32)
    figure = score_histograms(scores, {"_far": scores, "ID": scores})
    (legend,) = figure.findobj(Legend)
    assert isinstance(legend, Legend)
    assert [text.get_text() for text in legend.get_texts()] == ["ID", "_far", "ID"]


def test_histograms_show_negative_scores_and_the_threshold():
    scores = np.random.default_rng(0).normal(-5, 1, 2000).astype(np.float32)
    figure = score_histograms(scores, {"far": scores + 3}, threshold=-3.5)
    (axes,) = figure.axes
    bars = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    edges = np.array([[bar.get_x(), bar.get_x() + bar.get_width()] for bar in bars])
    heights = np.array([bar.get_height() for bar in bars])
    assert sum(heights * np.ptp(edges, axis=1)) == pytest.approx(1)
    counts = heights * np.ptp(edges, axis=1) * len(scores)
    inner = slice(1, -1)
    wanted = [((scores >= low) & (scores < high)).sum() for low, high in edges[inner]]
    np.testing.assert_allclose(counts[inner], wanted, atol=1)
    (line,) = axes.lines
    assert set(np.asarray(line.get_xdata())) == {-3.5}
    assert not score_histograms(scores, {}, threshold=math.inf).axes[0].lines


def test_each_method_has_a_colour_of_its_own():
    scores = {f"method {number}": np.arange(5, dtype=np.float32) for number in range(17)}
    figure = roc_curves(scores, {"far": scores, "near": scores})
    for axes in figure.axes:
        colors = {
            to_hex(line.get_color()) for line in axes.lines if str(line.get_label())[0] == "m"
        }
        assert len(colors) == 17


def test_no_legend_searches_for_the_best_place(monkeypatch):
    def search(*_, **__):
        raise AssertionError("a search takes long, and warns if it does")

    monkeypatch.setattr(Legend, "_find_best_position", search)
    scores = np.random.default_rng(0).random(50, np.float32)
    to_png(score_histograms(scores, {"far": scores}))
    to_png(roc_curves({"heatmap": scores}, {"far": {"heatmap": scores}}))


def test_roc_points_keep_both_ends():
    rng = np.random.default_rng(0)
    fpr, tpr = roc_points(
        rng.random(5000, np.float32), rng.random(5000, np.float32) + 0.2, count=50
    )
    assert len(fpr) <= 51
    assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1)
    assert (np.diff(fpr) >= 0).all()
    assert (np.diff(tpr) >= 0).all()


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("naïve 猫 $x$", "naïve 猫 $x$"),
        ("a\nb\tc\x1b[2J", r"a\nb\tc\x1b[2J"),
        ("\udcff\u2028", r"\udcff\u2028"),
    ],
)
def test_printable_text_is_one_line(text, wanted):
    assert printable(text) == wanted


def test_importing_the_package_leaves_the_matplotlib_backend_alone():
    code = """
import pkgutil, importlib, sys
import ood_heatmap
for module in pkgutil.walk_packages(ood_heatmap.__path__, "ood_heatmap."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
for folder in ("cache", "pipeline"):
    package = importlib.import_module(f"ood_heatmap.{folder}")
    for module in pkgutil.iter_modules(package.__path__, f"ood_heatmap.{folder}."):
        importlib.import_module(module.name)
from ood_heatmap.figures import score_histograms, to_png
import numpy as np
to_png(score_histograms(np.zeros(2), {}))
assert "ood_heatmap.pipeline.evaluate" in sys.modules
assert "matplotlib.pyplot" not in sys.modules
import matplotlib
print(matplotlib.get_backend())
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={"MPLBACKEND": "svg", "PATH": "", "HOME": "/nonexistent"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == "svg"


def test_a_smaller_heatmap_is_interpolated_to_the_image():
    coarse = np.random.default_rng(0).random((7, 7), dtype=np.float32)
    wanted = interpolate(torch.from_numpy(coarse)[None, None], (56, 56), mode="bilinear")[0, 0]
    np.testing.assert_allclose(resize_scores(coarse, 56), wanted, atol=1e-6)
    np.testing.assert_array_equal(resize_scores(coarse, 7), coarse)
