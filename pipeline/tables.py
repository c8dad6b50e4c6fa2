"""The tables of an evaluation and of a localisation: rows, means, intervals, JSON and terminal."""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from ood_heatmap.baselines import METHODS
from ood_heatmap.calibration import Calibration, num_needed
from ood_heatmap.localization import METRICS as PIXEL_METRICS
from ood_heatmap.metrics import (
    METRICS,
    bootstrap_weights,
    detection_metrics,
    intervals,
    weighted_metrics,
)
from ood_heatmap.patches import EDGES, SIDES
from ood_heatmap.pipeline.config import EvaluateConfig
from ood_heatmap.pipeline.scoring import HEATMAP, ID, SHUFFLED, SWAPPED, ScoredSet, name_of_run

_HEADS = {
    "auroc": "AUROC",
    "aupr_in": "AUPR-IN",
    "aupr_out": "AUPR-OUT",
    "fpr95_id_pos": "FPR95 ID+",
    "fpr95_ood_pos": "FPR95 OOD+",
}
_ID_POSITIVE = ("auroc", "aupr_in", "fpr95_id_pos")
_OOD_POSITIVE = ("auroc", "aupr_out", "fpr95_ood_pos")
_HEADLINES = {"all": METRICS, "paper": _ID_POSITIVE, "openood": _OOD_POSITIVE}
_STEP = 25  # resamples at once: few enough that they stay in the processor's cache
MEAN = "mean"
_LOCALIZATION_HEADS = ("AUROC", "AUPRO", "pointing")

Scores = Mapping[str, NDArray[np.floating[Any]]]  # by method, (B,) each
_Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class DetectionRow:
    """One line of the table: a method on a set, or a mean over sets; shares in [0, 1].

    Args:
        method: Its name.
        set: A set's name, or ``mean near``, ``mean far``, ``mean all``.
        metrics: Of the set; for several runs their mean.
        intervals: 95 % bootstrap interval of each metric.
        spread: Standard deviation over the runs, for each metric; empty for one run.
        runs: The metrics of each run; empty for one run.
    """

    method: str
    set: str
    metrics: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]
    spread: Mapping[str, float]
    runs: Mapping[str, Sequence[float]]

    def to_json(self) -> dict[str, Any]:
        """Return the row for ``metrics.json``, without what it does not have."""
        more = {"intervals": self.intervals, "spread": self.spread, "runs": self.runs}
        content = {key: value for key, value in more.items() if value}
        return {"method": self.method, "set": self.set, **self.metrics, **content}


def metrics_table(scores: Mapping[str, Scores], config: EvaluateConfig) -> list[DetectionRow]:
    """Return the metrics of every method on every OOD set, and their means over near, far and all.

    Args:
        scores: By set, ``id`` among them, and by method; every method that is there is shown.
        config: Names the near sets, the protocol, and the number of resamples.
    """
    ood = [name for name in scores if name != ID]
    methods = _columns(scores[ID])
    columns = [column for names in methods.values() for column in names]
    resampled = _bootstrap(scores, columns, config)
    rows = []
    for method, names in methods.items():
        exact = [
            [asdict(detection_metrics(scores[ID][key], scores[name][key])) for name in ood]
            for key in names
        ]
        values = np.array([[[one[key] for key in METRICS] for one in line] for line in exact])
        drawn = resampled[:, [columns.index(key) for key in names]]
        for name, chosen in _groups(ood, config).items():
            counts = exact[0][chosen[0]] if name in ood else {}  # a mean over sets has none
            mean = drawn[:, :, chosen].mean(axis=(1, 2))
            rows.append(_make_row(method, name, values[:, chosen].mean(axis=1), mean, counts))
    return rows


def _columns(scores: Scores) -> dict[str, list[str]]:
    """Return the names of the scores that each method of the table is made of.

    One, but for the heatmap over several runs.
    """
    runs = [HEATMAP]
    while name_of_run(len(runs)) in scores:
        runs.append(name_of_run(len(runs)))
    several = {f"{HEATMAP}, {len(runs)} runs": runs} if len(runs) > 1 else {}
    others = {name: [name] for name in scores if name not in runs}
    return {HEATMAP: [HEATMAP], **several, **others}


