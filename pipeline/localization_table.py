"""Table of ``localize``: rows, means, leads and sanity checks, as JSON and as text."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ood_heatmap.errors import printable
from ood_heatmap.localization import METRICS
from ood_heatmap.metrics import interval, intervals
from ood_heatmap.patches import EDGES, SHAPES, SIDES
from ood_heatmap.pipeline.pixel_methods import SHUFFLED, SWAPPED
from ood_heatmap.pipeline.scoring import HEATMAP, ID
from ood_heatmap.pipeline.tables import MEAN, align_columns, format_margin
from ood_heatmap.verdict import format_points

_Float64 = NDArray[np.float64]
_Kind = tuple[float | str, str, str]
# by method, set and kind
_JsonRows = dict[tuple[str, str, _Kind], Mapping[str, Any]]
_HEADS = {
    "pixel_auroc": "AUROC",
    "shuffled_auroc": "shuffled AUROC",
    "aupro": "AUPRO",
    "pointing": "pointing",
}
_ID_ON_ID = "ID on ID"
_WIDTH, _NAME_WIDTH, _HEAD_WIDTH = 80, 24, 10
_ALL_KINDS: _Kind = (MEAN, MEAN, MEAN)


@dataclass(frozen=True)
class LocalizationRow:
    """One row of the localization table: a method on a set, for one kind of patch, or a mean.

    Args:
        method: Name of the method.
        set: Name of the set that the patches are from: an OOD set, ``mean`` over those, or ``id``,
            other ID images.
        side: The patch's side as a share of the image's, or ``mean``.
        shape: One of ``SHAPES`` or ``mean``.
        edges: One of ``EDGES`` or ``mean``.
        metrics: Metrics in [0, 1], by name.
        resampled: Metrics of resampled images, ``(R, 4)``; averaged for a mean.
    """

    method: str
    set: str
    side: float | str
    shape: str
    edges: str
    metrics: Mapping[str, float]
    resampled: _Float64

    @property
    def kind(self) -> _Kind:
        """Side, shape and edges."""
        return self.side, self.shape, self.edges

    def to_json(self) -> dict[str, Any]:
        """Return the row for ``localization.json``, with 95 % intervals."""
        where = {key: getattr(self, key) for key in ("method", "set", "side", "shape", "edges")}
        return {
            **where,
            **self.metrics,
            "intervals": intervals(METRICS, self.resampled),
        }


def mean_rows(cells: Sequence[LocalizationRow], names: Sequence[str]) -> list[LocalizationRow]:
    """Return the means over all kinds, over those of each side, shape and edges, and over sides.

    Args:
        cells: The rows of every method, set, side, shape and kind of edges.
        names: Names of the OOD sets; the mean over sets is that of these.
    """
    methods = list(dict.fromkeys(row.method for row in cells))
    measured = dict.fromkeys(row.set for row in cells)
    table = []
    for method, name, kind in product(methods, [*measured, MEAN], _iter_kinds()):
        chosen = [
            row
            for row in cells
            if row.method == method
            and (row.set == name or (name == MEAN and row.set in names))
            and all(wanted in (value, MEAN) for wanted, value in zip(kind, row.kind, strict=True))
        ]
        means = {key: float(np.mean([row.metrics[key] for row in chosen])) for key in METRICS}
        resampled = np.mean([row.resampled for row in chosen], axis=0)
        table.append(LocalizationRow(method, name, *kind, means, resampled))
    return table


def _iter_kinds() -> Iterator[_Kind]:
    """Yield the kinds of patches that have rows in the table."""
    yield _ALL_KINDS
    yield from ((side, MEAN, MEAN) for side in SIDES)
    yield from ((MEAN, shape, MEAN) for shape in SHAPES)
    yield from ((MEAN, MEAN, edges) for edges in EDGES)
    yield from ((MEAN, shape, edges) for shape, edges in product(SHAPES, EDGES))


def _overall(table: Sequence[LocalizationRow], method: str, name: str = MEAN) -> LocalizationRow:
    """Return the row of a method and a set with its means over all kinds of patches."""
    whole = (method, name, _ALL_KINDS)
    return next(row for row in table if (row.method, row.set, row.kind) == whole)


def heatmap_leads(table: Sequence[LocalizationRow]) -> dict[str, dict[str, Any]]:
    """Return the lead of the heatmap over each other method, with 95 % intervals.

    The overall means are compared. Both methods share the resampled images, so the interval of the
    difference is narrower than their separate intervals suggest.
    """
    heatmap, leads = _overall(table, HEATMAP), {}
    for method in dict.fromkeys(row.method for row in table if row.method != HEATMAP):
        other = _overall(table, method)
        leads[method] = {
            **{key: heatmap.metrics[key] - other.metrics[key] for key in METRICS},
            "intervals": intervals(METRICS, heatmap.resampled - other.resampled),
        }
    return leads


def compare_id_on_id(table: Sequence[LocalizationRow]) -> dict[str, Any] | None:
    """Compare patches of OOD images with patches of other ID images, and say what it means.

    Returns:
        The shuffled AUROC of both, their difference with its 95 % interval, and ``meaning``; None
        if no patches of ID images were measured.
    """
    if ID not in {row.set for row in table}:
        return None
    key = "shuffled_auroc"
    ood, pasted_id = _overall(table, HEATMAP), _overall(table, HEATMAP, ID)
    column = METRICS.index(key)
    low, high = interval(ood.resampled[:, column] - pasted_id.resampled[:, column])
    if low <= 0:
        meaning = "just as well: what is measured is what does not belong into the image"
    elif pasted_id.metrics[key] - 0.5 > (ood.metrics[key] - 0.5) / 2:
        meaning = "less well: what is measured is mostly what does not belong into the image"
    else:
        meaning = "much less well: what is measured is OOD content"
    return {
        "ood": ood.metrics[key],
        "id": pasted_id.metrics[key],
        "difference": ood.metrics[key] - pasted_id.metrics[key],
        "interval": [low, high],
        "meaning": meaning,
    }


def lowered_by_sanity_checks(table: Sequence[LocalizationRow]) -> dict[str, float]:
    """Return the decrease of the heatmap's overall pixel AUROC in each sanity check."""
    auroc = _overall(table, HEATMAP).metrics["pixel_auroc"]
    measured = {row.method for row in table}
    return {
        method: auroc - _overall(table, method).metrics["pixel_auroc"]
        for method in (SHUFFLED, SWAPPED)
        if method in measured
    }


