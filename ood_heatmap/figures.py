"""Figures of an evaluation: histograms, ROC curves, example grids.

Figures are returned, not written. pyplot is not used, so that importing this module does not change
the backend of a notebook.
"""

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.text import Text
from numpy.typing import NDArray
from PIL import Image

from ood_heatmap.errors import printable

COLORMAP = "inferno"
# for panels without axes: the layout would measure the ticks of each all the same
NO_TICKS: dict[str, Any] = {"xticks": [], "yticks": []}
_Scores = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Card:
    """One image of the example grid and of the report's gallery.

    Args:
        set_name: Name of the image set.
        name: File name or row of the image.
        image: ``(3, H, W)`` uint8.
        pixel_score: ``(H, W)`` float32 in [0, 1].
        nearest: ``(3, H, W)`` uint8 nearest ID image.
        score: Image score; larger is more OOD.
        distance: Euclidean distance between the features of the two images.
        prediction: Name of the predicted class.
        p_value: Share of ID images that score at least as high; None without a calibration.
    """

    set_name: str
    name: str
    image: NDArray[np.uint8]
    pixel_score: NDArray[np.float32]
    nearest: NDArray[np.uint8]
    score: float
    distance: float
    prediction: str
    p_value: float | None


def to_png(figure: Figure) -> bytes:
    """Render a figure as PNG, deterministically.

    Names are drawn literally: matplotlib would parse a ``$`` in a class name as math, and fail on
    names that are not UTF-8.
    """
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        text.set_parse_math(False)
        text.set_text(printable(text.get_text()))
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # the font lacks some scripts; those names show as boxes here but are legible in the report
        warnings.filterwarnings("ignore", r"Glyph .* missing")
        figure.savefig(
            buffer, format="png", dpi=120, bbox_inches="tight", metadata={"Software": None}
        )
    return buffer.getvalue()


def score_histograms(
    id_scores: NDArray[np.float32],
    ood_scores: _Scores,
    label: str = "heatmap",
    threshold: float | None = None,
) -> Figure:
    """Plot the distribution of a score on the ID set and on each OOD set.

    Args:
        id_scores: ``(B,)`` scores of the ID set; larger is more OOD.
        ood_scores: Likewise of each OOD set, by name.
        label: Label of the score.
        threshold: Score above which an image is called OOD, drawn as a line.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    all_scores = np.concatenate([id_scores, *ood_scores.values()])
    low, high = np.quantile(all_scores, [0.005, 0.995]).tolist()
    bins = np.linspace(low, high if high > low else low + 1, 60).tolist()
    handles: list[Any] = []
    for number, scores in enumerate([id_scores, *ood_scores.values()]):
        style: Any = {"color": "0.75"}
        if number > 0:
            style = {"histtype": "step", "linewidth": 1.6}
        patches: Any
        _, _, patches = axes.hist(
            # in float32 the clipped values would be rounded out of the last bin
            np.clip(scores.astype(np.float64), low, bins[-1]),
            bins,
            density=True,
            **style,
        )
        handles.append(patches[0])
    if threshold is not None and math.isfinite(threshold):
        axes.axvline(min(max(threshold, low), bins[-1]), color="black", linewidth=0.8)
    axes.set(
        xlabel=f"{label} score, larger is more OOD (outermost bars: all beyond; line: threshold)",
        ylabel="density",
    )
    # explicit handles: matplotlib drops labels that begin with an underscore
    # at a fixed place: matplotlib warns when its search for the best one takes a second
    axes.legend(handles, ["ID", *ood_scores], frameon=False, loc="upper right")
    return figure


def roc_points(
    id_scores: NDArray[np.float32], ood_scores: NDArray[np.float32], count: int = 300
) -> tuple[list[float], list[float]]:
    """Return at most ``count`` points of a ROC curve, evenly spaced along it, both ends included.

    Returns:
        False positive rates and true positive rates; OOD is the positive class.
    """
    from sklearn.metrics import roc_curve

    is_ood = np.repeat([0, 1], [len(id_scores), len(ood_scores)])
    fpr, tpr, _ = roc_curve(is_ood, np.r_[id_scores, ood_scores])
    # monotonically increasing from 0 to 2
    length = fpr + tpr
    steps = np.searchsorted(length, np.linspace(0, length[-1], count))
    kept = np.unique(np.r_[steps.clip(0, len(length) - 1), len(length) - 1])
    return fpr[kept].tolist(), tpr[kept].tolist()


def roc_curves(
    id_scores: _Scores, ood_scores: Mapping[str, _Scores], label: str = "heatmap"
) -> Figure:
    """Plot one panel per OOD set with one curve per method, that of ``label`` thicker.

    OOD is the positive class.
    """
    figure = Figure(figsize=(3.6 * len(ood_scores), 3.8), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(ood_scores)))
    for axes, (name, scores) in zip(panels, ood_scores.items(), strict=True):
        # the default cycle repeats after 10 methods
        axes.set_prop_cycle(color=colormaps["tab20"](range(20)))
        for method, values in scores.items():
            fpr, tpr = roc_points(id_scores[method], values)
            width = 2.2 if method == label else 1.0
            axes.plot(fpr, tpr, label=method, linewidth=width, zorder=3 if width > 2 else 2)
        axes.plot([0, 1], [0, 1], color="0.8", linewidth=0.8)
        axes.set(title=name, xlabel="false positive rate", aspect="equal")
    panels[0].set(ylabel="true positive rate (OOD detected)")
    panels[-1].legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def example_grid(examples: Sequence[Card], color_max: float, columns: int = 2) -> Figure:
    """Plot image, heatmap and nearest ID image of each example on a shared colour scale."""
    rows = -(-len(examples) // columns)
    figure = Figure(figsize=(4.6 * columns, 1.45 * rows + 0.6), layout="constrained")
    panels = np.atleast_2d(figure.subplots(rows, 3 * columns, subplot_kw=NO_TICKS))
    for axes in panels.flat:
        axes.set_axis_off()
    heatmap: Any = None
    for number, example in enumerate(examples):
        # column-major order keeps the examples of a set together
        first = 3 * (number // rows)
        left, middle, right = panels[number % rows, first : first + 3]
        left.imshow(example.image.transpose(1, 2, 0))
        heatmap = middle.imshow(example.pixel_score, cmap=COLORMAP, vmin=0, vmax=color_max)
        right.imshow(example.nearest.transpose(1, 2, 0))
        left.set_title(example.set_name, fontsize=8)
        middle.set_title(f"score {example.score:.3f}", fontsize=8)
        right.set_title(f"nearest {example.prediction}, {example.distance:.1f}", fontsize=8)
    figure.colorbar(heatmap, ax=panels, shrink=0.4, label="heatmap", location="right")
    return figure


def resize_scores(pixel_score: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """Interpolate pixel scores ``(h, h)`` bilinearly to ``(size, size)``; unchanged if equal."""
    scores = Image.fromarray(np.ascontiguousarray(pixel_score, np.float32))
    resized: NDArray[np.float32] = np.asarray(
        scores.resize((size, size), Image.Resampling.BILINEAR)
    )
    return resized
