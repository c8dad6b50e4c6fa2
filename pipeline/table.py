"""The table of an evaluation: every method on every set, with intervals; and the decisions."""

import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from ood_heatmap.calibration import Calibration
from ood_heatmap.metrics import (
    METRICS,
    bootstrap_weights,
    detection_metrics,
    intervals,
    weighted_metrics,
)
from ood_heatmap.pipeline.config import EvaluateConfig

ID, HEATMAP = "id", "heatmap"
METHODS = (
    *(HEATMAP, "msp", "max_logit", "energy", "knn", "mahalanobis", "vim", "react", "ash"),
    *("logistic_regression", "mlp"),
)
HEADS = {
    "auroc": "AUROC",
    "aupr_in": "AUPR-IN",
    "aupr_out": "AUPR-OUT",
    "fpr95_id_pos": "FPR95 ID+",
    "fpr95_ood_pos": "FPR95 OOD+",
}
ID_POSITIVE = ("auroc", "aupr_in", "fpr95_id_pos")
OOD_POSITIVE = ("auroc", "aupr_out", "fpr95_ood_pos")
HEADLINES = {"all": METRICS, "paper": ID_POSITIVE, "openood": OOD_POSITIVE}
STEP = 25  # resamples at once: few enough that they stay in the processor's cache

Scores = dict[str, NDArray[Any]]
Float64 = NDArray[np.float64]


def name_of_run(number: int) -> str:
    """Return the name of a decoder's score: the run's own first, then those of other seeds."""
    return f"{HEATMAP}-{number + 1}" if number else HEATMAP


@dataclass(frozen=True)
class Row:
    """One line of the table: a method on a set, or a mean over sets; shares in [0, 1].

    Args:
        method: Its name.
        set: A set's name, or ``mean near``, ``mean far``, ``mean all``.
        figures: Of the set; for several runs their mean.
        intervals: 95 % of the bootstrap's figures lie in it, for each metric.
        spread: Standard deviation over the runs, for each metric; empty for one run.
        runs: The figures of each run; empty for one run.
    """

    method: str
    set: str
    figures: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]
    spread: Mapping[str, float]
    runs: Mapping[str, Sequence[float]]

    def to_json(self) -> dict[str, Any]:
        """Return the row for ``metrics.json``, without what it does not have."""
        more = {"intervals": self.intervals, "spread": self.spread, "runs": self.runs}
        content = {key: value for key, value in more.items() if value}
        return {"method": self.method, "set": self.set, **self.figures, **content}


def metrics_table(scores: Mapping[str, Scores], config: EvaluateConfig) -> list[Row]:
    """Return the figures of every method on every OOD set, and their means over near, far and all.

    Args:
        scores: By set, ``id`` among them, and by method.
        config: Names the near sets, the protocol, and the number of resamples.
    """
    ood = [name for name in scores if name != ID]
    methods = columns_of(scores[ID])
    columns = [column for names in methods.values() for column in names]
    resampled = bootstrap(scores, columns, config)
    rows = []
    for method, names in methods.items():
        exact = [
            [asdict(detection_metrics(scores[ID][key], scores[name][key])) for name in ood]
            for key in names
        ]
        values = np.array([[[one[key] for key in METRICS] for one in line] for line in exact])
        drawn = resampled[:, [columns.index(key) for key in names]]
        for name, chosen in groups_of(ood, config).items():
            counts = exact[0][chosen[0]] if name in ood else {}  # a mean over sets has none
            mean = drawn[:, :, chosen].mean(axis=(1, 2))
            rows.append(make_row(method, name, values[:, chosen].mean(axis=1), mean, counts))
    return rows


def columns_of(scores: Scores) -> dict[str, list[str]]:
    """Return the names of the scores that each method of the table is made of.

    One, but for the heatmap over several runs.
    """
    runs = [HEATMAP]
    while name_of_run(len(runs)) in scores:
        runs.append(name_of_run(len(runs)))
    several = {f"{HEATMAP}, {len(runs)} runs": runs} if len(runs) > 1 else {}
    return {HEATMAP: [HEATMAP], **several, **{name: [name] for name in METHODS[1:]}}


def groups_of(ood: Sequence[str], config: EvaluateConfig) -> dict[str, list[int]]:
    """Return the lines of a method: positions of each set alone, and of the sets of each mean."""
    every = list(range(len(ood)))
    near = [number for number in every if ood[number] in config.near]
    groups = {name: [number] for number, name in enumerate(ood)}
    if near or config.protocol == "openood":
        split = {"mean near": near, "mean far": [one for one in every if one not in near]}
        groups |= {name: chosen for name, chosen in split.items() if chosen}
    return groups | {"mean all": every}


