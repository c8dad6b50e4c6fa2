"""Sanity checks find what is wrong, name it, and keep quiet about what is right."""

import re
from itertools import permutations

import numpy as np
import pytest

from ood_heatmap import sanity


def draw(num_classes, num_images, accuracy, seed=0):
    """Return labels, and predictions that are right with a given probability."""
    generator = np.random.default_rng(seed)
    label = np.arange(num_images) % num_classes
    wrong = generator.integers(1, num_classes, num_images)
    is_wrong = generator.random(num_images) >= accuracy
    return label, np.where(is_wrong, (label + wrong) % num_classes, label)


def texts(findings):
    return " ".join(finding.text for finding in findings)


@pytest.mark.parametrize(("num_classes", "num_images"), [(2, 400), (4, 200), (10, 400), (100, 500)])
@pytest.mark.parametrize("accuracy", [0.7, 0.93, 1.0])
def test_a_classifier_that_works_gives_no_finding(num_classes, num_images, accuracy):
    label, prediction = draw(num_classes, num_images, accuracy)
    assert sanity.check_classification(label, prediction, (), num_classes) == []


@pytest.mark.parametrize(("num_classes", "num_images"), [(2, 400), (4, 200), (10, 400), (100, 500)])
@pytest.mark.parametrize("seed", range(5))
def test_chance_is_told_from_another_order_of_classes(num_classes, num_images, seed):
    generator = np.random.default_rng(seed)
    label = np.arange(num_images) % num_classes
    random = generator.integers(0, num_classes, num_images)
    (finding,) = sanity.check_classification(
        label, random, (), num_classes, causes="Check --weights."
    )
    assert finding.suspicious
    assert f"accuracy is {(label == random).mean():.2%}, close to chance" in finding.text
    assert finding.text.endswith(". Check --weights.")


def test_folders_that_are_sorted_as_strings_are_named_with_their_natural_order():
    names = sorted(str(number) for number in range(1, 11))  # 1, 10, 2, ..., 9
    number, prediction = draw(10, 400, 0.9)
    # what the classifier calls class 0 is folder 1, class 9 is folder 10
    label = np.array([names.index(str(one + 1)) for one in number])
    (finding,) = sanity.check_classification(label, prediction, names, 10)
    right = (number == prediction).mean()
    assert finding.suspicious
    assert f"accuracy is {(label == prediction).mean():.2%}, and {right:.2%} with" in finding.text
    assert f"The natural order of the classes (1, 2, 3, ...) gives {right:.2%}" in finding.text
    images = number == 9  # of folder 10
    count = int((prediction[images] == 9).sum())
    assert f"{count} of {images.sum()} images of '10' are predicted as '9'" in finding.text or (
        "and 6 more classes" in finding.text
    )


def test_a_capital_letter_is_named_as_an_order_without_case():
    names = sorted(["airplane", "bird", "cat", "dog", "Truck"])  # Truck comes first
    number, prediction = draw(5, 100, 1.0)
    true_names = sorted(names, key=str.casefold)
    label = np.array([names.index(true_names[one]) for one in number])
    (finding,) = sanity.check_classification(label, prediction, names, 5)
    assert finding.suspicious
    assert "accuracy is 0.00%, and 100.00% with the best assignment" in finding.text
    assert "order of the classes (airplane, bird, cat, ...)" in finding.text


def test_two_swapped_folders_are_named_and_not_suspicious():
    label, prediction = draw(10, 400, 1.0)
    swapped = np.where(label == 4, 5, np.where(label == 5, 4, label))
    names = list("abcdefghij")
    (finding,) = sanity.check_classification(swapped, prediction, names, 10)
    assert not finding.suspicious
    assert "80.00%, and 100.00% with" in finding.text
    assert "40 of 40 images of 'f' are predicted as 'e'" in finding.text
    assert "Rename the class folders" in finding.text


def test_the_best_assignment_is_that_of_all_permutations():
    for seed in range(10):
        label, prediction = draw(5, 60, 0.3, seed)
        found = sanity._best_assignment(sanity._confusion_matrix(label, prediction, 5))[2]
        wanted = max(
            (np.array(order)[label] == prediction).mean() for order in permutations(range(5))
        )
        assert found == pytest.approx(wanted)


def test_unknown_labels_are_in_no_count():
    label = np.array([0, 1, -1, -2, 7, 1])
    prediction = np.array([0, 1, 1, 0, 1, 0])
    np.testing.assert_array_equal(sanity._confusion_matrix(label, prediction, 2), [[1, 0], [1, 1]])


@pytest.mark.parametrize(("accuracy", "suspicious"), [(0.4, True), (0.95, False)])
def test_mean_and_std_left_alone_are_said_when_the_accuracy_is_low(accuracy, suspicious):
    label, prediction = draw(10, 1000, accuracy)
    findings = sanity.check_classification(label, prediction, (), 10, unnormalized=True)
    assert [finding.suspicious for finding in findings] == [True] * suspicious
    assert not sanity.check_classification(label, prediction, (), 10, unnormalized=False)
    if suspicious:
        assert "add the --mean and --std that the classifier was trained with" in texts(findings)


