"""Render the report of an evaluation: a self-contained HTML page that needs no network.

This module renders tables and images, with all text escaped. The script in ``report.html`` draws
plots and controls from the JSON embedded here.
"""

import base64
import hashlib
import io
import json
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from typing import Any

import numpy as np
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image

from ood_heatmap.errors import printable
from ood_heatmap.figures import COLORMAP, Card, share_of_scale

ID = "id"
# method shown in the histograms and used for the threshold
HEATMAP = "heatmap"
# longer side in pixels, as displayed on the page: 200 cards of 224 px would be 50 MB
_PICTURE_SIZE = 96
# minimum number of steps; the step is rounded down to a power of ten
_SLIDER_STEPS = 1000

_Curves = Mapping[str, tuple[list[float], list[float]]]


@dataclass(frozen=True)
class _Column:
    """One metric of the table."""

    key: str
    head: str
    note: str
    # +1: higher is better, -1: lower is better
    sign: int

    @property
    def arrow(self) -> str:
        """Arrow in the direction of better values."""
        return "&uarr;" if self.sign > 0 else "&darr;"


_COLUMNS = (
    _Column("auroc", "AUROC", "", 1),
    _Column("aupr_in", "AUPR-IN", "ID positive", 1),
    _Column("aupr_out", "AUPR-OUT", "OOD positive", 1),
    _Column("fpr95_id_pos", "FPR95", "ID positive", -1),
    _Column("fpr95_ood_pos", "FPR95", "OOD positive", -1),
)


def render_report(
    *,
    title: str,
    metrics: Mapping[str, Any],
    scores: Mapping[str, NDArray[np.float32]],
    roc: Mapping[str, _Curves],
    cards: Sequence[Card],
    color_max: float,
    threshold: float | None,
    classes: Sequence[str] = (),
    warnings: Sequence[str] = (),
) -> str:
    """Render the report, deterministically.

    Args:
        title: Heading of the page.
        metrics: Content of ``metrics.json``: ``table`` has one row per method and set, values in
            [0, 1]. A row may have ``intervals``, ``{metric: [low, high]}``. ``decisions``, if
            present, has the number of held-out images behind the threshold.
        scores: All heatmap scores by set; the set ``id`` is in-distribution.
        roc: False and true positive rates by set and method; OOD is the positive class.
        cards: The gallery, in initial order.
        color_max: Top of the colour scale shared by all heatmaps.
        threshold: Initial position of the slider; None for the 95th percentile of the ID scores.
        classes: Names of the ID classes; empty when unknown.
        warnings: Warnings of all stages, shown at the top.

    Raises:
        ValueError: The set ``id`` is missing, or a set has no scores or non-finite ones.
    """
    _check_scores(scores)
    start = float(np.quantile(scores[ID], 0.95) if threshold is None else threshold)
    low, high, step = _slider_range(scores, start)
    data = {
        "threshold": start,
        "low": low,
        "high": high,
        "sets": [
            {"name": printable(name), "id": name == ID, "scores": _encode_scores(scores[name])}
            for name in [ID, *(name for name in scores if name != ID)]
        ],
        "methods": _unique(method for curves in roc.values() for method in curves),
        "roc": [_roc_data(name, curves) for name, curves in roc.items()],
        "main": HEATMAP,
    }
    template = files("ood_heatmap").joinpath("report.html").read_text("utf-8")
    return _fill(
        template,
        {
            "title": _escape(title),
            "script_hash": _script_hash(template),
            "warnings": _render_warnings(warnings),
            "summary": _render_summary(metrics, scores, classes),
            "table": _render_table(metrics["table"]),
            "table_sets": _render_options(_unique(row["set"] for row in metrics["table"])),
            "slider": f'min="{low!r}" max="{high!r}" step="{step!r}"',
            "step": repr(step),
            "origin": _format_origin(threshold, metrics.get("decisions")),
            "scale": _image_tag(
                _colorize(np.linspace(0, 1, 256, dtype=np.float32)[None], 1.0),
                f"colour scale of the heatmaps, from dark at 0 to bright at {color_max:g}",
            ),
            "color_max": f"{color_max:g}",
            "card_sets": _render_options(_unique(card.set_name for card in cards)),
            "cards": _render_cards(cards, color_max),
            "p_value": "The p-value is the share of ID images that score at least as high."
            if any(card.p_value is not None for card in cards)
            else "",
            "num_cards": f"{len(cards):,}",
            "data": _embed_json(data),
        },
    )


def _escape(text: str) -> str:
    """Escape text for HTML, on one line."""
    return escape(printable(text))


def _render_warnings(warnings: Sequence[str]) -> str:
    """Render the box of warnings; empty without warnings."""
    if not warnings:
        return ""
    items = "".join(f"<li>{_escape(text)}</li>" for text in warnings)
    return (
        '<section class="warnings" aria-labelledby="warnings-title">'
        f'<h2 id="warnings-title">Warnings</h2><ul>{items}</ul></section>'
    )