def _groups(ood: Sequence[str], config: EvaluateConfig) -> dict[str, list[int]]:
    """Return the lines of a method: positions of each set alone, and of the sets of each mean."""
    every = list(range(len(ood)))
    near = [number for number in every if ood[number] in config.near]
    groups = {name: [number] for number, name in enumerate(ood)}
    if near or config.protocol == "openood":
        split = {"mean near": near, "mean far": [one for one in every if one not in near]}
        groups |= {name: chosen for name, chosen in split.items() if chosen}
    return groups | {"mean all": every}


def _bootstrap(
    scores: Mapping[str, Scores], columns: Sequence[str], config: EvaluateConfig
) -> _Float64:
    """Return the metrics of resampled images, ``(resamples, columns, OOD sets, METRICS)``.

    An image that is drawn is drawn for every method, and an ID image for every set: the means over
    sets then vary as they should, and methods can be compared.
    """
    ood = [name for name in scores if name != ID]

    def resample(step: int) -> _Float64:
        generator = np.random.default_rng([config.seed, step])
        weights = {
            name: bootstrap_weights(len(values[HEATMAP]), _STEP, generator)
            for name, values in scores.items()
        }
        metrics = np.empty((_STEP, len(columns), len(ood), len(METRICS)))
        for column, key in enumerate(columns):
            for number, name in enumerate(ood):
                found = weighted_metrics(
                    scores[ID][key], scores[name][key], weights[ID], weights[name]
                )
                metrics[:, column, number] = np.stack(list(found.values()), axis=1)
        return metrics

    num_steps = -(-config.resamples // _STEP)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return np.concatenate(list(pool.map(resample, range(num_steps))))[: config.resamples]


def _make_row(
    method: str, name: str, each: _Float64, resampled: _Float64, counts: Mapping[str, Any]
) -> DetectionRow:
    """Return a line of the table.

    Args:
        method: Its name.
        name: Of the set or mean.
        each: ``(runs, METRICS)``.
        resampled: ``(resamples, METRICS)``.
        counts: Metrics of the set that have no interval.
    """
    metrics = dict(zip(METRICS, each.mean(axis=0).tolist(), strict=True))
    several = METRICS if len(each) > 1 else ()
    spread = {key: float(each[:, number].std(ddof=1)) for number, key in enumerate(several)}
    runs = {key: each[:, number].tolist() for number, key in enumerate(several)}
    return DetectionRow(
        method, name, {**counts, **metrics}, intervals(METRICS, resampled), spread, runs
    )


def decisions(
    scored: Mapping[str, ScoredSet], calibration: Calibration, level: float
) -> dict[str, Any]:
    """Return the thresholds at a level, and what they do to images that they have not seen.

    All of it is None where there are too few held-out images for the level.

    Args:
        scored: By set, ``id`` among them.
        calibration: Of other ID images.
        level: Allowed share of false alarms.
    """
    content: dict[str, Any] = {
        "level": level,
        "num_calibration": len(calibration.scores),
        "num_needed": num_needed(level),
        "threshold": None,
        "pixel_threshold": None,
        "false_alarm": None,
        "pixel_false_alarm": None,
        "detection": None,
    }
    if not calibration.has_threshold(level):  # no decision, not "ID"
        return content
    threshold, pixel_threshold = calibration.threshold(level), calibration.pixel_threshold(level)
    flagged = {name: _share(item.scores[HEATMAP] > threshold) for name, item in scored.items()}
    return content | {
        "threshold": threshold,
        "pixel_threshold": pixel_threshold,
        "false_alarm": flagged.pop(ID),
        "pixel_false_alarm": _share(scored[ID].max_pixel_score > pixel_threshold),
        "detection": flagged,
    }


def _share(flagged: NDArray[np.bool_]) -> dict[str, Any]:
    """Return the share of flagged images with its 95 % binomial interval.

    Source: Clopper and Pearson, The Use of Confidence or Fiducial Limits, Biometrika 1934.
    """
    count, total = int(flagged.sum()), len(flagged)
    ends = binomtest(count, total).proportion_ci(0.95, method="exact")
    return {
        "rate": count / total,
        "interval": [float(ends.low), float(ends.high)],
        "num_images": total,
    }


def metrics_json(
    table: Sequence[DetectionRow], id_set: ScoredSet, neighbours: int, config: EvaluateConfig
) -> dict[str, Any]:
    """Return the first part of ``metrics.json``: the table, and how to read it."""
    methods: dict[str, dict[str, Any]] = {
        method.name: {"label": method.label, "sees_ood": method.sees_ood} for method in METHODS
    }
    methods["knn"] |= {"label": f"kNN (k = {neighbours})", "neighbours": neighbours}
    known = id_set.label >= 0
    right = id_set.prediction[known] == id_set.label[known]
    return {
        "about": "scores: larger is more OOD. fpr95_id_pos takes ID as the positive class (paper), "
        "fpr95_ood_pos takes OOD (OpenOOD). aupr_in and aupr_out are average precision. Shares in "
        "[0, 1]. intervals: 95 %, bootstrap over images. spread: standard deviation over runs.",
        "protocol": config.protocol,
        "headline": list(_HEADLINES[config.protocol]),
        "resamples": config.resamples,
        "seed": config.seed,
        "id_accuracy": float((id_set.label == id_set.prediction)[known].mean())
        if known.any()
        else None,
        "id_labelled": len(right),
        "near": list(config.near),
        "methods": methods,
        "table": [row.to_json() for row in table],
    }


def format_table(content: Mapping[str, Any]) -> str:
    """Return ``metrics.json`` as the table that the terminal shows, in percent.

    AUROC has its interval, or the spread over several runs. The protocol's headline comes first.
    """
    first: list[str] = content["headline"]
    keys = [*first, *(key for key in METRICS if key not in first)]
    lines = [("method", "set", *(_HEADS[key] for key in keys), "OOD share")]
    for row in content["table"]:
        numbers = [f"{100 * row[key]:.2f}" for key in keys]
        numbers[0] += f" {_margin(row, 'auroc')}"
        prevalence = f"{100 * row['prevalence_ood']:.1f}" if "prevalence_ood" in row else ""
        lines.append((format_label(row["method"], content), row["set"], *numbers, prevalence))
    return _aligned(lines)


def format_label(method: str, content: Mapping[str, Any]) -> str:
    """Return what a method is called in tables and figures.

    Args:
        method: Its name.
        content: Of ``metrics.json``.
    """
    label: str = content["methods"].get(method, {}).get("label", method)
    return label


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    """Return cells in columns: the first two, which are names, to the left; numbers, right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            text.ljust(width) if column < 2 else text.rjust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _margin(row: Mapping[str, Any], key: str, digits: int = 2) -> str:
    """Return how far to trust a metric, in percent: its spread over runs, or else its interval."""
    if "spread" in row:
        return f"± {100 * row['spread'][key]:.{digits}f}"
    low, high = row["intervals"][key]
    return f"[{100 * low:.{digits}f}, {100 * high:.{digits}f}]"


def format_decisions(decisions: Mapping[str, Any]) -> str:
    """Return what the thresholds do, as a line for the terminal."""
    num_calibration, level = decisions["num_calibration"], decisions["level"]
    if decisions["threshold"] is None:
        return (
            f"no threshold: {num_calibration} held-out ID images are too few for a level of "
            f"{level:g}, which takes {decisions['num_needed']}"
        )
    false_alarm = decisions["false_alarm"]
    low, high = false_alarm["interval"]
    detections = ", ".join(
        f"{name} {100 * one['rate']:.1f} %" for name, one in decisions["detection"].items()
    )
    return (
        f"threshold {decisions['threshold']:.4g} (from {num_calibration} held-out ID images, level "
        f"{level:g}): false alarms {100 * false_alarm['rate']:.1f} % "
        f"[{100 * low:.1f}, {100 * high:.1f}], detections {detections}"
    )


@dataclass(frozen=True)
class LocalizationRow:
    """One line of the table: a method on a set, for patches of one size and kind, or a mean.

    Args:
        method: What was measured.
        set: Name of the OOD set, or ``mean``.
        side: The patch's side as a share of the image's, or ``mean``.
        edges: ``hard``, ``blended`` or ``mean``.
        metrics: Metric to share in [0, 1].
        resampled: The same of resampled images, ``(R, 3)``; of a mean the mean.
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
            "intervals": intervals(PIXEL_METRICS, self.resampled),
        }


