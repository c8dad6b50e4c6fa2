"""Names and labels of the images of a set, compact enough for ten million of them."""

import hashlib
import os
import re
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from ood_heatmap.errors import OodHeatmapError, printable
from ood_heatmap.images import ClassOrder, sort_classes

MAX_LABEL = 2**20
_NUMBER = re.compile(r"-?[0-9]{1,9}")
_MAX_LABEL_LENGTH = 1000


def stamp_of(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Return size in bytes and modification time in ns of a file, -1 if it is missing."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        # a name with a null character is not a file
        return -1, -1
    return status.st_size, status.st_mtime_ns


def short_names(paths: Sequence[str]) -> list[str]:
    """Return what tells files apart, printable: their paths below the folder that all are in."""
    folder = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    return [printable(os.path.relpath(path, folder)) for path in paths]


class _SequenceOfNames(Sequence[str]):
    """Printable names by row; subclasses define ``__len__`` and ``_name``."""

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self._name(row) for row in range(len(self))[index]]
        return self._name(range(len(self))[index])

    def _name(self, row: int) -> str:
        raise NotImplementedError


class Names(_SequenceOfNames):
    """Names in one block of bytes: a list of ten million strings would take a gigabyte.

    Args:
        names: The names; they may contain unprintable characters, see ``printable``.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._text, self._ends = bytearray(), array("q")
        for name in names:
            self.append(name)

    def __len__(self) -> int:
        return len(self._ends)

    def append(self, name: str) -> None:
        """Add a name at the end."""
        self._text += name.encode("utf-8", "surrogatepass")
        self._ends.append(len(self._text))

    def raw(self, row: int) -> str:
        """Return a name as it was given, such as the path of a file."""
        start = self._ends[row - 1] if row else 0
        return self._text[start : self._ends[row]].decode("utf-8", "surrogatepass")

    def to_arrays(self) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Return the text of all names as bytes, and the end of each name."""
        return np.frombuffer(bytes(self._text), np.uint8), np.array(self._ends, np.int64)

    @staticmethod
    def from_arrays(text: NDArray[np.uint8], ends: NDArray[np.int64]) -> "Names":
        """Return the names from ``to_arrays``."""
        names = Names()
        names._text += text.tobytes()
        names._ends.frombytes(ends.tobytes())
        return names

    def _name(self, row: int) -> str:
        return printable(self.raw(row))


class ChainedNames(_SequenceOfNames):
    """The concatenated names of several parts.

    Args:
        parts: Prefix and names of each part.
    """

    def __init__(self, parts: Sequence[tuple[str, Sequence[str]]]) -> None:
        self._parts = parts
        self._ends = list(accumulate(len(names) for _, names in parts))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def _name(self, row: int) -> str:
        part = bisect_right(self._ends, row)
        prefix, names = self._parts[part]
        return prefix + names[row - (self._ends[part - 1] if part else 0)]


class SelectedNames(_SequenceOfNames):
    """The names of some rows, looked up when asked for.

    Args:
        names: Names of all rows.
        rows: ``(B,)`` selected rows.
    """

    def __init__(self, names: Sequence[str], rows: NDArray[np.int64]) -> None:
        self._names, self._rows = names, rows

    def __len__(self) -> int:
        return len(self._rows)

    def _name(self, row: int) -> str:
        return self._names[int(self._rows[row])]


class Labelling(NamedTuple):
    """The labels of a set, as in ``ImageSet``."""

    labels: NDArray[np.int32]
    classes: tuple[str, ...]
    has_class_names: bool

    def update(self, listing: "hashlib._Hash") -> None:
        """Add the labels to the hash of a listing."""
        listing.update(self.labels.astype("<i4").tobytes())
        for name in self.classes if self.has_class_names else ():
            listing.update(f"{name}\n".encode(errors="surrogateescape"))


class Labels:
    """Labels of a source as text: class numbers or class names.

    Args:
        source: Name for messages.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self.codes = array("i")
        self._code_of: dict[str, int] = {}

    @property
    def texts(self) -> list[str]:
        """The distinct labels, by code."""
        return list(self._code_of)

    def append(self, text: str | None) -> None:
        """Add the label of the next image; None where unknown.

        Raises:
            OodHeatmapError: The label is too long to be one, or there are too many classes.
        """
        self.codes.append(-1 if text is None else self._code(text))

    def extend(self, codes: NDArray[np.int32], texts: Sequence[str]) -> None:
        """Add the labels of many images, as codes of their own."""
        code_of = np.array([*map(self._code, texts), -1], np.int32)
        self.codes.frombytes(code_of[codes].tobytes())

    def _code(self, text: str) -> int:
        code = self._code_of.setdefault(text, len(self._code_of))
        if len(text) > _MAX_LABEL_LENGTH or code > MAX_LABEL:
            raise OodHeatmapError(
                f"{self.source} has a label that is not a class ({printable(text[:40])!r}). "
                "Correct the labels, or remove them."
            )
        return code

    def resolve(self, names: Sequence[str] = (), order: ClassOrder = "name") -> Labelling:
        """Return the labels as class numbers.

        Labels are class numbers if all of them are integers, otherwise class names.

        Args:
            names: Class names by number, if they are known.
            order: Order in which class names are numbered if ``names`` is empty.

        Raises:
            OodHeatmapError: A number is not a class.
        """
        texts, codes = self.texts, np.frombuffer(self.codes, np.int32)
        if not all(_NUMBER.fullmatch(text) for text in texts):
            names = names or sort_classes(texts, order)
            number_of = {name: number for number, name in enumerate(names)}
            unknown = next((text for text in texts if text not in number_of), None)
            if unknown is not None:
                raise OodHeatmapError(
                    f"{self.source} has the label {printable(unknown)!r}, which is not one of its "
                    f"{len(names)} class names. Correct the labels or the class names."
                )
            numbers = [number_of[text] for text in texts]
        else:
            numbers = [int(text) for text in texts]
            limit = len(names) - 1 if names else MAX_LABEL
            wrong = next((number for number in numbers if not -1 <= number <= limit), None)
            if wrong is not None:
                raise OodHeatmapError(
                    f"{self.source} has the label {wrong}: class numbers are 0 to {limit}, -1 "
                    "where unknown. Correct the labels."
                )
        labels = np.array([*numbers, -1], np.int32)[codes]
        count = max(numbers, default=-1) + 1
        classes = tuple(map(printable, names)) or tuple(map(str, range(count)))
        return Labelling(labels, classes, bool(names))
