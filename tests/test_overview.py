"""The last table of ``evaluate``: one screen, and the best of every column marked."""

import re
from typing import Any

import numpy as np
import pytest

from ood_heatmap.pipeline.overview import print_overview

METHODS = ("combined", "heatmap", "relative Mahalanobis distance", *(f"m{i}" for i in range(14)))
SETS = ("cifar100", "tin", "mnist", "svhn", "a-long-name-of-a-set", "places365", "x", "y")
MEANS = ("mean near", "mean far", "mean all")


def make_content(num_sets: int, seed: int = 0, **more: object) -> dict[str, Any]:
    """Return the content of a ``metrics.json`` with random metrics."""
    rng = np.random.default_rng(seed)
    names = SETS[:num_sets] + (MEANS if num_sets > 1 else ())
    table = [
        {
            "method": method,
            "set": name,
            "auroc": rng.uniform(0.5, 1),
            "fpr95_id_pos": rng.uniform(0, 0.5),
            "fpr95_ood_pos": rng.uniform(0.5, 1),
            "intervals": {"auroc": [0.5, 1]},
        }
        for method in METHODS
        for name in names
    ]
    detection = {name: {"rate": 0.9} for name in SETS[:num_sets]}
    decisions = {
        "num_calibration": 1000,
        "level": 0.05,
        "threshold": 0.123,
        "false_alarm": {"rate": 0.04, "interval": [0.03, 0.05]},
        "detection": detection,
    }
    found = {"table": table, "methods": {}, "headline": ["auroc", "fpr95_id_pos"], **more}
    return {"id_accuracy": 0.9, "id_labelled": 50, "decisions": decisions, **found}


def shown(content: dict[str, Any], capsys) -> tuple[list[str], dict[str, list[str]], str]:
    """Return the lines, the cells by method as printed, and what is below the table."""
    print_overview(content)
    lines = capsys.readouterr().out.splitlines()
    rule = next(number for number, line in enumerate(lines) if line.startswith("──"))
    end = next(number for number, line in enumerate(lines) if " in %, * best" in line)
    rows = [line.rstrip() for line in lines[rule + 1 : end]]
    cells = {}
    for row in rows:
        label = row.partition("…")[0] if "…" in row else f"{row.split('  ')[0]} "
        method = next(name for name in METHODS if f"{name} ".startswith(label))
        cells[method] = re.findall(r"(?:nan|\d+\.\d)\*?(?= |$)", row)
    return lines, cells, " ".join(" ".join(lines[end:]).split())


@pytest.mark.parametrize("num_sets", range(1, 9))
def test_it_fits_on_a_screen_of_80_columns(capsys, num_sets):
    lines, cells, _ = shown(make_content(num_sets), capsys)
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 28
    assert len(cells) == 12
    assert {len(row) for row in cells.values()} == {2 if num_sets == 1 else min(9, num_sets + 3)}


def test_means_over_one_set_leave_their_columns_to_the_fpr(capsys):
    _, cells, below = shown(make_content(2, near=["cifar100"]), capsys)
    assert {len(row) for row in cells.values()} == {2 * len(("cifar100", "tin", "mean all"))}
    assert "AUROC and FPR95 (ID positive) in %" in below
    assert "sets and means" not in below


@pytest.mark.parametrize("num_sets", [1, 3, 6])
@pytest.mark.parametrize("seed", range(5))
def test_the_best_of_all_methods_is_marked_in_every_column(capsys, num_sets, seed):
    content = make_content(num_sets, seed)
    _, cells, _ = shown(content, capsys)
    columns = [("cifar100", "auroc"), ("cifar100", "fpr95_id_pos")]
    if num_sets > 1:
        columns = [(name, "auroc") for name in SETS[:num_sets] + MEANS]
    for number, (name, key) in enumerate(columns):
        values = {row["method"]: row[key] for row in content["table"] if row["set"] == name}
        best = max(values.values()) if key == "auroc" else min(values.values())
        marked = {method for method, row in cells.items() if row[number].endswith("*")}
        # also those that are printed alike
        assert marked == {
            method for method in cells if f"{100 * values[method]:.1f}" == f"{100 * best:.1f}"
        }
        assert max(marked, key=lambda method: values[method] == best) in cells
        assert {method: row[number].rstrip("*") for method, row in cells.items()} == {
            method: f"{100 * values[method]:.1f}" for method in cells
        }


def test_methods_are_in_the_order_of_their_mean_and_the_default_is_always_there(capsys):
    content = make_content(3, default="heatmap")
    for row in content["table"]:
        if row["method"] == "heatmap":
            row["auroc"] = 0.1
    _, cells, below = shown(content, capsys)
    means = {row["method"]: row["auroc"] for row in content["table"] if row["set"] == "mean all"}
    assert list(cells) == sorted(cells, key=lambda method: -means[method])
    assert list(cells)[-1] == "heatmap"
    assert "12 of 17 methods: all are in the report" in below


def test_the_fpr_is_the_one_of_the_protocol(capsys):
    content = make_content(1, headline=["auroc", "aupr_out", "fpr95_ood_pos"])
    _, cells, below = shown(content, capsys)
    assert all(float(row[1].rstrip("*")) >= 50 for row in cells.values())
    assert "AUROC and FPR95 (OOD positive) in %" in below


def test_accuracy_decisions_and_verdict_are_below(capsys):
    _, _, below = shown(make_content(3), capsys)
    assert "accuracy 90.00% on 50 labelled images of the ID test set" in below
    assert "false alarms 4.0 % [3.0, 5.0], detections cifar100 90.0 %, tin 90.0 %" in below
    assert re.search(r"On the mean of 3 OOD sets, the heatmap score .* methods", below)
    bare = make_content(1, id_accuracy=None)
    del bare["decisions"]
    _, _, below = shown(bare, capsys)
    assert "accuracy" not in below
    assert "threshold" not in below


def test_what_is_not_known_is_last_and_never_the_best(capsys):
    content = make_content(1)
    for row in content["table"]:
        if row["method"] != "m3":
            row["auroc"] = float("nan")
    _, cells, _ = shown(content, capsys)
    assert next(iter(cells)) == "m3"
    assert {row[0] for method, row in cells.items() if method != "m3"} == {"nan"}
    assert cells["m3"][0].endswith("*")


def test_names_are_printed_as_they_are(capsys):
    content = make_content(1)
    for row in content["table"]:
        row["set"] = "[red]:o:\n"
    print_overview(content)
    assert "[red]:o:\\n" in capsys.readouterr().out.replace("\n ", "").replace(" ", "")