def bootstrap(
    scores: Mapping[str, Scores], columns: Sequence[str], config: EvaluateConfig
) -> Float64:
    """Return the figures of resampled images, ``(resamples, columns, OOD sets, METRICS)``.

    An image that is drawn is drawn for every method, and an ID image for every set: the means over
    sets then vary as they should, and methods can be compared.
    """
    ood = [name for name in scores if name != ID]

    def resample(number: int) -> Float64:
        generator = np.random.default_rng([config.seed, number])
        weights = {
            name: bootstrap_weights(len(values[HEATMAP]), STEP, generator)
            for name, values in scores.items()
        }
        figures = np.empty((STEP, len(columns), len(ood), len(METRICS)))
        for column, key in enumerate(columns):
            for number, name in enumerate(ood):
                found = weighted_metrics(
                    scores[ID][key], scores[name][key], weights[ID], weights[name]
                )
                figures[:, column, number] = np.stack(list(found.values()), axis=1)
        return figures

    num_steps = -(-config.resamples // STEP)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return np.concatenate(list(pool.map(resample, range(num_steps))))[: config.resamples]


def make_row(
    method: str, name: str, each: Float64, resampled: Float64, counts: Mapping[str, Any]
) -> Row:
    """Return a line of the table.

    Args:
        method: Its name.
        name: Of the set or mean.
        each: ``(runs, METRICS)``.
        resampled: ``(resamples, METRICS)``.
        counts: Figures of the set that have no interval.
    """
    figures = dict(zip(METRICS, each.mean(axis=0).tolist(), strict=True))
    several = METRICS if len(each) > 1 else ()
    spread = {key: float(each[:, number].std(ddof=1)) for number, key in enumerate(several)}
    runs = {key: each[:, number].tolist() for number, key in enumerate(several)}
    return Row(method, name, {**counts, **figures}, intervals(METRICS, resampled), spread, runs)


def decisions(
    scores: Mapping[str, Scores], calibration: Calibration, level: float
) -> dict[str, Any]:
    """Return the thresholds at a level, and what they do to images that they have not seen.

    Args:
        scores: By set, ``id`` among them.
        calibration: Of other ID images.
        level: Of false alarms that is allowed.
    """
    threshold, pixel_threshold = calibration.threshold(level), calibration.pixel_threshold(level)
    flagged = {name: share(values[HEATMAP] > threshold) for name, values in scores.items()}
    return {
        "level": level,
        "num_calibration": len(calibration.scores),
        # with too few images for the level nothing is flagged, and JSON knows no infinity
        "threshold": threshold if math.isfinite(threshold) else None,
        "pixel_threshold": pixel_threshold if math.isfinite(pixel_threshold) else None,
        "false_alarm": flagged.pop(ID),
        "pixel_false_alarm": share(scores[ID]["peak"] > pixel_threshold),
        "detection": flagged,
    }


def share(flagged: NDArray[np.bool_]) -> dict[str, Any]:
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


def report(
    table: Sequence[Row],
    scores: Mapping[str, Scores],
    classes: Sequence[str],
    config: EvaluateConfig,
) -> dict[str, Any]:
    """Return the first part of ``metrics.json``: the table, and how to read it."""
    label, prediction = scores[ID]["label"], scores[ID]["prediction"]
    known = bool((label >= 0).all()) and len(classes) > 0
    return {
        "about": "scores: larger is more OOD. fpr95_id_pos takes ID as the positive class (paper), "
        "fpr95_ood_pos takes OOD (OpenOOD). aupr_in and aupr_out are average precision. Shares in "
        "[0, 1]. intervals: 95 %, bootstrap over images. spread: standard deviation over runs.",
        "protocol": config.protocol,
        "headline": list(HEADLINES[config.protocol]),
        "resamples": config.resamples,
        "seed": config.seed,
        "id_accuracy": float((label == prediction).mean()) if known else None,
        "near": list(config.near),
        "table": [row.to_json() for row in table],
    }


def format_table(content: Mapping[str, Any]) -> str:
    """Return ``metrics.json`` as the table that the terminal shows, in percent.

    AUROC has its interval, or the spread over several runs. The protocol's headline comes first.
    """
    first: list[str] = content["headline"]
    keys = [*first, *(key for key in METRICS if key not in first)]
    lines = [("method", "set", *(HEADS[key] for key in keys), "OOD share")]
    for row in content["table"]:
        numbers = [f"{100 * row[key]:.2f}" for key in keys]
        numbers[0] += f" {margin(row, 'auroc')}"
        prevalence = f"{100 * row['prevalence_ood']:.1f}" if "prevalence_ood" in row else ""
        lines.append((row["method"], row["set"], *numbers, prevalence))
    return aligned(lines)


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Return cells in columns: the first two, which are names, to the left; numbers, right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            text.ljust(width) if column < 2 else text.rjust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def margin(row: Mapping[str, Any], key: str, digits: int = 2) -> str:
    """Return how far to trust a figure, in percent: its spread over runs, or else its interval."""
    if "spread" in row:
        return f"± {100 * row['spread'][key]:.{digits}f}"
    low, high = row["intervals"][key]
    return f"[{100 * low:.{digits}f}, {100 * high:.{digits}f}]"


def format_decisions(found: Mapping[str, Any]) -> str:
    """Return what the thresholds do, in a line for the terminal."""
    if found["threshold"] is None:
        return (
            f"no threshold: {found['num_calibration']} held-out ID images are too few for a level "
            f"of {found['level']:g}"
        )
    low, high = found["false_alarm"]["interval"]
    detections = ", ".join(
        f"{name} {100 * one['rate']:.1f} %" for name, one in found["detection"].items()
    )
    return (
        f"threshold {found['threshold']:.4g} (from {found['num_calibration']} held-out ID images, "
        f"level {found['level']:g}): false alarms {100 * found['false_alarm']['rate']:.1f} % "
        f"[{100 * low:.1f}, {100 * high:.1f}], detections {detections}"
    )
