"""The verdict: what it says of figures made by hand, and where it stays silent."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ood_heatmap.pipeline.config import EvaluateConfig
from ood_heatmap.pipeline.tables import metrics_table
from ood_heatmap.verdict import default_method, distinct_groups, format_points, fpr_key, verdict

OLD = Path(__file__).parent / "data" / "format-2" / "run" / "evaluation" / "metrics.json"


def row(method, name, auroc, lead=None, interval=None, fpr=0.3):
    """Return a row of the table; ``lead``: interval of the default's AUROC minus this one."""
    made = {"method": method, "set": name, "auroc": auroc, "fpr95_id_pos": fpr}
    if lead is not None:
        made["lead"] = {"intervals": {"auroc": list(lead)}}
    if interval is not None:
        made["intervals"] = {"auroc": list(interval)}
    return made


def table(*rows, **more):
    labels = {"knn": {"label": "kNN (k = 5)"}, "msp": {"label": "MSP"}}
    return {"table": list(rows), "methods": labels, "default": "combined", **more}


def sets(near, far, overall):
    """Return the rows of two sets and their mean, each a list of (method, AUROC, lead)."""
    groups = {"near": near, "far": far, "mean all": overall}
    return table(
        *(row(method, name, *rest) for name, rows in groups.items() for method, *rest in rows)
    )


def test_ahead_of_every_other():
    metrics = sets(
        near=[("combined", 0.85), ("knn", 0.84, (0.001, 0.019)), ("msp", 0.7, (0.1, 0.2))],
        far=[("combined", 0.95), ("knn", 0.90, (0.03, 0.07)), ("msp", 0.8, (0.1, 0.2))],
        overall=[("combined", 0.9), ("knn", 0.87, (0.021, 0.039)), ("msp", 0.75, (0.1, 0.2))],
    )
    assert verdict(metrics) == (
        "On the mean of 2 OOD sets, the combined score is ahead of every other (AUROC 90.0 %): of "
        "the next, kNN (k = 5), by 3.0 points, 95 % interval [2.1, 3.9]. It is the best on each "
        "set, and closest to another on near: ahead of kNN (k = 5) by 1.0 points [0.1, 1.9]."
    )


def test_a_lead_that_may_be_chance_is_not_called_ahead():
    metrics = sets(
        near=[("combined", 0.85), ("knn", 0.84, (-0.01, 0.03))],
        far=[("combined", 0.95), ("knn", 0.93, (0.01, 0.03))],
        overall=[("combined", 0.9), ("knn", 0.885, (-0.002, 0.032))],
    )
    assert verdict(metrics) == (
        "On the mean of 2 OOD sets, the combined score has the highest AUROC (90.0 %), but is not "
        "clearly ahead: of the next, kNN (k = 5), by 1.5 points, 95 % interval [-0.2, 3.2]. It is "
        "the best on each set, and closest to another on near: ahead of kNN (k = 5) by 1.0 points "
        "[-1.0, 3.0], which is within the uncertainty."
    )


def test_ahead_of_the_next_but_not_clearly_of_the_one_behind_it():
    """The next is certainly behind; a wider interval of a third method still reaches 0."""
    rows = [row("combined", "far", 0.9), row("knn", "far", 0.88, (0.01, 0.03))]
    assert "is ahead of every other" in verdict(table(*rows))
    rows.append(row("msp", "far", 0.87, (-0.01, 0.07)))
    assert "is not clearly ahead" in verdict(table(*rows))


def test_beaten_and_by_which():
    metrics = sets(
        near=[("combined", 0.80), ("knn", 0.83, (-0.05, -0.01)), ("msp", 0.81, (-0.03, 0.01))],
        far=[("combined", 0.95), ("knn", 0.93, (0.01, 0.03)), ("msp", 0.90, (0.01, 0.08))],
        overall=[("combined", 0.85), ("knn", 0.88, (-0.041, -0.019)), ("msp", 0.86, (-0.02, 0.0))],
    )
    assert verdict(metrics) == (
        "On the mean of 2 OOD sets, the combined score is 3rd of 3 methods (AUROC 85.0 %): the "
        "best, kNN (k = 5), is ahead by 3.0 points, 95 % interval [1.9, 4.1]. It is the best on 1 "
        "of 2 sets, and furthest behind on near, where kNN (k = 5) is ahead by 3.0 points "
        "[1.0, 5.0]."
    )


def test_beaten_within_the_uncertainty():
    rows = [row("combined", "far", 0.9, fpr=0.2), row("knn", "far", 0.91, (-0.03, 0.01), fpr=0.1)]
    assert verdict(table(*rows)) == (
        "On far, the combined score is 2nd of 2 methods (AUROC 90.0 %): the best, kNN (k = 5), is "
        "ahead by 1.0 points, 95 % interval [-1.0, 3.0], which is within the uncertainty. Where it "
        "accepts 95 % of the ID images, 20.0 % of the OOD images are accepted; with kNN (k = 5), "
        "10.0 %."
    )


