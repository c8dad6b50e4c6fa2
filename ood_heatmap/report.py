"""Render the report of an evaluation: a self-contained HTML page that needs no network.

``report_content`` draws what takes the images and returns JSON that is kept in the evaluation;
``render_report`` fills the template with it, so that the page can be drawn again without images.
The template escapes all text. Its script draws plots and controls from the embedded JSON.
"""

import base64
import hashlib
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image

from ood_heatmap.errors import printable
from ood_heatmap.figures import Card
from ood_heatmap.pictures import ColorScale
from ood_heatmap.report_tables import (
    ALL_METRICS,
    full_table,
    localization_table,
    method_label,
    summary_table,
)
from ood_heatmap.verdict import default_method, verdict

ID = "id"
# longer sides of pictures in pixels: the first with which the page stays small
_PICTURE_SIDES = (256, 192, 128, 96)
# of all pictures, in characters of base64
_MAX_PICTURES = 8_000_000
# minimum number of steps; the step is rounded down to a power of ten
_SLIDER_STEPS = 1000

_Curves = Mapping[str, tuple[list[float], list[float]]]


@dataclass(frozen=True)
class GalleryImage:
    """One image of the gallery.

    Args:
        card: Names, scores and nearest ID image.
        photo: The upright photo.
        overlay: The heatmap over the photo, see ``pictures.draw_overlay``.
        label: Name of its class; "" if it is unknown or not one of the classifier's.
    """

    card: Card
    photo: Image.Image
    overlay: Image.Image
    label: str = ""


def report_content(
    *,
    scores: Mapping[str, NDArray[np.float32]],
    roc: Mapping[str, _Curves],
    images: Sequence[GalleryImage],
    scale: ColorScale,
    threshold: float | None,
    classes: Sequence[str] = (),
    warnings: Sequence[str] = (),
) -> dict[str, Any]:
    """Return what the page shows beside the tables, deterministically, as JSON.

    Args:
        scores: All default scores by set; the set ``id`` is in-distribution.
        roc: False and true positive rates by set and label of the method; OOD is the positive
            class.
        images: The gallery, in initial order.
        scale: Colour scale of the overlays.
        threshold: Initial position of the slider; None for the 95th percentile of the ID scores.
        classes: Names of the ID classes; empty when unknown.
        warnings: Warnings of all stages, shown at the top.

    Raises:
        ValueError: The set ``id`` is missing, or a set has no scores or non-finite ones.
    """
    _check_scores(scores)
    start = float(np.quantile(scores[ID], 0.95) if threshold is None else threshold)
    low, high, step = _slider_range(scores, start)
    return {
        "slider": {"start": start, "low": low, "high": high, "step": step},
        "is_calibrated": threshold is not None,
        "classes": [printable(name) for name in classes],
        "warnings": list(warnings),
        "scale": {
            "picture": _encode(_draw_scale(scale)),
            "top": scale.top,
            "threshold": scale.pixel_threshold if scale.decides else None,
        },
        "sets": [
            {"name": printable(name), "id": name == ID, "scores": _encode_scores(scores[name])}
            for name in [ID, *(name for name in scores if name != ID)]
        ],
        "roc": [_roc_data(name, curves) for name, curves in roc.items()],
        "cards": _encode_gallery(images),
    }


