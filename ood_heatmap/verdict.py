"""The result of an evaluation in two sentences, for the terminal and the report."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ood_heatmap.errors import printable

# the default score of detectors before ``metrics.json`` named it
_FALLBACK = "heatmap"
_OVERALL = "mean all"
_NEAR, _FAR = "mean near", "mean far"
_MEANS = (_NEAR, _FAR, _OVERALL)


def default_method(metrics: Mapping[str, Any]) -> str:
    """Return the name of the method that the detector decides with.

    Args:
        metrics: Content of ``metrics.json``.
    """
    name: str = metrics.get("default", _FALLBACK)
    return name


def distinct_groups(metrics: Mapping[str, Any]) -> list[str]:
    """Return the sets and means of the table in order, without means over a single set.

    Those repeat the numbers of the set.

    Args:
        metrics: Content of ``metrics.json``.
    """
    groups = list(dict.fromkeys(row["set"] for row in metrics["table"]))
    sets = [name for name in groups if name not in _MEANS]
    num_near = sum(name in metrics.get("near", ()) for name in sets)
    num_sets = {_NEAR: num_near, _FAR: len(sets) - num_near, _OVERALL: len(sets)}
    return [name for name in groups if num_sets.get(name) != 1]


def verdict(metrics: Mapping[str, Any]) -> str:
    """Compare the detector's default score with every other method, in two sentences.

    The first is about the mean over all OOD sets, the second about single sets. A difference is
    given with its 95 % interval, and one whose interval contains 0 is called uncertain.

    Args:
        metrics: Content of ``metrics.json``.

    Returns:
        Plain text; "" if the default score or every other method is missing.
    """
    groups = list(dict.fromkeys(row["set"] for row in metrics["table"]))
    sets = [name for name in groups if name not in _MEANS]
    overall = _compare(metrics, sets[0] if len(sets) == 1 else _OVERALL)
    if overall is None:
        return ""
    each = [found for name in sets if (found := _compare(metrics, name)) is not None]
    where = f"the mean of {len(sets)} OOD sets" if len(sets) > 1 else printable(sets[0])
    second = _by_set(each) if len(sets) > 1 else _accepted(metrics, overall)
    return f"On {where}, {_rank(overall)} {second}".rstrip()


@dataclass(frozen=True)
class _Difference:
    """Difference of two AUROCs.

    Args:
        value: In percentage points, at least 0.
        interval: Its 95 % interval; None if it was not computed.
        overlap: Whether the intervals of the two methods overlap; without an interval of the
            difference it is uncertain then.
    """

    value: float
    interval: tuple[float, float] | None
    overlap: bool

    @property
    def is_certain(self) -> bool:
        """Whether the interval excludes 0."""
        return not self.overlap if self.interval is None else self.interval[0] > 0

    @property
    def doubt(self) -> str:
        """What to add to a difference that is uncertain."""
        return "" if self.is_certain else ", which is within the uncertainty"

    @property
    def is_tie(self) -> bool:
        """Whether the two are equal as printed."""
        return format_points(self.value) == "0.0"

    def to_text(self, kind: str = "") -> str:
        """Return the points, and the interval after the words for its kind."""
        points = f"{format_points(self.value)} points"
        if self.interval is None:
            return points
        low, high = map(format_points, self.interval)
        return f"{points}{kind} [{low}, {high}]"


@dataclass(frozen=True)
class _Comparison:
    """The default score beside the best other method on a set.

    Args:
        set: Name of the set or mean.
        label: Label of the default score.
        row: Row of the default score.
        rank: Its rank by AUROC, from 1.
        num_methods: Number of methods, itself included.
        other: Label of the best other method.
        other_row: Row of the best other method.
        difference: To the best other method.
        is_certain: Whether the difference to every other method is certain.
    """

    set: str
    label: str
    row: Mapping[str, Any]
    rank: int
    num_methods: int
    other: str
    other_row: Mapping[str, Any]
    difference: _Difference
    is_certain: bool


def _compare(metrics: Mapping[str, Any], name: str) -> _Comparison | None:
    """Compare the default score with the others on a set or mean; None if either is missing."""
    default = default_method(metrics)
    rows = [row for row in metrics["table"] if row["set"] == name and _is_known(row)]
    ours = [row for row in rows if row["method"] == default]
    # the mean over several runs is the same score
    others = [
        row
        for row in rows
        if row["method"] != default and not row["method"].startswith(f"{default}, ")
    ]
    if not ours or not others:
        return None
    row, best = ours[0], max(others, key=lambda other: float(other["auroc"]))
    return _Comparison(
        set=printable(name),
        label=_label(default, metrics),
        row=row,
        rank=1 + sum(other["auroc"] > row["auroc"] for other in others),
        num_methods=1 + len(others),
        other=_label(best["method"], metrics),
        other_row=best,
        difference=_difference(row, best),
        is_certain=all(_difference(row, other).is_certain for other in others),
    )


def _is_known(row: Mapping[str, Any]) -> bool:
    auroc = row.get("auroc")
    return auroc is not None and not math.isnan(auroc)


def _label(method: str, metrics: Mapping[str, Any]) -> str:
    label: str = metrics.get("methods", {}).get(method, {}).get("label", method)
    return printable(label)


def _difference(row: Mapping[str, Any], other: Mapping[str, Any]) -> _Difference:
    """Return the difference of the default score's AUROC to another method's."""
    sign = 1 if row["auroc"] >= other["auroc"] else -1
    interval = other.get("lead", {}).get("intervals", {}).get("auroc")
    if interval is not None:
        low, high = sorted(100 * sign * end for end in interval)
        interval = (low, high)
    return _Difference(
        value=100 * abs(row["auroc"] - other["auroc"]),
        interval=interval,
        overlap=_overlap(row, other),
    )


def _overlap(row: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    ends = [one.get("intervals", {}).get("auroc") for one in (row, other)]
    if None in ends:
        return True
    (low, high), (other_low, other_high) = ends
    return bool(low <= other_high and other_low <= high)


def _rank(found: _Comparison) -> str:
    """Say where the default score stands, and the difference to the best other method."""
    auroc = f"{100 * found.row['auroc']:.1f} %"
    points = found.difference.to_text(", 95 % interval")
    if found.difference.is_tie:
        return (
            f"the {found.label} score has the highest AUROC ({auroc}), and {found.other} the same."
        )
    if found.rank > 1:
        text = (
            f"the {found.label} score is {_ordinal(found.rank)} of {found.num_methods} methods "
            f"(AUROC {auroc}): the best, {found.other}, is ahead by {points}"
        )
        return f"{text}{found.difference.doubt}."
    if found.is_certain:
        return (
            f"the {found.label} score is ahead of every other (AUROC {auroc}): of the next, "
            f"{found.other}, by {points}."
        )
    return (
        f"the {found.label} score has the highest AUROC ({auroc}), but is not clearly ahead: "
        f"of the next, {found.other}, by {points}."
    )


def _by_set(each: Sequence[_Comparison]) -> str:
    """Say on how many sets the default score is best, and where the difference matters most."""
    best = [found for found in each if found.rank == 1 or found.difference.is_tie]
    behind = [found for found in each if found not in best]
    if not behind:
        closest = min(best, key=lambda found: found.difference.value)
        if closest.difference.is_tie:
            return f"It is the best on each set; on {closest.set}, {closest.other} is as good."
        return (
            f"It is the best on each set, and closest to another on {closest.set}: ahead of "
            f"{closest.other} by {closest.difference.to_text()}{closest.difference.doubt}."
        )
    worst = max(behind, key=lambda found: found.difference.value)
    count = f"on {len(best)} of {len(each)} sets" if best else "on no set"
    return (
        f"It is the best {count}, and furthest behind on {worst.set}, where {worst.other} is "
        f"ahead by {worst.difference.to_text()}{worst.difference.doubt}."
    )


def _accepted(metrics: Mapping[str, Any], found: _Comparison) -> str:
    """Say what the scores are worth at a threshold, if there is one set only."""
    key = fpr_key(metrics)
    ours, theirs = found.row.get(key), found.other_row.get(key)
    if ours is None or theirs is None:
        return ""
    at, what = "accepts 95 % of the ID images", "OOD images are accepted"
    if key == "fpr95_ood_pos":
        at, what = "flags 95 % of the OOD images", "ID images are flagged"
    with_other = f"with {found.other}, {100 * theirs:.1f} %"
    return f"Where it {at}, {100 * ours:.1f} % of the {what}; {with_other}."


def fpr_key(metrics: Mapping[str, Any]) -> str:
    """Return the key of the FPR95 that the protocol of the evaluation reports first."""
    return next(
        (str(key) for key in metrics.get("headline", ()) if key.startswith("fpr95")),
        "fpr95_id_pos",
    )


def format_points(value: float, sign: str = "") -> str:
    """Format percentage points; what rounds to zero has no minus.

    Args:
        value: Percentage points.
        sign: ``+`` to have a sign before positive numbers too.
    """
    return f"{round(value, 1) + 0.0:{sign}.1f}"


def _ordinal(number: int) -> str:
    endings = {1: "st", 2: "nd", 3: "rd"}
    ending = "th" if number % 100 in (11, 12, 13) else endings.get(number % 10, "th")
    return f"{number}{ending}"