def format_localization(content: Mapping[str, Any]) -> str:
    """Format ``localization.json`` for the terminal, in percent, at most 80 columns wide.

    Returns:
        Every method over all OOD sets, the heatmap on each set, pixel AUROC by kind of patch, and
        what patches of ID images say.
    """
    rows: _JsonRows = {
        (row["method"], row["set"], (row["side"], row["shape"], row["edges"])): row
        for row in content["table"]
    }
    methods = list(dict.fromkeys(row["method"] for row in content["table"]))
    sets = [name for name in dict.fromkeys(row["set"] for row in content["table"]) if name != MEAN]
    parts = [
        align_columns(_lines_by_method(rows, methods, content["leads"])),
        align_columns(_lines_by_set(rows, sets)),
        align_columns(_lines_by_kind(rows, methods)),
    ]
    id_on_id = content["id_on_id"]
    if id_on_id is not None:
        low, high = map(format_points, (100 * end for end in id_on_id["interval"]))
        words = (
            f"{_ID_ON_ID}: patches of other ID images are found {id_on_id['meaning']} "
            f"(shuffled AUROC {format_points(100 * id_on_id['difference'], '+')} [{low}, {high}] "
            "for OOD)"
        )
        parts.append("\n".join(textwrap.wrap(words, _WIDTH)))
    return "\n\n".join(parts)


def _lines_by_method(
    rows: _JsonRows, methods: Sequence[str], leads: Mapping[str, Mapping[str, Any]]
) -> list[list[str]]:
    """Return the metrics of each method over all OOD sets, and the lead of the heatmap."""
    lines = [["method", *_HEADS.values(), "heatmap ahead"]]
    for method in methods:
        ahead = _format_lead(leads[method]) if method in leads else ""
        row = rows[method, MEAN, _ALL_KINDS]
        lines.append([method, *(_format_share(row[key]) for key in METRICS), ahead])
    return lines


def _lines_by_set(rows: _JsonRows, sets: Sequence[str]) -> list[list[str]]:
    """Return the metrics of the heatmap on each set, pixel AUROC with its interval."""
    lines = [["heatmap on patches of", *_HEADS.values()]]
    for name in sets:
        row = rows[HEATMAP, name, _ALL_KINDS]
        first, *others = (_format_share(row[key]) for key in METRICS)
        label = _ID_ON_ID if name == ID else printable(name)
        cut = label if len(label) <= _NAME_WIDTH else f"{label[: _NAME_WIDTH - 1]}…"
        lines.append([cut, f"{first} {format_margin(row, METRICS[0], 1)}", *others])
    return lines


def _lines_by_kind(rows: _JsonRows, methods: Sequence[str]) -> list[list[str]]:
    """Return the pixel AUROC of each method by side, shape and edges, mean over OOD sets.

    Methods are columns, with their names folded.
    """
    heads = [textwrap.wrap(method, _HEAD_WIDTH) for method in methods]
    height = max(map(len, heads))
    folded = [[""] * (height - len(head)) + head for head in heads]
    lines = [["", *texts] for texts in zip(*folded, strict=True)]
    lines[-1][0] = "AUROC by patch"
    for kind in _iter_kinds():
        if kind.count(MEAN) == 2:
            shares = (rows[method, MEAN, kind]["pixel_auroc"] for method in methods)
            lines.append([_format_kind(kind), *map(_format_share, shares)])
    return lines


def _format_kind(kind: _Kind) -> str:
    """Return what is not the mean of a kind: its side, shape or edges."""
    (value,) = (value for value in kind if value != MEAN)
    if isinstance(value, float):
        return f"{100 * value:g} % side"
    return f"{value} edges" if value in EDGES else value


def _format_share(share: float) -> str:
    return f"{100 * share:.1f}"


def _format_lead(lead: Mapping[str, Any]) -> str:
    """Format a difference in pixel AUROC with its interval."""
    low, high = (format_points(100 * end) for end in lead["intervals"][METRICS[0]])
    return f"{format_points(100 * lead[METRICS[0]], '+')} [{low}, {high}]"
