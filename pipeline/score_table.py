"""The table of ``predict``: one line per image, as CSV or as JSON lines."""

import csv
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TextIO

# characters that a spreadsheet interprets as the start of a formula
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n")


@dataclass(frozen=True)
class TableLine:
    """One line of the table; the fields are its columns.

    Args:
        image: Path of the file, as given by the user.
        score: Larger is more OOD.
        p_value: Share of held-out ID images that score at least as high; None without a
            calibration.
        is_ood: The decision; None without one, see ``Result``.
        prediction: Name of the predicted class.
        confidence: Softmax probability of the predicted class.
        picture: Path of the picture in the output folder.
        heatmap: Path of the raw heatmap in the output folder.
    """

    image: str
    score: float
    p_value: float | None
    is_ood: bool | None
    prediction: str
    confidence: float
    picture: str | None = None
    heatmap: str | None = None


def open_table(path: Path) -> TextIO:
    """Open a table for writing; file names that are not UTF-8 are written as raw bytes."""
    return path.open("w", encoding="utf-8", errors="surrogateescape", newline="")


def line_writer(file: TextIO, kind: str) -> Callable[[TableLine], object]:
    """Make a function that writes one line of a table, ``csv`` or ``jsonl``."""
    if kind == "jsonl":
        return lambda line: file.write(json.dumps(asdict(line)) + "\n")
    table = csv.DictWriter(file, [column.name for column in fields(TableLine)])
    table.writeheader()
    return lambda line: table.writerow(
        {name: _to_cell(value) for name, value in asdict(line).items()}
    )


def _to_cell(value: str | float | bool | None) -> str | float | None:
    """Format a value for CSV.

    Booleans become ``true`` and ``false``, None becomes empty. Text that a spreadsheet would run as
    a formula gets a leading apostrophe: names of files and classes are untrusted.
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str) and value.startswith(FORMULA_STARTS):
        return f"'{value}"
    return value