def with_means(cells: Sequence[LocalizationRow], names: Sequence[str]) -> list[LocalizationRow]:
    """Return the rows with their means over sets, sizes, edges and every combination of these."""
    methods = list(dict.fromkeys(row.method for row in cells))
    sides: list[float | str] = [*SIDES, MEAN]
    table = []
    for method, name, side, edges in product(methods, [*names, MEAN], sides, [*EDGES, MEAN]):
        mine = [
            row
            for row in cells
            if row.method == method
            and name in (row.set, MEAN)
            and side in (row.side, MEAN)
            and edges in (row.edges, MEAN)
        ]
        means = {key: float(np.mean([row.metrics[key] for row in mine])) for key in PIXEL_METRICS}
        resampled = np.mean([row.resampled for row in mine], axis=0)
        table.append(LocalizationRow(method, name, side, edges, means, resampled))
    return table


def _overall(table: Sequence[LocalizationRow], method: str) -> LocalizationRow:
    """Return the means of a method over everything."""
    everything = (method, MEAN, MEAN, MEAN)
    return next(row for row in table if (row.method, row.set, row.side, row.edges) == everything)


def heatmap_leads(table: Sequence[LocalizationRow]) -> dict[str, dict[str, Any]]:
    """Return by how much the heatmap is ahead of each other method, with 95 % intervals.

    Of the means over everything. The same images were drawn for both, so the interval of the
    difference is narrower than the two beside each other suggest.
    """
    own, found = _overall(table, HEATMAP), {}
    for method in dict.fromkeys(row.method for row in table if row.method != HEATMAP):
        other = _overall(table, method)
        found[method] = {
            **{key: own.metrics[key] - other.metrics[key] for key in PIXEL_METRICS},
            "intervals": intervals(PIXEL_METRICS, own.resampled - other.resampled),
        }
    return found


