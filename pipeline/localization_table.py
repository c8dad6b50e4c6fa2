"""Table of ``localize``: rows, means, leads and sanity checks, as JSON and as text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ood_heatmap.localization import METRICS
from ood_heatmap.metrics import intervals
from ood_heatmap.patches import SIDES, SQUARES
from ood_heatmap.pipeline.pixel_methods import SHUFFLED, SWAPPED
from ood_heatmap.pipeline.scoring import HEATMAP
from ood_heatmap.pipeline.tables import MEAN, align_columns, format_margin

_Float64 = NDArray[np.float64]
_HEADS = ("AUROC", "AUPRO", "pointing")


@dataclass(frozen=True)
class LocalizationRow:
    """One row of the localisation table: a method on a set, for one kind of patch, or a mean.

    Args:
        method: Name of the method.
        set: Name of the OOD set, or ``mean``.
        side: The patch's side as a share of the image's, or ``mean``.
        edges: ``hard``, ``blended`` or ``mean``.
        metrics: Metrics in [0, 1], by name.
        resampled: Metrics of resampled images, ``(R, 3)``; averaged for a mean.
    """

    method: str
    set: str
    side: float | str
    edges: str
    metrics: Mapping[str, float]
    resampled: _Float64

    def to_json(self) -> dict[str, Any]:
        """Return the row for ``localization.json``, with 95 % intervals."""
        where = {key: getattr(self, key) for key in ("method", "set", "side", "edges")}
        return {
            **where,
            **self.metrics,
            "intervals": intervals(METRICS, self.resampled),
        }


def with_means(cells: Sequence[LocalizationRow], names: Sequence[str]) -> list[LocalizationRow]:
    """Return the rows with their means over sets, sizes, edges and every combination of these."""
    methods = list(dict.fromkeys(row.method for row in cells))
    sides: list[float | str] = [*SIDES, MEAN]
    table = []
    for method, name, side, edges in product(
        methods, [*names, MEAN], sides, [*SQUARES.edges, MEAN]
    ):
        chosen = [
            row
            for row in cells
            if row.method == method
            and name in (row.set, MEAN)
            and side in (row.side, MEAN)
            and edges in (row.edges, MEAN)
        ]
        means = {key: float(np.mean([row.metrics[key] for row in chosen])) for key in METRICS}
        resampled = np.mean([row.resampled for row in chosen], axis=0)
        table.append(LocalizationRow(method, name, side, edges, means, resampled))
    return table


def _overall(table: Sequence[LocalizationRow], method: str) -> LocalizationRow:
    """Return the row of a method with its means over all sets, sizes and edges."""
    everything = (method, MEAN, MEAN, MEAN)
    return next(row for row in table if (row.method, row.set, row.side, row.edges) == everything)


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


def lowered_by_sanity_checks(table: Sequence[LocalizationRow]) -> dict[str, float]:
    """Return the decrease of the heatmap's overall pixel AUROC in each sanity check."""
    auroc = _overall(table, HEATMAP).metrics["pixel_auroc"]
    return {
        method: auroc - _overall(table, method).metrics["pixel_auroc"]
        for method in (SHUFFLED, SWAPPED)
    }


def format_localization(content: Mapping[str, Any]) -> str:
    """Format the table of ``localization.json`` for the terminal, in percent, with intervals."""
    rows = {
        (row["method"], row["set"], row["side"]): row
        for row in content["table"]
        if row["edges"] == MEAN
    }
    pairs = dict.fromkeys((method, name) for method, name, _ in rows)
    heads = ["method", "set", *(f"AUROC {100 * side:g} %" for side in SIDES)]
    lines = [[*heads, *_HEADS]]
    for method, name in sorted(pairs, key=lambda pair: pair[1] == MEAN):
        by_side = [rows[method, name, side]["pixel_auroc"] for side in SIDES]
        whole = rows[method, name, MEAN]
        lines.append(
            [
                method,
                name,
                *(f"{100 * share:.1f}" for share in by_side),
                *(f"{100 * whole[key]:.1f} {format_margin(whole, key, 1)}" for key in METRICS),
            ]
        )
    ahead = [["heatmap ahead of", "", *_HEADS]]
    for method, lead in content["leads"].items():
        metrics = (f"{100 * lead[key]:+.1f} {format_margin(lead, key, 1)}" for key in METRICS)
        ahead.append([method, "", *metrics])
    return f"{align_columns(lines)}\n\n{align_columns(ahead)}"