def test_mean_and_std_left_alone_are_said_when_nobody_can_tell():
    _, prediction = draw(10, 100, 1.0)
    unknown = np.full(100, -1)
    (finding,) = sanity.check_classification(unknown, prediction, (), 10, unnormalized=True)
    assert not finding.suspicious
    assert "mean and std are 0 and 1" in finding.text
    assert sanity.check_classification(unknown, prediction, (), 10) == []


def test_one_class_for_everything():
    label = np.arange(200) % 4
    same = np.full(200, 2)
    (finding,) = sanity.check_classification(label, same, ["a", "b", "c", "d"], 4)
    assert finding.suspicious
    assert "200 of 200 images are predicted as class 'c'" in finding.text
    unknown = np.full(200, -1)
    assert sanity.check_classification(unknown, same, (), 4)[0].suspicious
    # a set of one class is no fault
    assert sanity.check_classification(same, same, (), 4) == []
    nearly = np.where(np.arange(200) == 0, 0, 2)
    assert [one.suspicious for one in sanity.check_classification(unknown, nearly, (), 4)] == [
        False
    ]
    # nor is a classifier with one class
    assert sanity.check_classification(unknown, np.zeros(200, int), (), 1) == []


def test_scores_that_are_all_the_same():
    generator = np.random.default_rng(0)
    good = generator.random(50).astype(np.float32)
    tied = np.where(np.arange(50) < 40, np.float32(1), good)
    scores = {
        "id": {"heatmap": good, "msp": np.full(50, 0.1, np.float32), "energy": tied},
        "far": {"heatmap": good + 1, "msp": np.full(50, 0.1, np.float32), "energy": tied},
    }
    constant, often = sanity.check_scores(scores)
    assert constant.text.startswith("msp: every image has the same score")
    assert often.text.startswith("energy (80%): so many images have the same score")
    assert not constant.suspicious
    scores = {name: {"heatmap": one["msp"]} for name, one in scores.items()}
    assert sanity.check_scores(scores)[0].suspicious
    # confident images differ by very little, and that counts
    tiny = {
        "id": {"msp": np.array([1e-20, 2e-20], np.float32)},
        "far": {"msp": np.array([1e-9], np.float32)},
    }
    assert sanity.check_scores(tiny) == []


@pytest.mark.parametrize("count", [1, 3, 10, 30, 99])
def test_too_few_held_out_images_are_said_with_a_level_that_works(count):
    (finding,) = sanity.check_calibration(count, 0.001)
    assert f"needs at least 999 held-out ID images, and there are {count}" in finding.text
    level = float(finding.text.rpartition(" ")[2].rstrip("."))
    assert sanity.check_calibration(count, level) == []


def test_findings_are_listed_with_those_that_are_suspicious():
    findings = [sanity.Finding("first", suspicious=True), sanity.Finding("second")]
    assert sanity.texts(findings) == {"warnings": ("first", "second"), "suspicious": ("first",)}


def test_classes_that_the_run_does_not_know_are_named():
    classes = ["cat", "dog", "ship", "truck"]
    assert sanity.check_class_names("photos", ["dog", "cat"], classes) == []
    assert sanity.check_class_names("photos", ["bird"], []) == []
    (finding,) = sanity.check_class_names("photos", ["Truck", "a", "b", "c", "cat"], classes)
    assert "does not have: 'Truck' (did you mean 'truck'?), 'a', 'b' and 1 more." in finding.text
    assert not finding.suspicious


def test_ood_classes_named_as_id_classes_are_said():
    classes = ["cat", "dog", "3"]
    assert sanity.check_ood_names("far", ["bus", "3"], classes) == []
    (finding,) = sanity.check_ood_names("far", ["bus", "Cat"], classes)
    assert "far are in classes with names of ID classes: 'Cat'." in finding.text


def fits(num_images=1000, num_ood=100, neighbours=5, sizes=(500, 500), low=0.0, width=8):
    features = np.random.default_rng(0).uniform(low, 1, (50, width)).astype(np.float32)
    return sanity.check_fits(features, num_images, num_ood, neighbours, sizes)


def test_baselines_that_are_fitted_on_enough_give_no_finding():
    assert fits() == []
    assert fits(num_images=40) == []
    assert fits(neighbours=1, sizes=(1, 1)) == []
    assert fits(neighbours=25, sizes=(1, *[100] * 99)) == []


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ({"num_images": 39}, "mahalanobis and vim: 39 ID images .* 8 features .use at least 40."),
        ({"low": -1.0}, "ash and react: [45].% of all feature values are negative"),
        ({"neighbours": 50, "sizes": (20, 50, 500)}, "knn: 2 of 3 classes .* k = 50"),
        ({"num_ood": 12}, "logistic_regression and mlp are fitted on 12 OOD images"),
    ],
)
def test_what_cripples_a_baseline_is_said(case, words):
    (finding,) = fits(**case)
    assert re.search(words, finding.text)
    assert not finding.suspicious


def test_few_resamples_are_said():
    assert sanity.check_resamples(1000) == []
    assert "intervals of 20 resamples" in sanity.check_resamples(20)[0].text
