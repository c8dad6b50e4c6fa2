"""Pictures.

Heatmaps over images on one colour scale, histograms, ROC curves, and a sheet of examples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from sklearn.metrics import roc_curve

from ood_heatmap.cache.files import replacing

COLORS = "inferno"
Scores = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Card:
    """One image of the sheet and of the report's gallery.

    Args:
        set_name: Where the image is from.
        name: Its file name or row.
        image: ``(3, H, W)`` uint8.
        strength: ``(H, W)`` float32 in [0, 1].
        nearest: ``(3, H, W)`` uint8, its nearest ID image.
        score: Larger is more OOD.
        distance: Of the features, to the nearest ID image.
        prediction: Name of the predicted class.
        p_value: Share of ID images that score at least as high, where it is known.
    """

    set_name: str
    name: str
    image: NDArray[np.uint8]
    strength: NDArray[np.float32]
    nearest: NDArray[np.uint8]
    score: float
    distance: float
    prediction: str
    p_value: float | None


def save(figure: Figure, path: Path) -> None:
    """Write a PNG whole; the same figure gives the same bytes."""
    with replacing(path) as scratch:
        figure.savefig(
            scratch, format="png", dpi=120, bbox_inches="tight", metadata={"Software": None}
        )


def histograms(id_scores: NDArray[np.float32], ood_scores: Scores) -> Figure:
    """Return the distribution of the heatmap score for the ID set and each OOD set."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    everything = np.concatenate([id_scores, *ood_scores.values()])
    bins = np.linspace(0, float(np.quantile(everything, 0.995)) or 1.0, 60).tolist()
    axes.hist(np.clip(id_scores, 0, bins[-1]), bins, density=True, color="0.75", label="ID")
    for name, scores in ood_scores.items():
        axes.hist(
            np.clip(scores, 0, bins[-1]),
            bins,
            density=True,
            histtype="step",
            linewidth=1.6,
            label=name,
        )
    axes.set(xlabel="heatmap score (larger is more OOD)", ylabel="density")
    axes.legend(frameon=False)
    return figure


def roc_points(
    id_scores: NDArray[np.float32], ood_scores: NDArray[np.float32], count: int = 300
) -> tuple[list[float], list[float]]:
    """Return ``count`` or fewer points of a ROC curve, (false, true positive rate), OOD positive.

    Some at even steps along the curve, its ends among them.
    """
    is_ood = np.repeat([0, 1], [len(id_scores), len(ood_scores)])
    fpr, tpr, _ = roc_curve(is_ood, np.r_[id_scores, ood_scores])
    length = fpr + tpr  # from 0 to 2, never falling
    steps = np.searchsorted(length, np.linspace(0, length[-1], count))
    kept = np.unique(np.r_[steps.clip(0, len(length) - 1), len(length) - 1])
    return fpr[kept].tolist(), tpr[kept].tolist()