def _format_origin(threshold: float | None, decisions: Mapping[str, Any] | None) -> str:
    """Describe the initial position of the slider, and why there is no threshold, if so."""
    if threshold is not None:
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


def _roc_data(name: str, curves: _Curves) -> dict[str, Any]:
    """Return the ROC curves of a set for the script, to five digits: finer than a pixel."""
    return {
        "set": printable(name),
        "curves": [
            {
                "method": method,
                "fpr": [round(float(value), 5) for value in fpr],
                "tpr": [round(float(value), 5) for value in tpr],
            }
            for method, (fpr, tpr) in curves.items()
        ],
    }


def _embed_json(data: Mapping[str, Any]) -> str:
    """Serialize to JSON that cannot close its ``<script>`` element."""
    return json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _script_hash(template: str) -> str:
    """Return the hash by which the Content-Security-Policy allows the page's own script."""
    (script,) = re.findall(r"<script>(.*?)</script>", template, re.DOTALL)
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")


def _fill(template: str, values: Mapping[str, str]) -> str:
    """Replace each ``{{ name }}`` of the template in one pass, so that values are not expanded."""
    return re.sub(r"\{\{ (\w+) \}\}", lambda match: values[match[1]], template)


def _unique(names: Iterable[str]) -> list[str]:
    """Return each name once, in order of first appearance."""
    return list(dict.fromkeys(names))


def _render_options(names: Sequence[str]) -> str:
    """Render one option per set, identified by its number instead of its name."""
    return "".join(
        f'<option value="{number}">{_escape(name)}</option>' for number, name in enumerate(names)
    )


def _render_summary(
    metrics: Mapping[str, Any],
    scores: Mapping[str, NDArray[np.float32]],
    classes: Sequence[str],
) -> str:
    """Render a short summary of the evaluation."""
    ood = [name for name in scores if name != ID]
    counts = ", ".join(f"{_escape(name)} ({len(scores[name]):,})" for name in ood)
    lines = [
        f"<p>{len(scores[ID]):,} in-distribution (ID) images against {counts or 'no OOD set'}."
    ]
    if metrics.get("id_accuracy") is not None:
        lines.append(
            f"Classifier accuracy on the ID set: {_format_percent(metrics['id_accuracy'])} %."
        )
    lines.append("Scores: larger is more out-of-distribution (OOD).</p>")
    if classes:
        names = ", ".join(_escape(name) for name in classes)
        lines.append(
            f"<details><summary>{len(classes):,} ID classes</summary><p>{names}</p></details>"
        )
    return "\n".join(lines)


def _format_percent(share: float) -> str:
    """Format a share in [0, 1] in percent."""
    return f"{100 * share:.2f}"


def _render_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Render the table of metrics, one group of rows per set.

    A metric with intervals has a second column for them, so that its numbers stay aligned.
    """
    wide = {key for row in rows for key in row.get("intervals") or {}}
    heads = "".join(
        f'<th scope="col"{" colspan=2" if column.key in wide else ""}>{column.head}&nbsp;'
        f'<span aria-hidden="true">{column.arrow}</span><small>{column.note}</small></th>'
        for column in _COLUMNS
    )
    prevalence = any("prevalence_ood" in row for row in rows)
    if prevalence:
        heads += '<th scope="col">OOD share</th>'
    groups = "".join(
        _render_group(number, name, [row for row in rows if row["set"] == name], wide, prevalence)
        for number, name in enumerate(_unique(row["set"] for row in rows))
    )
    return (
        f'<table id="metrics"><thead><tr><th scope="col">Set</th><th scope="col">Method</th>'
        f"{heads}</tr></thead>\n{groups}</table>"
    )


def _render_group(
    number: int,
    name: str,
    rows: Sequence[Mapping[str, Any]],
    wide: Collection[str],
    prevalence: bool,
) -> str:
    """Render the rows of one set, with the best of each metric in bold."""
    best = {column.key: _best_metric(column, rows) for column in _COLUMNS}
    head = f'<th scope="rowgroup" rowspan="{len(rows)}">{_escape(name)}</th>'
    lines = []
    for row in rows:
        cells = ""
        for key in best:
            cells += _render_cell(_format_metric(row, key), best[key])
            if key in wide:
                cells += _render_margin(row, key)
        if prevalence:
            share = row.get("prevalence_ood")
            cells += _render_cell(None if share is None else f"{100 * share:.1f}")
        method = f'<th scope="row">{_escape(row["method"])}</th>'
        lines.append(f"<tr>{head}{method}{cells}</tr>\n")
        # the header cell spans all rows of the set
        head = ""
    return f'<tbody data-set="{number}">{"".join(lines)}</tbody>\n'


def _format_metric(row: Mapping[str, Any], key: str) -> str | None:
    """Format a metric for the table, in percent."""
    share = row.get(key)
    return None if share is None or math.isnan(share) else _format_percent(share)


def _best_metric(column: _Column, rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the best number of a column as displayed; equal after rounding counts as tied."""
    numbers = [text for row in rows if (text := _format_metric(row, column.key)) is not None]
    return (max if column.sign > 0 else min)(numbers, key=float, default=None)


