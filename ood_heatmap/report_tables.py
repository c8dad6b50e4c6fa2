"""Tables of the report: rows of ``metrics.json`` and ``localization.json`` as cells of text."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ood_heatmap.verdict import default_method, distinct_groups, format_points, fpr_key

_MEAN = "mean"
_Row = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """One metric of a table.

    Args:
        key: Its key in a row.
        head: Heading.
        note: Second line of the heading.
        sign: 1 if higher is better, -1 if lower is.
    """

    key: str
    head: str
    note: str = ""
    sign: int = 1


@dataclass(frozen=True)
class Cell:
    """One number of a table, in percent.

    Args:
        text: The number; "" if it is missing.
        margin: Its uncertainty: the spread over runs, otherwise the 95 % interval; "" without.
        is_best: Whether it is the best of its column as displayed, also if tied.
    """

    text: str
    margin: str = ""
    is_best: bool = False


@dataclass(frozen=True)
class Line:
    """One row of a table.

    Args:
        method: Label of the method.
        cells: Its cells.
        is_default: Whether the detector decides with this method.
        sees_ood: Whether the method is fitted on auxiliary OOD images.
        more: A further cell of text.
    """

    method: str
    cells: Sequence[Cell]
    is_default: bool = False
    sees_ood: bool = False
    more: str = ""


ALL_METRICS = (
    Column("auroc", "AUROC"),
    Column("aupr_in", "AUPR-IN", "ID positive"),
    Column("aupr_out", "AUPR-OUT", "OOD positive"),
    Column("fpr95_id_pos", "FPR95", "ID positive", -1),
    Column("fpr95_ood_pos", "FPR95", "OOD positive", -1),
)
_PIXEL_METRICS = (
    Column("pixel_auroc", "pixel AUROC"),
    Column("shuffled_auroc", "shuffled AUROC"),
    Column("aupro", "AUPRO"),
    Column("pointing", "pointing"),
)


def method_label(method: str, metrics: Mapping[str, Any]) -> str:
    """Return the label of a method in tables and plots.

    Args:
        method: Name of the method.
        metrics: Content of ``metrics.json``.
    """
    label: str = metrics.get("methods", {}).get(method, {}).get("label", method)
    return label


@dataclass(frozen=True)
class Summary:
    """The table of methods by sets, the best method on average first.

    Args:
        sets: Names of the sets and means, means first.
        columns: AUROC and FPR95.
        lines: One line for each method, with the cells of ``columns`` for each set.
        lead_over: Label of the default score, whose lead is ``Line.more``; "" without leads.
    """

    sets: Sequence[str]
    columns: Sequence[Column]
    lines: Sequence[Line]
    lead_over: str


def summary_table(metrics: Mapping[str, Any]) -> Summary:
    """Return AUROC and FPR95 of each method on each set, with the best marked."""
    rows: Sequence[_Row] = metrics["table"]
    sets = sorted(distinct_groups(metrics), key=lambda name: -_mean_first(name))
    fpr = fpr_key(metrics)
    columns = [column for column in ALL_METRICS if column.key in ("auroc", fpr)]
    by_place = {(row["method"], row["set"]): row for row in rows}
    default = default_method(metrics)
    # of methods that are printed alike the default first
    methods = sorted(
        _unique(row["method"] for row in rows),
        key=lambda method: (
            -round(_number(by_place.get((method, sets[0]), {}), "auroc"), 3),
            method != default,
        ),
    )
    cells = {
        (name, column.key): _cells(
            column, [by_place.get((method, name), {}) for method in methods], digits=1
        )
        for name in sets
        for column in columns
    }
    lines = [
        Line(
            method_label(method, metrics),
            [column_cells[number] for column_cells in cells.values()],
            is_default=method == default,
            sees_ood=metrics.get("methods", {}).get(method, {}).get("sees_ood", False),
            more=_lead(by_place.get((method, sets[0]), {})),
        )
        for number, method in enumerate(methods)
    ]
    has_leads = any(line.more for line in lines)
    return Summary(sets, columns, lines, method_label(default, metrics) if has_leads else "")


def _mean_first(name: str) -> int:
    return ("mean far", "mean near", "mean all").index(name) + 1 if name.startswith("mean ") else 0


def _lead(row: _Row) -> str:
    """Format the lead of the default score over a row in percentage points."""
    lead = row.get("lead")
    if not lead:
        return ""
    low, high = (format_points(100 * end) for end in lead["intervals"]["auroc"])
    return f"{format_points(100 * lead['auroc'], '+')} [{low}, {high}]"


@dataclass(frozen=True)
class Group:
    """The lines of one set, with all metrics; ``more`` is the share of OOD images."""

    name: str
    lines: Sequence[Line]


def full_table(metrics: Mapping[str, Any]) -> list[Group]:
    """Return every metric of every method with its uncertainty, by set."""
    groups = []
    for name in _unique(row["set"] for row in metrics["table"]):
        rows = [row for row in metrics["table"] if row["set"] == name]
        columns = [_cells(column, rows, digits=2) for column in ALL_METRICS]
        lines = [
            Line(
                method_label(row["method"], metrics),
                [cells[number] for cells in columns],
                is_default=row["method"] == default_method(metrics),
                more=_percent(row.get("prevalence_ood"), 1),
            )
            for number, row in enumerate(rows)
        ]
        groups.append(Group(name, lines))
    return groups


@dataclass(frozen=True)
class Localization:
    """The table of ``localize``: one group for each set, the mean over OOD sets first."""

    columns: Sequence[Column]
    groups: Sequence[Group]
    leads: Sequence[Line]
    meaning: str


def localization_table(content: Mapping[str, Any]) -> Localization:
    """Return the means over all kinds of patches, with intervals.

    Args:
        content: Content of ``localization.json``, also of earlier versions.
    """
    rows = [row for row in content["table"] if _is_overall(row)]
    columns = [column for column in _PIXEL_METRICS if any(column.key in row for row in rows)]
    names = sorted(_unique(row["set"] for row in rows), key=lambda name: name != _MEAN)
    groups = []
    for name in names:
        chosen = [row for row in rows if row["set"] == name]
        cells = [_cells(column, chosen, digits=1) for column in columns]
        lines = [
            Line(row["method"], [one[number] for one in cells], row["method"] == "heatmap")
            for number, row in enumerate(chosen)
        ]
        groups.append(Group("other ID images" if name == "id" else name, lines))
    leads = [
        Line(
            method,
            [Cell(format_points(100 * lead[c.key], "+"), _margin(lead, c.key, 1)) for c in columns],
        )
        for method, lead in content.get("leads", {}).items()
    ]
    meaning = (content.get("id_on_id") or {}).get("meaning", "")
    return Localization(columns, groups, leads, meaning)


def _is_overall(row: _Row) -> bool:
    """Return whether a row is the mean over all sides, shapes and edges of patches."""
    return all(row.get(key, _MEAN) == _MEAN for key in ("side", "shape", "edges"))


def _unique(names: Iterable[str]) -> list[str]:
    """Return each name once, in order of first appearance."""
    return list(dict.fromkeys(names))


def _number(row: _Row, key: str) -> float:
    """Return a metric; negative infinity, which is the last place, if it is missing."""
    value = row.get(key)
    return -math.inf if value is None or math.isnan(value) else float(value)


def _percent(share: float | None, digits: int) -> str:
    """Format a share in [0, 1] in percent; "" if it is missing."""
    return "" if share is None or math.isnan(share) else f"{100 * share:.{digits}f}"


def _cells(column: Column, rows: Sequence[_Row], *, digits: int) -> list[Cell]:
    """Return the cells of a column; equal after rounding counts as tied."""
    texts = [_percent(row.get(column.key), digits) for row in rows]
    known = [text for text in texts if text]
    best = (max if column.sign > 0 else min)(known, key=float, default=None)
    return [
        Cell(text, _margin(row, column.key, digits), text == best)
        for text, row in zip(texts, rows, strict=True)
    ]


def _margin(row: _Row, key: str, digits: int) -> str:
    """Format the uncertainty of a metric: its spread over runs, otherwise its interval."""
    if "spread" in row:
        return f"± {_percent(row['spread'].get(key), digits)}"
    ends = [_percent(end, digits) for end in row.get("intervals", {}).get(key, ())]
    return f"[{ends[0]}, {ends[1]}]" if ends else ""