def roc_curves(id_scores: Scores, ood_scores: Mapping[str, Scores]) -> Figure:
    """Return a panel for each OOD set, a curve for each method; OOD is the positive class."""
    figure = Figure(figsize=(3.6 * len(ood_scores), 3.8), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(ood_scores)))
    for axes, (name, scores) in zip(panels, ood_scores.items(), strict=True):
        for method, values in scores.items():
            fpr, tpr = roc_points(id_scores[method], values)
            wide = 2.2 if method == "heatmap" else 1.0
            axes.plot(fpr, tpr, label=method, linewidth=wide, zorder=3 if wide > 2 else 2)
        axes.plot([0, 1], [0, 1], color="0.8", linewidth=0.8)
        axes.set(title=name, xlabel="false positive rate", aspect="equal")
    panels[0].set(ylabel="true positive rate (OOD found)")
    panels[-1].legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def sheet(examples: Sequence[Card], color_max: float, columns: int = 2) -> Figure:
    """Return image, heatmap and nearest ID image of each example, all heatmaps on one colour
    scale."""
    rows = -(-len(examples) // columns)
    figure = Figure(figsize=(4.6 * columns, 1.45 * rows + 0.6), layout="constrained")
    panels = np.atleast_2d(figure.subplots(rows, 3 * columns))
    for axes in panels.flat:
        axes.set_axis_off()
    drawn: Any = None
    for number, example in enumerate(examples):
        # down the first column, then the next: a set stays together
        place = panels[number % rows, 3 * (number // rows) : 3 * (number // rows) + 3]
        place[0].imshow(example.image.transpose(1, 2, 0))
        drawn = place[1].imshow(example.strength, cmap=COLORS, vmin=0, vmax=color_max)
        place[2].imshow(example.nearest.transpose(1, 2, 0))
        place[0].set_title(example.set_name, fontsize=8)
        place[1].set_title(f"score {example.score:.3f}", fontsize=8)
        place[2].set_title(f"nearest {example.prediction}, {example.distance:.1f}", fontsize=8)
    figure.colorbar(drawn, ax=panels, shrink=0.4, label="heatmap", location="right")
    return figure


def overlay(
    image: NDArray[np.uint8], strength: NDArray[np.float32], color_max: float, size: int = 224
) -> Image.Image:
    """Return an image with its heatmap laid over it.

    Where the heatmap is 0 the image shows through.

    Args:
        image: ``(3, H, W)`` uint8.
        strength: ``(H, W)`` in [0, 1].
        color_max: Top of the colour scale, the same for every image of a decoder.
        size: The picture has at least this many pixels a side, a whole number for each of the
            image's.
    """
    picture = Image.fromarray(mixed(image.transpose(1, 2, 0), np.clip(strength / color_max, 0, 1)))
    factor = max(1, -(-size // picture.width))
    return picture.resize(
        (factor * picture.width, factor * picture.height), Image.Resampling.NEAREST
    )


def mixed(image: NDArray[np.uint8], share: NDArray[np.floating[Any]]) -> NDArray[np.uint8]:
    """Lay colours over ``(H, W, 3)`` uint8, the denser the larger ``(H, W)`` shares in [0, 1]."""
    colors = colormaps[COLORS](share)[..., :3] * 255
    opacity = 0.75 * share[..., None]
    picture: NDArray[np.uint8] = ((1 - opacity) * image + opacity * colors).round().astype(np.uint8)
    return picture


def with_legend(picture: Image.Image, lines: Sequence[str], color_max: float) -> Image.Image:
    """Return an overlay with lines of text and its colour scale below it.

    The colour bar lies over grey as the heatmap lies over the image, so it shows the same colours.
    """
    em = max(12, picture.width // 18)
    font, margin = legend_font(em), em // 2
    inner = picture.width - 2 * margin
    canvas = Image.new("RGB", (picture.width, picture.height + (len(lines) + 3) * em * 4 // 3))
    canvas.paste("white", (0, picture.height, *canvas.size))
    canvas.paste(picture)
    draw = ImageDraw.Draw(canvas)
    top = picture.height + margin
    for line in lines:
        draw.text((margin, top), shortened(line, font, inner), "black", font)
        top += em * 4 // 3
    grey, ramp = np.full((em, inner, 3), 160, np.uint8), np.linspace(0, 1, inner)
    canvas.paste(Image.fromarray(mixed(grey, np.tile(ramp, (em, 1)))), (margin, top + em // 4))
    top += em * 3 // 2
    draw.text((margin, top), "0", "black", font)
    draw.text((canvas.width // 2, top), "heatmap", "black", font, anchor="ma")
    draw.text((canvas.width - margin, top), f"{color_max:.3g}", "black", font, anchor="ra")
    return canvas


@cache
def legend_font(size: int) -> ImageFont.FreeTypeFont:
    """Return the font that comes with matplotlib: it has the letters of many alphabets."""
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), size)


def shortened(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Return a text that is at most ``width`` pixels wide."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"