def render_report(
    content: Mapping[str, Any],
    metrics: Mapping[str, Any],
    *,
    title: str,
    facts: Sequence[tuple[str, str]] = (),
    commands: Sequence[str] = (),
    localization: Mapping[str, Any] | None = None,
) -> str:
    """Render the page.

    Args:
        content: Of ``report_content``.
        metrics: Content of ``metrics.json``: ``table`` has one row per method and set, values in
            [0, 1]. A row may have ``intervals``, ``{metric: [low, high]}``. ``decisions``, if
            present, has the number of held-out images behind the threshold.
        title: Heading of the page.
        facts: What the page is about: names and values, in order.
        commands: The command lines of the run.
        localization: Content of ``localization.json``, if it was measured.
    """
    environment = _environment()
    script = _source("report.js")
    main = method_label(default_method(metrics), metrics)
    data = {
        **content["slider"],
        "sets": content["sets"],
        "roc": content["roc"],
        "methods": sorted(
            _unique(curve["method"] for panel in content["roc"] for curve in panel["curves"]),
            key=lambda method: method != printable(main),
        ),
        "main": printable(main),
        "cards": [
            {key: value for key, value in card.items() if not isinstance(value, dict)}
            for card in content["cards"]
        ],
        "title": printable(title),
    }
    return environment.get_template("report.html").render(
        title=title,
        verdict=verdict(metrics),
        facts=facts,
        commands=commands,
        content=content,
        main=main,
        accuracy=metrics.get("id_accuracy"),
        counts=[(one["name"], _num_scores(one["scores"])) for one in content["sets"]],
        all_metrics=ALL_METRICS,
        summary=summary_table(metrics),
        groups=full_table(metrics),
        localization=localization_table(localization) if localization else None,
        origin=_format_origin(content["is_calibrated"], metrics.get("decisions")),
        card_sets=_unique(card["set"] for card in content["cards"]),
        style=_source("report.css"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii"),
        data=data,
    )


def _environment() -> Environment:
    """Return the environment of the template: text is escaped, and stays on one line."""
    environment = Environment(
        loader=PackageLoader("ood_heatmap"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    return environment


def _source(name: str) -> Markup:
    """Return style or script of the page."""
    return Markup(files("ood_heatmap").joinpath(f"templates/{name}").read_text("utf-8"))


def _format_origin(is_calibrated: bool, decisions: Mapping[str, Any] | None) -> str:
    """Describe the initial position of the slider, and why there is no threshold, if so."""
    if is_calibrated:
        return "the threshold of this evaluation"
    origin = "the 95th percentile of the ID scores"
    if decisions is None:
        return origin
    return (
        f"{origin}: this evaluation has no threshold, {decisions['num_calibration']:,} held-out ID "
        f"images are too few for a false-alarm level of {decisions['level']:g}"
    )


def _check_scores(scores: Mapping[str, NDArray[np.float32]]) -> None:
    """Raise ValueError if scores cannot be plotted."""
    if ID not in scores:
        raise ValueError(f"scores must have the set {ID!r}, got {list(scores)}")
    for name, values in scores.items():
        if not (len(values) and np.isfinite(values).all()):
            raise ValueError(f"scores of {name!r} must be finite and not empty")


def _slider_range(
    scores: Mapping[str, NDArray[np.float32]], start: float
) -> tuple[float, float, float]:
    """Return minimum, maximum and step of the slider: round numbers that cover all scores."""
    bottom = min(0.0, start, *(float(values.min()) for values in scores.values()))
    top = max(start, *(float(values.max()) for values in scores.values()))
    width = top - bottom or 1.0
    exponent = math.floor(math.log10(width / _SLIDER_STEPS))
    step = float(f"1e{exponent}")
    low, high = math.floor(bottom / step), math.ceil((bottom + width) / step)
    return float(f"{low}e{exponent}"), float(f"{high}e{exponent}"), step


def _encode_scores(scores: NDArray[np.float32]) -> str:
    """Encode sorted scores as base64 of little-endian float32.

    Lossless, so that counts on the page equal those in Python.
    """
    return base64.b64encode(np.sort(scores).astype("<f4").tobytes()).decode("ascii")


def _num_scores(encoded: str) -> int:
    return len(base64.b64decode(encoded)) // 4


def _roc_data(name: str, curves: _Curves) -> dict[str, Any]:
    """Return the ROC curves of a set for the script, to five digits: finer than a pixel."""
    return {
        "set": printable(name),
        "curves": [
            {
                "method": printable(method),
                "fpr": [round(float(value), 5) for value in fpr],
                "tpr": [round(float(value), 5) for value in tpr],
            }
            for method, (fpr, tpr) in curves.items()
        ],
    }


def _unique(names: Iterable[str]) -> list[str]:
    """Return each name once, in order of first appearance."""
    return list(dict.fromkeys(names))


def _encode_gallery(images: Sequence[GalleryImage]) -> list[dict[str, Any]]:
    """Return the cards, with pictures as large as the size of the page allows."""
    side = next(
        (side for side in _PICTURE_SIDES if _estimate_size(images, side) <= _MAX_PICTURES),
        _PICTURE_SIDES[-1],
    )
    return [_encode_card(image, side) for image in images]


def _estimate_size(images: Sequence[GalleryImage], side: int) -> float:
    """Estimate the size of all pictures in characters from every eighth image."""
    cards = [_encode_card(image, side) for image in images[::8]]
    pictures = [value for card in cards for value in card.values() if isinstance(value, dict)]
    return sum(len(picture["source"]) for picture in pictures) * len(images) / max(1, len(cards))


def _encode_card(image: GalleryImage, side: int) -> dict[str, Any]:
    card = image.card
    nearest = Image.fromarray(np.ascontiguousarray(card.nearest.transpose(1, 2, 0)))
    return {
        "set": printable(card.set_name),
        "name": printable(card.name),
        # exact: the script compares it with the threshold
        "score": float(card.score),
        "distance": float(card.distance),
        "p_value": card.p_value,
        "prediction": printable(card.prediction),
        "label": printable(image.label),
        "photo": _encode(image.photo, side),
        "overlay": _encode(image.overlay, side),
        "nearest": _encode(nearest, side),
    }


def _encode(picture: Image.Image, side: int | None = None) -> dict[str, Any]:
    """Return a picture as a data URI with its size.

    Lossless except for photos and what is drawn over them, which would dominate the page as PNG.

    Args:
        picture: The picture.
        side: Longer side in pixels at most; None to keep all pixels.
    """
    kind = "PNG"
    if side is not None and max(picture.size) > side // 3:
        kind = "JPEG"
        picture = picture.copy()
        picture.thumbnail((side, side), Image.Resampling.BOX)
    buffer = io.BytesIO()
    picture.save(buffer, kind, optimize=True, quality=80)
    source = base64.b64encode(buffer.getvalue()).decode("ascii")
    return {
        "source": f"data:image/{kind.lower()};base64,{source}",
        "width": picture.width,
        "height": picture.height,
    }


def _draw_scale(scale: ColorScale) -> Image.Image:
    """Draw the colours of pixel scores over grey, with the threshold, if any, in the middle."""
    ends = [0.0, scale.pixel_threshold, scale.top] if scale.decides else [0.0, scale.top]
    scores = np.interp(np.linspace(0, len(ends) - 1, 256), np.arange(len(ends)), ends)
    bar = Image.new("RGBA", (256, 1), (200, 200, 200, 255))
    bar.alpha_composite(Image.fromarray(scale.colors(scores.astype(np.float32)[None])))
    return bar.convert("RGB")
