"""Tables of ``evaluate``: rows, means, intervals, as JSON and as text."""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ood_heatmap.baselines import METHODS
from ood_heatmap.calibration import Calibration, num_needed
from ood_heatmap.metrics import (
    METRICS,
    RankedScores,
    bootstrap_weights,
    detection_metrics,
    intervals,
    weighted_metrics,
)
from ood_heatmap.pipeline.config import EvaluateConfig
from ood_heatmap.pipeline.scoring import (
    COMBINED,
    HEATMAP,
    ID,
    SUM,
    ScoredSet,
    default_score,
    name_of_run,
)

_ID_POSITIVE = ("auroc", "aupr_in", "fpr95_id_pos")
_OOD_POSITIVE = ("auroc", "aupr_out", "fpr95_ood_pos")
_HEADLINES = {"all": METRICS, "paper": _ID_POSITIVE, "openood": _OOD_POSITIVE}
# resamples per chunk: few enough that they stay in the CPU cache
_CHUNK = 25
MEAN = "mean"

# (B,) by method
Scores = Mapping[str, NDArray[np.floating[Any]]]
_Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class DetectionRow:
    """One row of the detection table: a method on a set, or its mean over sets.

    Args:
        method: Name of the method.
        set: Name of the set, or ``mean near``, ``mean far``, ``mean all``.
        metrics: Metrics in [0, 1]; for several runs their mean.
        intervals: 95 % bootstrap interval of each metric.
        spread: Standard deviation of each metric over the runs; empty for one run.
        runs: The metrics of each run; empty for one run.
        lead: Metrics of the default score minus these, and under ``intervals`` their intervals;
            empty for the default score itself.
    """

    method: str
    set: str
    metrics: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]
    spread: Mapping[str, float]
    runs: Mapping[str, Sequence[float]]
    lead: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the row for ``metrics.json``, without empty fields."""
        more = {
            "intervals": self.intervals,
            "spread": self.spread,
            "runs": self.runs,
            "lead": self.lead,
        }
        content = {key: value for key, value in more.items() if value}
        return {"method": self.method, "set": self.set, **self.metrics, **content}


def metrics_table(scores: Mapping[str, Scores], config: EvaluateConfig) -> list[DetectionRow]:
    """Return the metrics of every method on every OOD set, and their means over near, far and all.

    Args:
        scores: Scores by set, including ``id``, and by method; every method in it is shown.
        config: Settings of the stage: near sets, protocol and number of resamples.
    """
    ood = [name for name in scores if name != ID]
    methods = _columns(scores[ID])
    columns = [column for names in methods.values() for column in names]
    resampled = _bootstrap(scores, columns, config)
    rows, means = [], {}
    for method, names in methods.items():
        exact = [
            [asdict(detection_metrics(scores[ID][key], scores[name][key])) for name in ood]
            for key in names
        ]
        # (runs, OOD sets, METRICS)
        values = np.array([[[cell[key] for key in METRICS] for cell in run] for run in exact])
        of_method = resampled[:, [columns.index(key) for key in names]]
        for name, chosen in _groups(ood, config).items():
            # a mean over sets has no counts
            counts = exact[0][chosen[0]] if name in ood else {}
            mean = means[method, name] = of_method[:, :, chosen].mean(axis=(1, 2))
            rows.append(_make_row(method, name, values[:, chosen].mean(axis=1), mean, counts))
    return _with_leads(rows, means)


def _with_leads(
    rows: Sequence[DetectionRow], means: Mapping[tuple[str, str], _Float64]
) -> list[DetectionRow]:
    """Add the lead of the default score over each other row of the same set.

    Both share the resampled images, so the interval of the difference is narrower than their
    separate intervals suggest.

    Args:
        rows: The rows.
        means: Metrics of resampled images by method and set, ``(resamples, METRICS)``.
    """
    default = default_score([row.method for row in rows])
    ours = {row.set: row for row in rows if row.method == default}
    return [
        replace(row, lead=_lead(ours[row.set], row, means))
        if row.set in ours and row.method != default
        else row
        for row in rows
    ]


def _lead(
    ours: DetectionRow, other: DetectionRow, means: Mapping[tuple[str, str], _Float64]
) -> dict[str, Any]:
    """Return the metrics of the default score minus another's, with their intervals."""
    difference = means[ours.method, ours.set] - means[other.method, other.set]
    return {
        **{key: ours.metrics[key] - other.metrics[key] for key in METRICS},
        "intervals": intervals(METRICS, difference),
    }


def _columns(scores: Scores) -> dict[str, list[str]]:
    """Return the names of the scores behind each method of the table.

    There is one, except for the heatmap over several runs.
    """
    runs = [HEATMAP]
    while name_of_run(len(runs)) in scores:
        runs.append(name_of_run(len(runs)))
    several = {f"{HEATMAP}, {len(runs)} runs": runs} if len(runs) > 1 else {}
    others = {name: [name] for name in scores if name not in runs}
    return {HEATMAP: [HEATMAP], **several, **others}


