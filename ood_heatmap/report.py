"""The report of an evaluation: one HTML page that opens from disk and needs no network.

Tables and pictures are written here, escaped; the plots and the controls are the script in
``report.html``, which draws them from the JSON that this module embeds.
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
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image

from ood_heatmap.cache.files import replacing
from ood_heatmap.figures import COLORS, Card

ID = "id"
HEATMAP = "heatmap"  # the method whose scores are in the histograms and under the threshold
PICTURE_SIZE = 96  # pixels of the longer side, as on the page: 200 cards of 224 px would be 50 MB
SLIDER_STEPS = 1000  # at least; the next power of ten that divides the range into more

Curves = Mapping[str, tuple[list[float], list[float]]]


@dataclass(frozen=True)
class Column:
    """One metric of the table."""

    key: str
    head: str
    note: str
    sign: int  # +1: higher is better, -1: lower is better

    @property
    def arrow(self) -> str:
        """Point to the better side."""
        return "&uarr;" if self.sign > 0 else "&darr;"


COLUMNS = (
    Column("auroc", "AUROC", "", 1),
    Column("aupr_in", "AUPR-IN", "ID positive", 1),
    Column("aupr_out", "AUPR-OUT", "OOD positive", 1),
    Column("fpr95_id_pos", "FPR95", "ID positive", -1),
    Column("fpr95_ood_pos", "FPR95", "OOD positive", -1),
)


def write_report(
    path: Path,
    *,
    title: str,
    metrics: Mapping[str, Any],
    scores: Mapping[str, NDArray[np.float32]],
    roc: Mapping[str, Curves],
    cards: Sequence[Card],
    color_max: float,
    threshold: float | None,
    classes: Sequence[str] | None = None,
) -> None:
    """Write the report whole; the same input gives the same bytes.

    Args:
        path: The HTML file.
        title: Its heading.
        metrics: Content of ``metrics.json``: ``table`` has a row for each method and set, shares in
            [0, 1]. A row may have ``intervals``, ``{metric: [low, high]}``.
        scores: All heatmap scores by set; the set ``id`` is in-distribution.
        roc: By set and method, the false and true positive rates; OOD is the positive class.
        cards: The gallery, in the order in which it is first shown.
        color_max: Top of the one colour scale of all heatmaps.
        threshold: Where the slider starts; ``None`` for the 95th percentile of the ID scores.
        classes: Names of the ID classes.

    Raises:
        ValueError: The set ``id`` is missing, or a set has no scores or some that are not finite.
    """
    check_scores(scores)
    start = float(np.quantile(scores[ID], 0.95) if threshold is None else threshold)
    low, high, step = slider_range(scores, start)
    data = {
        "threshold": start,
        "low": low,
        "high": high,
        "sets": [
            {"name": name, "id": name == ID, "scores": encoded(scores[name])}
            for name in [ID, *(name for name in scores if name != ID)]
        ],
        "methods": distinct(method for curves in roc.values() for method in curves),
        "roc": [panel(name, curves) for name, curves in roc.items()],
        "main": HEATMAP,
    }
    template = files("ood_heatmap").joinpath("report.html").read_text("utf-8")
    page = fill(
        template,
        {
            "title": escape(title),
            "script_hash": script_hash(template),
            "summary": summary(metrics, scores, classes),
            "table": table(metrics["table"]),
            "table_sets": options(distinct(row["set"] for row in metrics["table"])),
            "slider": f'min="{low!r}" max="{high!r}" step="{step!r}"',
            "step": repr(step),
            "origin": "the 95th percentile of the ID scores"
            if threshold is None
            else "the threshold of this evaluation",
            "scale": image_tag(
                colored(np.linspace(0, 1, 256, dtype=np.float32)[None], 1.0),
                f"colour scale of the heatmaps, from dark at 0 to bright at {color_max:g}",
            ),
            "color_max": f"{color_max:g}",
            "card_sets": options(distinct(card.set_name for card in cards)),
            "cards": gallery(cards, color_max),
            "p_value": "The p-value is the share of ID images that score at least as high."
            if any(card.p_value is not None for card in cards)
            else "",
            "num_cards": f"{len(cards):,}",
            "data": embedded(data),
        },
    )
    with replacing(path) as scratch:
        # a file name that is not UTF-8 reaches Python as lone surrogates
        scratch.write_bytes(page.encode("utf-8", "backslashreplace"))


def check_scores(scores: Mapping[str, NDArray[np.float32]]) -> None:
    """Refuse scores that cannot be counted."""
    if ID not in scores:
        raise ValueError(f"scores must have the set {ID!r}, got {list(scores)}")
    for name, values in scores.items():
        if not (len(values) and np.isfinite(values).all()):
            raise ValueError(f"scores of {name!r} must be finite and at least one")


def slider_range(
    scores: Mapping[str, NDArray[np.float32]], start: float
) -> tuple[float, float, float]:
    """Return bottom, top and step of the slider: round numbers around 0, all scores, the start."""
    bottom = min(0.0, start, *(float(values.min()) for values in scores.values()))
    top = max(start, *(float(values.max()) for values in scores.values()))
    width = top - bottom or 1.0
    exponent = math.floor(math.log10(width / SLIDER_STEPS))
    step = float(f"1e{exponent}")
    low, high = math.floor(bottom / step), math.ceil((bottom + width) / step)
    return float(f"{low}e{exponent}"), float(f"{high}e{exponent}"), step


def encoded(scores: NDArray[np.float32]) -> str:
    """Return sorted scores as base64 of little-endian float32.

    Bit for bit, so that the page counts what Python counts.
    """
    return base64.b64encode(np.sort(scores).astype("<f4").tobytes()).decode("ascii")


def panel(name: str, curves: Curves) -> dict[str, Any]:
    """Return the ROC curves of a set for the script; five digits are finer than a pixel."""
    return {
        "set": name,
        "curves": [
            {
                "method": method,
                "fpr": [round(float(value), 5) for value in fpr],
                "tpr": [round(float(value), 5) for value in tpr],
            }
            for method, (fpr, tpr) in curves.items()
        ],
    }


def embedded(data: Mapping[str, Any]) -> str:
    """Return JSON that cannot end the ``<script>`` it stands in."""
    return json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def script_hash(template: str) -> str:
    """Return the hash by which the page allows its own script, and no other, to run."""
    (script,) = re.findall(r"<script>(.*?)</script>", template, re.DOTALL)
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")


def fill(template: str, parts: Mapping[str, str]) -> str:
    """Return the template with each ``{{ name }}`` replaced, in one pass: no part is searched."""
    return re.sub(r"\{\{ (\w+) \}\}", lambda found: parts[found[1]], template)


def distinct(names: Iterable[str]) -> list[str]:
    """Return each name once, in order of first appearance."""
    return list(dict.fromkeys(names))


def options(names: Sequence[str]) -> str:
    """Return a choice for each set, known to the script by its number and not by its name."""
    return "".join(
        f'<option value="{number}">{escape(name)}</option>' for number, name in enumerate(names)
    )


def summary(
    metrics: Mapping[str, Any],
    scores: Mapping[str, NDArray[np.float32]],
    classes: Sequence[str] | None,
) -> str:
    """Return what was evaluated, in a sentence or two."""
    ood = [name for name in scores if name != ID]
    counts = ", ".join(f"{escape(name)} ({len(scores[name]):,})" for name in ood)
    lines = [
        f"<p>{len(scores[ID]):,} in-distribution (ID) images against {counts or 'no OOD set'}."
    ]
    if metrics.get("id_accuracy") is not None:
        lines.append(
            f"The classifier is right on {percent(metrics['id_accuracy'])} % of the ID set."
        )
    lines.append("Scores: larger is more out-of-distribution (OOD).</p>")
    if classes:
        names = ", ".join(escape(name) for name in classes)
        lines.append(
            f"<details><summary>{len(classes):,} ID classes</summary><p>{names}</p></details>"
        )
    return "\n".join(lines)


def percent(share: float) -> str:
    """Return a share in [0, 1] in percent."""
    return f"{100 * share:.2f}"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of metrics, a group of rows for each set.

    A metric with intervals has a second column for them, so that its numbers stay in line.
    """
    wide = {key for row in rows for key in row.get("intervals") or {}}
    heads = "".join(
        f'<th scope="col"{" colspan=2" if column.key in wide else ""}>{column.head}&nbsp;'
        f'<span aria-hidden="true">{column.arrow}</span><small>{column.note}</small></th>'
        for column in COLUMNS
    )
    prevalence = any("prevalence_ood" in row for row in rows)
    if prevalence:
        heads += '<th scope="col">OOD share</th>'
    groups = "".join(
        group(number, name, [row for row in rows if row["set"] == name], wide, prevalence)
        for number, name in enumerate(distinct(row["set"] for row in rows))
    )
    return (
        f'<table id="metrics"><thead><tr><th scope="col">Set</th><th scope="col">Method</th>'
        f"{heads}</tr></thead>\n{groups}</table>"
    )


