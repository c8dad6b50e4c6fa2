"""Names and labels of many images."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ood_heatmap.errors import OodHeatmapError, printable
from ood_heatmap.listing import ChainedNames, Labels, Names

ANY_TEXT = st.text(st.characters(codec=None))


@given(st.lists(ANY_TEXT))
def test_names_are_those_given_and_shown_in_one_line(texts):
    names = Names(texts)
    assert len(names) == len(texts)
    assert [names.raw(row) for row in range(len(names))] == texts
    assert list(names) == [printable(text) for text in texts]
    assert names[1:3] == list(names)[1:3]


@given(st.lists(st.tuples(ANY_TEXT, st.lists(ANY_TEXT))))
def test_chained_names_are_the_names_of_all_parts(parts):
    names = ChainedNames([(printable(prefix), Names(texts)) for prefix, texts in parts])
    wanted = [printable(prefix + text) for prefix, texts in parts for text in texts]
    assert list(names) == wanted
    assert len(names) == len(wanted)


def test_names_end():
    names = ChainedNames([("a/", Names(["x"])), ("b/", Names()), ("c/", Names(["y"]))])
    assert names[np.int64(1)] == names[-1] == "c/y"
    with pytest.raises(IndexError):
        names[2]


def labels_of(*texts):
    labels = Labels("here")
    for text in texts:
        labels.append(text)
    return labels


def test_integers_are_class_numbers():
    labels, classes, has_names = labels_of("2", None, "0", "-1").resolve()
    assert labels.tolist() == [2, -1, 0, -1]
    assert (classes, has_names) == (("0", "1", "2"), False)


def test_anything_else_is_a_class_name():
    labels, classes, has_names = labels_of("10", "cat", None, "2", "cat").resolve()
    assert labels.tolist() == [0, 2, -1, 1, 2]
    assert (classes, has_names) == (("10", "2", "cat"), True)
    assert labels_of("10", "cat", "2").resolve(order="natural").classes == ("2", "10", "cat")


def test_names_may_be_known_beside_the_labels():
    names = ["dog", "cat"]
    assert labels_of("1", "0").resolve(names).labels.tolist() == [1, 0]
    assert labels_of("cat", "dog").resolve(names).labels.tolist() == [1, 0]
    assert labels_of("cat").resolve(names).classes == ("dog", "cat")


def test_codes_of_a_part_are_added_as_those_of_the_whole():
    labels = labels_of("b")
    labels.extend(np.array([1, -1, 0, 1], np.int32), ["b", "a"])
    assert labels.resolve().labels.tolist() == [1, 0, -1, 1, 0]


@pytest.mark.parametrize(
    ("text", "names", "message"),
    [
        ("-2", (), "has the label -2: class numbers are 0 to"),
        ("999999999", (), "has the label 999999999"),
        ("2", ("a", "b"), "class numbers are 0 to 1"),
        ("emu", ("a", "b"), "the label 'emu', which is not one of its 2 class names"),
    ],
)
def test_a_label_that_is_no_class_is_refused(text, names, message):
    with pytest.raises(OodHeatmapError, match=message):
        labels_of(text).resolve(names)


def test_a_label_of_any_length_is_refused():
    with pytest.raises(OodHeatmapError, match=r"here has a label that is not a class \('xx"):
        labels_of("x" * 1001)
