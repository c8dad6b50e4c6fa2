"""Table of ``localize``: rows, means, leads and sanity checks, as JSON and as text."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ood_heatmap.localization import METRICS
from ood_heatmap.metrics import interval, intervals
from ood_heatmap.patches import EDGES, SHAPES, SIDES
from ood_heatmap.pipeline.pixel_methods import SHUFFLED, SWAPPED
from ood_heatmap.pipeline.scoring import HEATMAP, ID
from ood_heatmap.pipeline.tables import MEAN, align_columns, format_margin

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
    return {
        method: auroc - _overall(table, method).metrics["pixel_auroc"]
        for method in (SHUFFLED, SWAPPED)
    }


def format_localization(content: Mapping[str, Any]) -> str:
    """Format ``localization.json`` for the terminal, in percent: at most one screen.

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
    lines = [["method", "patches of", *_HEADS.values(), "heatmap ahead"]]
    for method in methods:
        numbers = _format_numbers(rows[method, MEAN, _ALL_KINDS])
        lead = content["leads"].get(method)
        ahead = "" if lead is None else _format_lead(lead)
        lines.append([method, MEAN, *numbers, ahead])
    for name in sets:
        label = _ID_ON_ID if name == ID else name
        lines.append([HEATMAP, label, *_format_numbers(rows[HEATMAP, name, _ALL_KINDS]), ""])
    parts = [align_columns(lines), align_columns(_lines_by_kind(rows, methods))]
    id_on_id = content["id_on_id"]
    if id_on_id is not None:
        low, high = id_on_id["interval"]
        parts.append(
            f"{_ID_ON_ID}: patches of other ID images are found {id_on_id['meaning']} "
            f"(shuffled AUROC {100 * id_on_id['difference']:+.1f} [{100 * low:.1f}, "
            f"{100 * high:.1f}] for OOD)"
        )
    return "\n\n".join(parts)


def _lines_by_kind(rows: _JsonRows, methods: Sequence[str]) -> list[list[str]]:
    """Return the pixel AUROC of each method by side, shape and edges, mean over OOD sets."""
    kinds = [kind for kind in _iter_kinds() if kind.count(MEAN) == 2]
    heads = [f"{100 * side:g} %" if isinstance(side, float) else "" for side, _, _ in kinds]
    names = [
        head or next(value for value in kind[1:] if value != MEAN)
        for head, kind in zip(heads, kinds, strict=True)
    ]
    lines = [["AUROC by side, shape, edges", "", *names]]
    for method in methods:
        shares = (rows[method, MEAN, kind]["pixel_auroc"] for kind in kinds)
        lines.append([method, "", *(f"{100 * share:.1f}" for share in shares)])
    return lines


def _format_numbers(row: Mapping[str, Any]) -> list[str]:
    """Format the metrics of a row; pixel AUROC with its interval."""
    numbers = [f"{100 * row[key]:.1f}" for key in METRICS]
    numbers[0] += f" {format_margin(row, METRICS[0], 1)}"
    return numbers


def _format_lead(lead: Mapping[str, Any]) -> str:
    """Format a difference in pixel AUROC with its interval."""
    return f"{100 * lead[METRICS[0]]:+.1f} {format_margin(lead, METRICS[0], 1)}"