def lowered_by_sanity_checks(table: Sequence[LocalizationRow]) -> dict[str, float]:
    """Return by how much each sanity check lowers the heatmap's overall pixel AUROC."""
    own = _overall(table, HEATMAP).metrics["pixel_auroc"]
    return {
        method: own - _overall(table, method).metrics["pixel_auroc"]
        for method in (SHUFFLED, SWAPPED)
    }


def format_localization(content: Mapping[str, Any]) -> str:
    """Return ``localization.json`` as the table of the terminal, in percent, with intervals."""
    rows = {
        (row["method"], row["set"], row["side"]): row
        for row in content["table"]
        if row["edges"] == MEAN
    }
    pairs = dict.fromkeys((method, name) for method, name, _ in rows)
    heads = ["method", "set", *(f"AUROC {100 * side:g} %" for side in SIDES)]
    lines = [[*heads, *_LOCALIZATION_HEADS]]
    for method, name in sorted(pairs, key=lambda pair: pair[1] == MEAN):
        by_side = [rows[method, name, side]["pixel_auroc"] for side in SIDES]
        whole = rows[method, name, MEAN]
        lines.append(
            [
                method,
                name,
                *(f"{100 * share:.1f}" for share in by_side),
                *(f"{100 * whole[key]:.1f} {_margin(whole, key, 1)}" for key in PIXEL_METRICS),
            ]
        )
    ahead = [["heatmap ahead of", "", *_LOCALIZATION_HEADS]]
    for method, lead in content["leads"].items():
        metrics = (f"{100 * lead[key]:+.1f} {_margin(lead, key, 1)}" for key in PIXEL_METRICS)
        ahead.append([method, "", *metrics])
    return f"{_aligned(lines)}\n\n{_aligned(ahead)}"