def _groups(ood: Sequence[str], config: EvaluateConfig) -> dict[str, list[int]]:
    """Return the positions of the sets behind each row of a method: single sets and means."""
    near = [number for number, name in enumerate(ood) if name in config.near]
    far = [number for number, name in enumerate(ood) if name not in config.near]
    groups = {name: [number] for number, name in enumerate(ood)}
    if near or config.protocol == "openood":
        means = {"mean near": near, "mean far": far}
        groups |= {name: chosen for name, chosen in means.items() if chosen}
    return groups | {"mean all": list(range(len(ood)))}


def _bootstrap(
    scores: Mapping[str, Scores], columns: Sequence[str], config: EvaluateConfig
) -> _Float64:
    """Return the metrics of resampled images, ``(resamples, columns, OOD sets, METRICS)``.

    All methods share the resampled images, and all sets share the ID images: methods can then be
    compared, and means over sets have the right variance.
    """
    ranked = {
        name: [RankedScores.rank(values[key]) for key in columns] for name, values in scores.items()
    }
    ood = [name for name in scores if name != ID]

    def resample(chunk: int) -> _Float64:
        generator = np.random.default_rng([config.seed, chunk])
        weights = {
            name: bootstrap_weights(len(values[HEATMAP]), _CHUNK, generator)
            for name, values in scores.items()
        }
        metrics = [
            weighted_metrics(id_scores, of_sets, weights[ID], [weights[name] for name in ood])
            for id_scores, *of_sets in zip(ranked[ID], *(ranked[name] for name in ood), strict=True)
        ]
        return np.stack(metrics, axis=1)

    num_chunks = -(-config.resamples // _CHUNK)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return np.concatenate(list(pool.map(resample, range(num_chunks))))[: config.resamples]


def _make_row(
    method: str, name: str, each: _Float64, resampled: _Float64, counts: Mapping[str, Any]
) -> DetectionRow:
    """Return a row of the table.

    Args:
        method: Name of the method.
        name: Name of the set or mean.
        each: Metrics of each run, ``(runs, METRICS)``.
        resampled: Metrics of resampled images, ``(resamples, METRICS)``.
        counts: Further numbers of the set, without an interval.
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
    """Return the thresholds at a level, and the resulting decisions on test images.

    Thresholds and rates are None if there are too few held-out images for the level.

    Args:
        scored: Scores by set, including ``id``.
        calibration: Calibration on other ID images.
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
    # without a threshold there is no decision, which is not the same as ID
    if not calibration.has_threshold(level):
        return content
    threshold, pixel_threshold = calibration.threshold(level), calibration.pixel_threshold(level)
    flagged = {name: _share(item.default > threshold) for name, item in scored.items()}
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
    # here: a third of a second
    from scipy.stats import binomtest

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
    """Return the first part of ``metrics.json``: the table and what its columns mean."""
    methods: dict[str, dict[str, Any]] = {
        method.name: {"label": method.label, "sees_ood": method.sees_ood}
        for method in METHODS
        if method.name in id_set.scores
    }
    methods["knn"] |= {"label": f"kNN (k = {neighbours})", "neighbours": neighbours}
    methods[SUM] = {"label": "sum of three", "sees_ood": False}
    if COMBINED in id_set.scores:
        methods[COMBINED] = {"label": "combined", "sees_ood": True}
    known = id_set.label >= 0
    right = id_set.prediction[known] == id_set.label[known]
    return {
        "about": "scores: larger is more OOD. fpr95_id_pos takes ID as the positive class (paper), "
        "fpr95_ood_pos takes OOD (OpenOOD). aupr_in and aupr_out are average precision. Shares in "
        "[0, 1]. intervals: 95 %, bootstrap over images. spread: standard deviation over runs. "
        "lead: the metric of the default score minus that of the row.",
        "default": default_score(id_set.scores),
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


def format_label(method: str, content: Mapping[str, Any]) -> str:
    """Return the label of a method in tables and figures.

    Args:
        method: Name of the method.
        content: Content of ``metrics.json``.
    """
    label: str = content["methods"].get(method, {}).get("label", method)
    return label


def align_columns(lines: Sequence[Sequence[str]]) -> str:
    """Align cells in columns: the first, which is a name, left; numbers right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            text.rjust(width) if column else text.ljust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def format_margin(row: Mapping[str, Any], key: str, digits: int = 2) -> str:
    """Format the uncertainty of a metric, in percent: its spread over runs, or its interval."""
    if "spread" in row:
        return f"± {100 * row['spread'][key]:.{digits}f}"
    low, high = row["intervals"][key]
    return f"[{100 * low:.{digits}f}, {100 * high:.{digits}f}]"


def format_decisions(decisions: Mapping[str, Any]) -> str:
    """Format the thresholds and the resulting rates as a line for the terminal."""
    num_calibration, level = decisions["num_calibration"], decisions["level"]
    if decisions["threshold"] is None:
        return (
            f"no threshold: {num_calibration} held-out ID images are too few for a level of "
            f"{level:g}, which needs {decisions['num_needed']}"
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
