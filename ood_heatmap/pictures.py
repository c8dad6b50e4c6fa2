"""Pictures of photographs: the heatmap over the photo at its own size, alone or in a panel.

Drawn with Pillow: no display is needed, and nothing of matplotlib's state is used.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TypeAlias

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from ood_heatmap.errors import printable

# left, top, right and bottom in pixels of the upright photo, see Transform.seen_box
Box: TypeAlias = tuple[float, float, float, float]
_Font: TypeAlias = ImageFont.FreeTypeFont

# sides between which a photo keeps its size, in pixels
MIN_SIDE, MAX_SIDE = 224, 2000
# red, green, blue and opacity from the lowest to the highest pixel score; at most half opaque
_COLD = ((58, 76, 192, 0), (58, 76, 192, 90))
_WARM = ((255, 176, 0, 105), (240, 60, 0, 127), (200, 0, 60, 127))
_UNDECIDED = ((120, 60, 160, 0), (150, 30, 190, 127))
_STEPS = 256
# of the brightness outside what the classifier sees
_DIMMED = 0.35
_RED, _BLUE, _GREY = "#b3261e", "#2f4bb5", "#5f6368"


@dataclass(frozen=True)
class ColorScale:
    """Colours of pixel scores, the same for all images of a detector.

    Cold and faint up to the pixel threshold, warm above it: a colour is a decision. Without a
    threshold, one hue of neither kind.

    Args:
        color_max: Pixel score of the strongest colour.
        pixel_threshold: Pixel score above which a pixel is called OOD; NaN or infinite without
            decisions.
    """

    color_max: float
    pixel_threshold: float = math.nan

    @property
    def decides(self) -> bool:
        """Whether there is a threshold."""
        return math.isfinite(self.pixel_threshold)

    @property
    def top(self) -> float:
        """Pixel score of the strongest colour, above the threshold."""
        if self.decides and self.color_max <= self.pixel_threshold:
            # pixel scores are in [0, 1]
            return max(1.0, 2 * self.pixel_threshold)
        return self.color_max if self.color_max > 0 else 1.0

    def is_ood(self, pixel_score: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Return where pixels are called OOD, with the shape of ``pixel_score``."""
        if not self.decides:
            return np.zeros(pixel_score.shape, np.bool_)
        return pixel_score > self.pixel_threshold

    def colors(self, pixel_score: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Return colours and opacities, ``(..., 4)`` RGBA, of pixel scores ``(...)``."""
        position = _position(pixel_score, 0.0, self.pixel_threshold if self.decides else self.top)
        if self.decides:
            above = _STEPS + _position(pixel_score, self.pixel_threshold, self.top)
            position = np.where(self.is_ood(pixel_score), above, position)
        colors: NDArray[np.uint8] = self._table[position]
        return colors

    @cached_property
    def _table(self) -> NDArray[np.uint8]:
        ramps = (_COLD, _WARM) if self.decides else (_UNDECIDED,)
        return np.concatenate([_interpolate(ramp) for ramp in ramps])


def _position(values: NDArray[np.float32], start: float, stop: float) -> NDArray[np.int64]:
    """Return positions of values in a ramp from ``start`` to ``stop``, clipped to it."""
    share = (values - start) / (stop - start) if stop > start else np.ones_like(values)
    return (share.clip(0, 1) * (_STEPS - 1)).astype(np.int64)


def _interpolate(ramp: Sequence[tuple[int, int, int, int]]) -> NDArray[np.uint8]:
    """Return ``(_STEPS, 4)`` colours between those of a ramp."""
    steps = np.linspace(0, len(ramp) - 1, _STEPS)
    channels = [
        np.interp(steps, np.arange(len(ramp)), values) for values in zip(*ramp, strict=True)
    ]
    colors: NDArray[np.uint8] = np.stack(channels, axis=-1).round().astype(np.uint8)
    return colors


@dataclass(frozen=True)
class Decision:
    """What a panel says of an image.

    Args:
        score: Image score; larger is more OOD.
        prediction: Name of the predicted class.
        is_ood: The decision; None without one.
        threshold: Score above which an image is called OOD; NaN without a calibration, infinite if
            that has too few images.
        false_alarm: Share of ID images that may be called OOD.
        p_value: Share of held-out ID images that score at least as high; NaN without a calibration.
        confidence: Softmax probability of the predicted class, if it is to be shown.
    """

    score: float
    prediction: str
    is_ood: bool | None = None
    threshold: float = math.nan
    false_alarm: float = 0.05
    p_value: float = math.nan
    confidence: float | None = None

    def words(self) -> tuple[str, list[str]]:
        """Return the decision in words, and the lines that explain it."""
        level = f"{100 * self.false_alarm:g}%"
        if self.is_ood is None:
            title, reason = "no decision", "not calibrated: run `ood-heatmap evaluate` first"
            if math.isinf(self.threshold):
                reason = f"too few held-out ID images for a false-alarm level of {level}"
        else:
            title = "OOD: out of distribution" if self.is_ood else "ID: in distribution"
            reason = (
                f"{'above' if self.is_ood else 'not above'} the threshold {self.threshold:.4g}, "
                f"which at most {level} of ID images exceed"
            )
        sure = "" if self.confidence is None else f" ({100 * self.confidence:.0f}%)"
        lines = [f"predicted class: {self.prediction}{sure}", f"score {self.score:.4g}: {reason}"]
        if not math.isnan(self.p_value):
            lines.append(
                f"p-value {self.p_value:.3g}: share of held-out ID images that score as high"
            )
        return title, lines


@dataclass(frozen=True)
class Neighbour:
    """An ID training image near to a photo.

    Args:
        image: The image as the classifier saw it.
        distance: Distance between the features of the two images.
        label: Name of its class.
    """

    image: Image.Image
    distance: float
    label: str


def draw_overlay(
    photo: Image.Image, pixel_score: NDArray[np.float32], box: Box, scale: ColorScale
) -> Image.Image:
    """Draw a heatmap over a photo, at most half opaque, and the contour of what is called OOD.

    What the classifier does not see is dimmed.

    Args:
        photo: Upright RGB photo.
        pixel_score: ``(H, W)`` float32 in [0, 1], of any size.
        box: Part of the photo that the heatmap covers.
        scale: Colour scale of the detector.

    Returns:
        RGB of the photo's size. Photos with a longer side of more than ``MAX_SIDE`` pixels are
        reduced to that; smaller ones than ``MIN_SIDE`` are enlarged by a whole factor.
    """
    photo, box = _fit(photo, box)
    left, top, right, bottom = _whole_pixels(photo, box)
    canvas = Image.blend(Image.new("RGB", photo.size), photo, _DIMMED)
    if right > left and bottom > top:
        seen = photo.crop((left, top, right, bottom)).convert("RGBA")
        scores = _resize_scores(pixel_score, box, (left, top, right, bottom))
        seen.alpha_composite(Image.fromarray(scale.colors(scores)))
        _draw_contour(seen, scale.is_ood(scores), max(1, round(max(photo.size) / 500)))
        canvas.paste(seen.convert("RGB"), (left, top))
    return canvas


def _fit(photo: Image.Image, box: Box) -> tuple[Image.Image, Box]:
    """Resize a photo whose longer side is outside ``MIN_SIDE`` to ``MAX_SIDE``, and its box."""
    longer = max(photo.size)
    if longer > MAX_SIDE:
        size = tuple(max(1, round(side * MAX_SIDE / longer)) for side in photo.size)
        fitted = photo.resize((size[0], size[1]), Image.Resampling.LANCZOS, reducing_gap=2)
    elif longer < MIN_SIDE:
        factor = -(-MIN_SIDE // longer)
        size = tuple(factor * side for side in photo.size)
        fitted = photo.resize((size[0], size[1]), Image.Resampling.NEAREST)
    else:
        return photo, box
    x, y = fitted.width / photo.width, fitted.height / photo.height
    left, top, right, bottom = box
    return fitted, (left * x, top * y, right * x, bottom * y)


def _whole_pixels(photo: Image.Image, box: Box) -> tuple[int, int, int, int]:
    """Return the pixels of a photo inside a box."""
    left, top, right, bottom = map(round, box)
    return max(0, left), max(0, top), min(photo.width, right), min(photo.height, bottom)


def _resize_scores(
    pixel_score: NDArray[np.float32], box: Box, part: tuple[int, int, int, int]
) -> NDArray[np.float32]:
    """Return the pixel scores of a part of the box, one for each pixel of the photo.

    Bilinear: no pixel gets a higher score than its neighbours in the heatmap.
    """
    height, width = pixel_score.shape
    x, y = width / (box[2] - box[0]), height / (box[3] - box[1])
    source = (
        max(0.0, (part[0] - box[0]) * x),
        max(0.0, (part[1] - box[1]) * y),
        min(float(width), (part[2] - box[0]) * x),
        min(float(height), (part[3] - box[1]) * y),
    )
    size = (part[2] - part[0], part[3] - part[1])
    scores = Image.fromarray(np.ascontiguousarray(pixel_score, np.float32))
    return np.asarray(scores.resize(size, Image.Resampling.BILINEAR, source))


def _draw_contour(picture: Image.Image, is_ood: NDArray[np.bool_], width: int) -> None:
    """Draw a white line inside the edge of a mask, and a dark one outside."""
    # a margin closes the line where the mask reaches the edge of the picture
    mask = Image.fromarray(np.pad(is_ood, width).astype(np.uint8) * 255)
    # neither 0 nor 255 within this many pixels of an edge
    near_edge = np.asarray(mask.filter(ImageFilter.BoxBlur(width)))[width:-width, width:-width]
    inside, outside = is_ood & (near_edge < 255), ~is_ood & (near_edge > 0)
    picture.paste((255, 255, 255, 255), mask=Image.fromarray(inside.astype(np.uint8) * 255))
    picture.paste((0, 0, 0, 255), mask=Image.fromarray(outside.astype(np.uint8) * 110))


def draw_panel(
    photo: Image.Image,
    pixel_score: NDArray[np.float32],
    box: Box,
    scale: ColorScale,
    decision: Decision,
    neighbours: Sequence[Neighbour] = (),
) -> Image.Image:
    """Draw photo, overlay and nearest ID images in a row; below, the decision and a legend.

    Args:
        photo: Upright RGB photo.
        pixel_score: ``(H, W)`` float32 in [0, 1], of any size.
        box: Part of the photo that the heatmap covers.
        scale: Colour scale of the detector.
        decision: Text below the row.
        neighbours: Nearest ID images, nearest first.

    Returns:
        RGB; photo and overlay have the size of ``draw_overlay``.
    """
    fitted, fitted_box = _fit(photo, box)
    em = max(14, round(1.6 * max(fitted.size) / 60))
    is_cropped = _whole_pixels(fitted, fitted_box) != (0, 0, *fitted.size)
    overlay = draw_overlay(fitted, pixel_score, fitted_box, scale)
    row = [
        _with_title(fitted, ["photo", _format_size(photo, fitted)], em),
        _with_title(overlay, ["heatmap", "dark: not seen" if is_cropped else ""], em),
        *_neighbour_columns(neighbours, fitted.height, em),
    ]
    width = max(34 * em, sum(item.width for item in row) + (len(row) - 1) * em)
    text = _draw_text(decision, scale, width, em)
    canvas = Image.new("RGB", (width + 2 * em, row[0].height + text.height + 2 * em), "white")
    left = em
    for item in row:
        canvas.paste(item, (left, em))
        left += item.width + em
    canvas.paste(text, (em, em + row[0].height))
    return canvas


def _format_size(photo: Image.Image, fitted: Image.Image) -> str:
    """Return the size of a photo, and the one at which it is drawn if it differs."""
    size, drawn = (f"{picture.width:,} x {picture.height:,}" for picture in (photo, fitted))
    return size if photo.size == fitted.size else f"{size}, drawn at {drawn}"


def _with_title(picture: Image.Image, lines: Sequence[str], em: int) -> Image.Image:
    """Return a picture with lines of text above it."""
    line_height = 3 * em // 2
    canvas = Image.new("RGB", (picture.width, picture.height + len(lines) * line_height), "white")
    for number, line in enumerate(lines):
        place, color = (0, number * line_height), "black" if number == 0 else _GREY
        _draw_line(canvas, line, place, color, _load_font(em), picture.width)
    canvas.paste(picture, (0, len(lines) * line_height))
    return canvas


def _neighbour_columns(neighbours: Sequence[Neighbour], height: int, em: int) -> list[Image.Image]:
    """Return columns of ID images with class and distance: one image, or two above each other.

    Args:
        neighbours: The ID images, nearest first.
        height: Height of the columns without the title of the upper images, in pixels.
        em: Size of the text.
    """
    rows = min(2, len(neighbours))
    if rows == 0:
        return []
    title_height = 2 * (3 * em // 2)
    side = max(6 * em, (height - (rows - 1) * (title_height + em // 2)) // rows)
    num_columns = -(-len(neighbours) // rows)
    size = (side, title_height + height)
    columns = [Image.new("RGB", size, "white") for _ in range(num_columns)]
    for number, neighbour in enumerate(neighbours):
        is_small = neighbour.image.width < MIN_SIDE
        resample = Image.Resampling.NEAREST if is_small else Image.Resampling.BICUBIC
        title = printable(neighbour.label)
        if number == 0:
            whole = f"nearest ID: {title}"
            # the class is among the words below the row as well
            title = whole if _load_font(em).getlength(whole) <= side else "nearest ID"
        titles = [title, f"distance {neighbour.distance:.3g}"]
        picture = _with_title(neighbour.image.resize((side, side), resample), titles, em)
        row, column = divmod(number, num_columns)
        columns[column].paste(picture, (0, row * (picture.height + em // 2)))
    return columns


def _draw_text(decision: Decision, scale: ColorScale, width: int, em: int) -> Image.Image:
    """Draw the decision in words, and the legend of the colours."""
    title, lines = decision.words()
    color = {"O": _RED, "I": _BLUE}.get(title[0], _GREY)
    font, line_height = _load_font(em), 3 * em // 2
    # the title takes 13/4 em, the legend 13/4 em with its distance
    height = len(lines) * line_height + 26 * em // 4
    canvas = Image.new("RGB", (width, height), "white")
    top = em
    _draw_line(canvas, title, (0, top), color, _load_font(3 * em // 2, bold=True), width)
    top += 9 * em // 4
    for line in lines:
        _draw_line(canvas, line, (0, top), "black", font, width)
        top += line_height
    _draw_legend(canvas, scale, top + em // 2, em)
    return canvas


def _draw_legend(canvas: Image.Image, scale: ColorScale, top: int, em: int) -> None:
    """Draw the colours of pixel scores from 0 to the highest, over grey, with their threshold."""
    width, font = canvas.width, _load_font(em)
    half = width // 2
    scores = np.linspace(0, scale.top, width)
    if scale.decides:
        # half of the bar on either side, like the colours
        scores = np.interp(
            np.arange(width), [0, half, width - 1], [0, scale.pixel_threshold, scale.top]
        )
    bar = Image.new("RGBA", (width, em), (200, 200, 200, 255))
    colors = scale.colors(np.tile(scores.astype(np.float32), (em, 1)))
    bar.alpha_composite(Image.fromarray(colors))
    canvas.paste(bar.convert("RGB"), (0, top))
    draw = ImageDraw.Draw(canvas)
    top += em + em // 4
    draw.text((0, top), "0", "black", font)
    draw.text((width, top), f"{scale.top:.3g}", "black", font, anchor="ra")
    if scale.decides:
        draw.line((half, top - em - em // 4, half, top), "black", max(1, em // 8))
        text = f"pixel threshold {scale.pixel_threshold:.3g}; above it OOD, outlined"
    else:
        text = "heatmap, no threshold"
    draw.text((half, top), text, "black", font, anchor="ma")


@cache
def _load_font(size: int, *, bold: bool = False) -> _Font:
    """Load the font shipped with matplotlib, which covers many scripts."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf", name), size)


def _draw_line(
    canvas: Image.Image, text: str, place: tuple[int, int], color: str, font: _Font, width: int
) -> None:
    ImageDraw.Draw(canvas).text(place, _truncate(text, font, width), color, font)


def _truncate(text: str, font: _Font, width: int) -> str:
    """Truncate text to one line of at most ``width`` pixels."""
    text = printable(text)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"