def test_best_on_no_set():
    rows = [[("combined", 0.5), ("knn", 0.6, (-0.2, -0.05))]] * 3
    assert "It is the best on no set, and furthest behind on near" in verdict(sets(*rows))


def test_the_protocol_chooses_the_fpr():
    metrics = table(headline=["auroc", "aupr_out", "fpr95_ood_pos"])
    for method, fpr in (("combined", 0.25), ("knn", 0.5)):
        metrics["table"].append(row(method, "far", 0.9) | {"fpr95_ood_pos": fpr})
    assert fpr_key(metrics) == "fpr95_ood_pos"
    assert verdict(metrics).endswith(
        "Where it flags 95 % of the OOD images, 25.0 % of the ID images are flagged; with "
        "kNN (k = 5), 50.0 %."
    )


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [((0.88, 0.92), (0.80, 0.86), "is ahead of"), ((0.84, 0.92), (0.80, 0.86), "not clearly")],
)
def test_without_the_interval_of_the_difference_separate_intervals_decide(ours, theirs, said):
    """Tables of earlier versions have no other."""
    rows = [row("combined", "far", 0.9, interval=ours), row("knn", "far", 0.83, interval=theirs)]
    assert said in verdict(table(*rows))
    assert "by 7.0 points. " in verdict(table(*rows))


def test_the_mean_over_runs_of_the_default_score_is_not_another_method():
    rows = [
        row("combined", "far", 0.9),
        row("combined, 3 runs", "far", 0.95),
        row("knn", "far", 0.8, (0.05, 0.15)),
    ]
    assert "ahead of every other" in verdict(table(*rows))


def test_an_old_evaluation_is_about_the_heatmap():
    metrics = json.loads(OLD.read_text())
    assert default_method(metrics) == "heatmap"
    by_auroc = sorted(
        (one for one in metrics["table"] if one["set"] == "far"), key=lambda one: -one["auroc"]
    )
    rank = [one["method"] for one in by_auroc].index("heatmap") + 1
    assert f"the heatmap score is {rank}" in verdict(metrics)


@pytest.mark.parametrize("rows", [[], [("combined",)], [("knn",)]])
def test_nothing_to_compare_is_no_verdict(rows):
    assert verdict(table(*(row(method, "far", 0.5) for (method,) in rows))) == ""


def test_a_metric_that_is_missing_is_not_compared():
    rows = [row("combined", "far", 0.9), {"method": "knn", "set": "far", "auroc": float("nan")}]
    assert verdict(table(*rows)) == ""


def test_labels_stay_on_the_line():
    metrics = table(row("combined", "far", 0.9), row("a\nb", "far", 0.8))
    assert "a\\nb" in verdict(metrics)
    assert len(verdict(metrics).splitlines()) == 1


def test_it_loads_no_torch():
    code = "import sys, ood_heatmap.verdict; print('torch' in sys.modules, 'numpy' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert output.stdout.split() == ["False", "False"], output.stderr


@pytest.mark.parametrize(
    ("ood", "near", "distinct"),
    [
        (["a"], [], ["a"]),
        (["a"], ["a"], ["a"]),
        (["a", "b"], ["a"], ["a", "b", "mean all"]),
        (["a", "b", "c"], ["a"], ["a", "b", "c", "mean far", "mean all"]),
        (list("abcd"), ["a", "c"], [*"abcd", "mean near", "mean far", "mean all"]),
    ],
)
def test_a_mean_over_one_set_is_no_group_of_its_own(ood, near, distinct):
    config = EvaluateConfig(near=tuple(near), resamples=25)
    scores = {name: {"heatmap": np.linspace(0, 1, 5)} for name in ["id", *ood]}
    rows = [row.to_json() for row in metrics_table(scores, config)]
    assert distinct_groups(table(*rows, near=near)) == distinct


def test_means_of_metrics_without_near_sets_are_all_shown():
    assert distinct_groups(sets(*[[("knn", 0.5)]] * 3)) == ["near", "far", "mean all"]


@pytest.mark.parametrize("auroc", [0.9996, 0.9999])
def test_methods_that_are_printed_alike_share_the_first_place(auroc):
    alike = [("combined", auroc), ("knn", 0.9998, (-0.0001, 0.0008))]
    assert verdict(sets(alike, alike, alike)) == (
        "On the mean of 2 OOD sets, the combined score has the highest AUROC (100.0 %), and kNN "
        "(k = 5) the same. It is the best on each set; on near, kNN (k = 5) is as good."
    )


@pytest.mark.parametrize(
    ("value", "signed", "text"),
    [(-0.04, "", "0.0"), (-0.04, "+", "+0.0"), (-0.06, "", "-0.1"), (2.31, "+", "+2.3")],
)
def test_points_that_round_to_zero_have_no_minus(value, signed, text):
    assert format_points(value, signed) == text
