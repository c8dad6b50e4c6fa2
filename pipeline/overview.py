"""The result of ``evaluate`` on one screen of a terminal; the full table is in the report."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import click

from ood_heatmap.errors import printable
from ood_heatmap.pipeline.tables import format_decisions, format_label
from ood_heatmap.verdict import default_method, distinct_groups, fpr_key, verdict

_WIDTH, _MAX_METHODS = 80, 12
# a cell is 100.0 and a mark; a space is between columns
_LABEL_WIDTH, _CELL_WIDTH, _NAME_WIDTH = 17, 6, 11
_HEADS = {"auroc": "AUROC", "fpr95_id_pos": "FPR95", "fpr95_ood_pos": "FPR95"}
_POSITIVE = {"fpr95_id_pos": " (ID positive)", "fpr95_ood_pos": " (OOD positive)"}


class _Column(NamedTuple):
    """A column of the table.

    Args:
        name: Name of an OOD set or a mean.
        key: Name of the metric.
    """

    name: str
    key: str


# a metric in [0, 1] of each method
_Values: TypeAlias = dict[str, float]


def print_overview(content: Mapping[str, Any]) -> None:
    """Print the result of an evaluation to stdout, at most 80 columns wide.

    Shows the methods with the highest AUROC by set, the accuracy, the decisions and the verdict.
    The best of a column is marked in plain text, and in color in a terminal.

    Args:
        content: Content of ``metrics.json``.
    """
    names = distinct_groups(content)
    columns = _choose_columns(names, fpr_key(content))
    values: dict[_Column, _Values] = {
        column: {
            row["method"]: row[column.key] for row in content["table"] if row["set"] == column.name
        }
        for column in columns
    }
    methods = _choose_methods(values, default_method(content))
    lines = [
        *_format_table(content, values, methods),
        *textwrap.wrap(_format_legend(values, methods, names), _WIDTH),
        *(line for fact in _format_facts(content) for line in textwrap.wrap(fact, _WIDTH)),
        *(click.style(line, bold=True) for line in textwrap.wrap(verdict(content), _WIDTH)),
    ]
    # without a terminal click removes the styles
    click.echo("\n".join(lines))


def _choose_columns(names: Sequence[str], fpr: str) -> list[_Column]:
    """Return the columns that fit: all means, and the first sets; with the FPR95 if it fits.

    Args:
        names: Names of sets and means.
        fpr: Key of the FPR95.
    """
    most = (_WIDTH - _LABEL_WIDTH) // (_CELL_WIDTH + 1)
    if 2 * len(names) <= most:
        return [_Column(name, key) for name in names for key in ("auroc", fpr)]
    means = [name for name in names if name.startswith("mean ")]
    sets = [name for name in names if name not in means]
    return [_Column(name, "auroc") for name in sets[: max(0, most - len(means))] + means]


def _choose_methods(values: Mapping[_Column, _Values], default: str) -> list[str]:
    """Return the methods to show, by their AUROC in the last column.

    The default score and the best methods of each column are always among them.
    """
    last = [column for column in values if column.key == "auroc"][-1]
    # stable sorts; of methods that are printed alike the default first
    ranked = sorted(_rank(values[last], last.key), key=lambda method: method != default)
    ranked.sort(key=lambda method: -_printed(values[last][method]))
    needed = {default, *(_rank(values[column], column.key)[0] for column in values)}
    chosen = sorted(ranked, key=lambda method: method not in needed)[:_MAX_METHODS]
    return [method for method in ranked if method in chosen]


def _printed(value: float) -> float:
    """Return a metric as it is printed, in percent with one digit; unknown below all others."""
    return -math.inf if math.isnan(value) else round(100 * value, 1)


def _rank(values: _Values, key: str) -> list[str]:
    """Return the methods, the best first; those without a value last."""
    sign = -1 if key == "auroc" else 1
    return sorted(
        values,
        key=lambda method: math.inf if math.isnan(values[method]) else sign * values[method],
    )


def _format_table(
    content: Mapping[str, Any], values: Mapping[_Column, _Values], methods: Sequence[str]
) -> list[str]:
    """Return the lines of the table of methods by sets, with the best of each column marked."""
    labels = [printable(format_label(method, content)) for method in methods]
    room = _WIDTH - len(values) * (_CELL_WIDTH + 1)
    label_width = min(room, max(map(len, ["method", *labels])))
    heads = _format_heads(list(values), (_WIDTH - label_width) // len(values) - 1)
    widths = [max(_CELL_WIDTH, *map(len, head)) for head in heads]
    lines = []
    for number, texts in enumerate(zip(*heads, strict=True), 1):
        label = "method" if number == len(heads[0]) else ""
        lines.append(" ".join([label.ljust(label_width), *map(str.rjust, texts, widths)]))
    lines.append("─" * len(lines[0]))
    cells = [_format_column(values[column], column.key) for column in values]
    for method, label in zip(methods, labels, strict=True):
        cut = label if len(label) <= label_width else f"{label[: label_width - 1]}…"
        aligned = map(str.rjust, (column[method] for column in cells), widths)
        lines.append(
            " ".join(
                [
                    click.style(cut.ljust(label_width), bold=method == default_method(content)),
                    *(click.style(text, fg="green" if "*" in text else None) for text in aligned),
                ]
            )
        )
    return lines


def _format_heads(columns: Sequence[_Column], room: int) -> list[list[str]]:
    """Return the lines of each head, equally many: the name, folded, and the metric if it varies.

    Args:
        columns: The columns.
        room: Width of a column, at most.
    """
    several = len({column.key for column in columns}) > 1
    width = max(_CELL_WIDTH, min(room, _NAME_WIDTH))
    heads = []
    for column in columns:
        # over its two columns, a set is named once
        name = textwrap.wrap(printable(column.name), width) if column.key == "auroc" else []
        heads.append([*name, f"{_HEADS[column.key]} "] if several else name)
    height = max(map(len, heads))
    return [[""] * (height - len(head)) + head for head in heads]


def _format_column(values: _Values, key: str) -> dict[str, str]:
    """Format a metric in percent, and mark what is printed as the best one is."""
    texts = {method: f"{100 * value:.1f}" for method, value in values.items()}
    best = texts[_rank(values, key)[0]]
    return {
        method: f"{text}{'*' if text == best != 'nan' else ' '}" for method, text in texts.items()
    }


def _format_legend(
    values: Mapping[_Column, _Values], methods: Sequence[str], names: Sequence[str]
) -> str:
    """Say what the numbers are, and what is left out."""
    keys = dict.fromkeys(key for _, key in values)
    metrics = " and ".join(_HEADS[key] + _POSITIVE.get(key, "") for key in keys)
    num_methods = len(next(iter(values.values())))
    num_sets = len({column.name for column in values})
    left_out = [
        f"{shown} of {count} {noun}"
        for shown, count, noun in (
            (len(methods), num_methods, "methods"),
            (num_sets, len(names), "sets and means"),
        )
        if shown < count
    ]
    shown = f"; {', '.join(left_out)}: all are in the report" if left_out else ""
    return f"{metrics} in %, * best{shown}"


def _format_facts(content: Mapping[str, Any]) -> list[str]:
    """Return the accuracy of the classifier and the decisions, if they are known."""
    facts = []
    if content["id_accuracy"] is not None:
        facts.append(
            f"accuracy {content['id_accuracy']:.2%} on {content['id_labelled']} labelled images "
            "of the ID test set"
        )
    if "decisions" in content:
        facts.append(printable(format_decisions(content["decisions"])))
    return facts