def _render_cell(text: str | None, best: str | None = None) -> str:
    """Render one number of the table, bold if it is the best."""
    if text is None:
        return "<td>&ndash;</td>"
    return f"<td>{f'<strong>{text}</strong>' if text == best else text}</td>"


def _render_margin(row: Mapping[str, Any], key: str) -> str:
    """Render the uncertainty of a metric: its spread over runs, otherwise its interval."""
    interval = (row.get("intervals") or {}).get(key, ())
    text = "&ndash;".join(_format_percent(end) for end in interval)
    if "spread" in row:
        text = f"&plusmn; {_format_percent(row['spread'][key])}"
    return f'<td class="interval">{text}</td>'


def _render_cards(cards: Sequence[Card], color_max: float) -> str:
    """Render the cards as list items."""
    sets = {name: number for number, name in enumerate(_unique(card.set_name for card in cards))}
    return "\n".join(_render_card(card, sets[card.set_name], color_max) for card in cards)


def _render_card(card: Card, set_number: int, color_max: float) -> str:
    """Render one card: image, heatmap and nearest ID image, with their numbers."""
    name = _escape(card.name)
    pictures = (
        (_to_picture(card.image), f"image {card.name}", "image"),
        (_to_heatmap_picture(card.pixel_score, color_max), f"heatmap of {card.name}", "heatmap"),
        (_to_picture(card.nearest), f"nearest ID image of {card.name}", "nearest ID"),
    )
    figures = "".join(
        f"<figure>{_image_tag(picture, alt)}<figcaption>{caption}</figcaption></figure>"
        for picture, alt, caption in pictures
    )
    p_value = (
        "" if card.p_value is None else f"<div><dt>p-value</dt><dd>{card.p_value:.3g}</dd></div>"
    )
    # repr of a float is exact: the script compares it with the threshold
    score, distance = float(card.score), float(card.distance)
    return (
        f'<li class="card" data-set="{set_number}" data-score="{score!r}" '
        f'data-distance="{distance!r}">'
        f'<p class="name"><b>{name}</b> <span>{_escape(card.set_name)}</span></p>'
        f'<div class="pictures">{figures}</div>'
        f"<dl><div><dt>score</dt><dd>{score:.4f}</dd></div>{p_value}"
        f"<div><dt>distance</dt><dd>{distance:.3f}</dd></div>"
        f"<div><dt>predicted</dt><dd>{_escape(card.prediction)}</dd></div></dl>"
        '<p class="flag" hidden>flagged</p></li>'
    )


def _to_picture(image: NDArray[np.uint8]) -> Image.Image:
    """Convert ``(3, H, W)`` uint8 to a thumbnail."""
    return _shrink(Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))))


def _to_heatmap_picture(pixel_score: NDArray[np.float32], color_max: float) -> Image.Image:
    """Convert ``(H, W)`` in [0, 1] to a thumbnail; pixel scores are averaged on shrinking."""
    shrunk = _shrink(Image.fromarray(pixel_score.astype(np.float32)))
    return _colorize(np.asarray(shrunk), color_max)


def _shrink(picture: Image.Image) -> Image.Image:
    """Shrink a picture in place to ``_PICTURE_SIZE``, unless it is smaller."""
    picture.thumbnail((_PICTURE_SIZE, _PICTURE_SIZE), Image.Resampling.BOX)
    return picture


def _colorize(pixel_score: NDArray[np.float32], color_max: float) -> Image.Image:
    """Map pixel scores to the colour scale from 0 to ``color_max``, as a palette image."""
    share = share_of_scale(pixel_score, color_max)
    picture = Image.fromarray(np.clip(share * 256, 0, 255).astype(np.uint8))
    palette = colormaps[COLORMAP](np.arange(256), bytes=True)[:, :3]
    picture.putpalette(palette.tobytes())
    return picture


def _image_tag(picture: Image.Image, alt: str) -> str:
    """Render a picture as an ``<img>`` with embedded bytes.

    Lossless except for shrunk photos, which would dominate the page size as PNG.
    """
    kind = "JPEG" if picture.mode == "RGB" and max(picture.size) == _PICTURE_SIZE else "PNG"
    buffer = io.BytesIO()
    picture.save(buffer, kind, optimize=True, quality=85)
    source = base64.b64encode(buffer.getvalue()).decode("ascii")
    return (
        f'<img src="data:image/{kind.lower()};base64,{source}" width="{picture.width}" '
        f'height="{picture.height}" alt="{_escape(alt)}">'
    )