def group(
    number: int,
    name: str,
    rows: Sequence[Mapping[str, Any]],
    wide: Collection[str],
    prevalence: bool,
) -> str:
    """Return the rows of one set, with the best of each metric in bold."""
    best = {column.key: best_of(column, rows) for column in COLUMNS}
    head = f'<th scope="rowgroup" rowspan="{len(rows)}">{escape(name)}</th>'
    lines = []
    for row in rows:
        cells = ""
        for key in best:
            cells += cell(shown(row, key), best[key])
            if key in wide:
                cells += margin_cell(row, key)
        if prevalence:
            share = row.get("prevalence_ood")
            cells += cell(None if share is None else f"{100 * share:.1f}")
        method = f'<th scope="row">{escape(row["method"])}</th>'
        lines.append(f"<tr>{head}{method}{cells}</tr>\n")
        head = ""  # it spans the rows of its set
    return f'<tbody data-set="{number}">{"".join(lines)}</tbody>\n'


def shown(row: Mapping[str, Any], key: str) -> str | None:
    """Return a metric as the table shows it, in percent."""
    share = row.get(key)
    return None if share is None or math.isnan(share) else percent(share)


def best_of(column: Column, rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the best number of a column as it is shown: what ties on paper is a tie."""
    numbers = [text for row in rows if (text := shown(row, column.key)) is not None]
    return (max if column.sign > 0 else min)(numbers, key=float, default=None)


def cell(text: str | None, best: str | None = None) -> str:
    """Return one number of the table, bold if it is the best."""
    if text is None:
        return "<td>&ndash;</td>"
    return f"<td>{f'<strong>{text}</strong>' if text == best else text}</td>"


def margin_cell(row: Mapping[str, Any], key: str) -> str:
    """Return how far to trust the number before it: its spread over runs, or else its interval."""
    interval = (row.get("intervals") or {}).get(key, ())
    text = "&ndash;".join(percent(end) for end in interval)
    if "spread" in row:
        text = f"&plusmn; {percent(row['spread'][key])}"
    return f'<td class="interval">{text}</td>'


def gallery(cards: Sequence[Card], color_max: float) -> str:
    """Return the cards as items of a list."""
    sets = {name: number for number, name in enumerate(distinct(card.set_name for card in cards))}
    return "\n".join(item(card, sets[card.set_name], color_max) for card in cards)


def item(card: Card, set_number: int, color_max: float) -> str:
    """Return one card: image, heatmap, nearest ID image, and what is known of them."""
    name = escape(card.name)
    pictures = (
        (photo(card.image), f"image {card.name}", "image"),
        (heat(card.strength, color_max), f"heatmap of {card.name}", "heatmap"),
        (photo(card.nearest), f"nearest ID image of {card.name}", "nearest ID"),
    )
    figures = "".join(
        f"<figure>{image_tag(picture, alt)}<figcaption>{caption}</figcaption></figure>"
        for picture, alt, caption in pictures
    )
    p_value = (
        "" if card.p_value is None else f"<div><dt>p-value</dt><dd>{card.p_value:.3g}</dd></div>"
    )
    # repr of a float32 as a float: exact, as the flag on the card is set by comparing it
    score, distance = float(card.score), float(card.distance)
    return (
        f'<li class="card" data-set="{set_number}" data-score="{score!r}" '
        f'data-distance="{distance!r}">'
        f'<p class="name"><b>{name}</b> <span>{escape(card.set_name)}</span></p>'
        f'<div class="pictures">{figures}</div>'
        f"<dl><div><dt>score</dt><dd>{score:.4f}</dd></div>{p_value}"
        f"<div><dt>distance</dt><dd>{distance:.3f}</dd></div>"
        f"<div><dt>predicted</dt><dd>{escape(card.prediction)}</dd></div></dl>"
        '<p class="flag" hidden>flagged</p></li>'
    )


def photo(image: NDArray[np.uint8]) -> Image.Image:
    """Return ``(3, H, W)`` uint8 as a picture."""
    return shrunk(Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))))


def heat(strength: NDArray[np.float32], color_max: float) -> Image.Image:
    """Return ``(H, W)`` in [0, 1] as a picture; where it shrinks, strengths are averaged."""
    return colored(np.asarray(shrunk(Image.fromarray(strength.astype(np.float32)))), color_max)


def shrunk(picture: Image.Image) -> Image.Image:
    """Return a picture of at most ``PICTURE_SIZE``; a smaller one stays as it is."""
    picture.thumbnail((PICTURE_SIZE, PICTURE_SIZE), Image.Resampling.BOX)
    return picture


def colored(strength: NDArray[np.float32], color_max: float) -> Image.Image:
    """Return a picture on the colour scale from 0 to ``color_max``.

    A ``color_max`` of 0, of a decoder that answers nothing, leaves it dark.
    """
    share = strength / color_max if color_max > 0 else np.zeros_like(strength)
    picture = Image.fromarray(np.clip(share * 256, 0, 255).astype(np.uint8))
    palette = colormaps[COLORS](np.arange(256), bytes=True)[:, :3]
    picture.putpalette(palette.tobytes())
    return picture


def image_tag(picture: Image.Image, alt: str) -> str:
    """Return a picture as an ``<img>`` that holds its own bytes.

    Exact, but for photos that were made smaller: as PNG they would be most of the page.
    """
    kind = "JPEG" if picture.mode == "RGB" and max(picture.size) == PICTURE_SIZE else "PNG"
    buffer = io.BytesIO()
    picture.save(buffer, kind, optimize=True, quality=85)
    source = base64.b64encode(buffer.getvalue()).decode("ascii")
    return (
        f'<img src="data:image/{kind.lower()};base64,{source}" width="{picture.width}" '
        f'height="{picture.height}" alt="{escape(alt)}">'
    )
