"""Sanity checks: measurements that are probably not what the user intended.

Each check is a pure function that returns findings and refuses nothing: a stage writes the findings
into its manifest, and the command prints them at its end.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ood_heatmap.calibration import num_needed
from ood_heatmap.images import class_orders

_Int64 = NDArray[np.int64]

# Cohen's kappa (0 by chance, 1 if all are right): below the first, accuracy is that of chance;
# below the second it is low for a classifier on the images it was trained on
_CHANCE_KAPPA, _LOW_KAPPA = 0.1, 0.6
# no finding about fewer images
_MIN_IMAGES = 10
# an optimal assignment takes cubic time
_MAX_CLASSES = 2000
_NUM_SHUFFLES = 10
_NUM_SHOWN = 3


@dataclass(frozen=True)
class Finding:
    """A measurement that is probably not intended.

    Args:
        text: Description with the value and the remedy.
        suspicious: Whether continuing is pointless unless it is intended.
    """

    text: str
    suspicious: bool = False


def texts(findings: Sequence[Finding]) -> dict[str, tuple[str, ...]]:
    """Return findings as fields of ``Results``: all ``warnings``, and the ``suspicious`` ones."""
    return {
        "warnings": tuple(finding.text for finding in findings),
        "suspicious": tuple(finding.text for finding in findings if finding.suspicious),
    }


def _confusion_matrix(
    label: NDArray[np.integer[Any]], prediction: NDArray[np.integer[Any]], num_classes: int
) -> _Int64:
    """Return the number of images of each class that are predicted as each class.

    Args:
        label: ``(N,)`` classes; images with a label outside [0, num_classes) are ignored.
        prediction: ``(N,)`` predicted classes.
        num_classes: L.

    Returns:
        ``(L, L)`` int64; the first axis is the label.
    """
    known = (label >= 0) & (label < num_classes)
    cell = label[known].astype(np.int64) * num_classes + prediction[known]
    return np.bincount(cell, minlength=num_classes**2).reshape(num_classes, num_classes)


def check_classification(
    label: NDArray[np.integer[Any]],
    prediction: NDArray[np.integer[Any]],
    classes: Sequence[str],
    num_classes: int,
    *,
    causes: str = "",
    unnormalized: bool = False,
) -> list[Finding]:
    """Check the predictions of a classifier on ID images.

    Args:
        label: ``(N,)`` classes, -1 where unknown.
        prediction: ``(N,)`` predicted classes.
        classes: Class names by label; empty if unknown.
        num_classes: L.
        causes: What to check if the accuracy is that of chance, in full sentences.
        unnormalized: Whether mean and std are 0 and 1, which may be wrong for the network.
    """
    names = list(classes) or [str(number) for number in range(num_classes)]
    findings = _check_one_class(label, prediction, names, causes)
    if any(finding.suspicious for finding in findings):
        return findings
    known = (label >= 0) & (label < num_classes)
    if known.sum() < _MIN_IMAGES:
        if unnormalized:
            findings.append(
                Finding(
                    "mean and std are 0 and 1, which cannot be checked without class labels: add "
                    "--mean and --std unless the network takes pixels in [0, 1]."
                )
            )
        return findings
    label, prediction = label[known], prediction[known]
    findings += _check_class_order(label, prediction, names)
    if any(finding.suspicious for finding in findings):
        return findings
    accuracy = float((label == prediction).mean())
    chance = _chance_accuracy(label, prediction, num_classes)
    kappa = (accuracy - chance) / (1 - chance) if chance < 1 else 1.0
    if kappa < _CHANCE_KAPPA:
        text = f"accuracy is {accuracy:.2%}, close to chance ({chance:.2%}). {causes}"
        findings.append(Finding(text.strip(), suspicious=True))
    elif unnormalized and kappa < _LOW_KAPPA:
        findings.append(
            Finding(
                f"accuracy is {accuracy:.2%}, and mean and std are 0 and 1: add the --mean and "
                "--std that the classifier was trained with.",
                suspicious=True,
            )
        )
    return findings


def _check_one_class(
    label: NDArray[np.integer[Any]],
    prediction: NDArray[np.integer[Any]],
    names: Sequence[str],
    causes: str,
) -> list[Finding]:
    """Check that not all images are predicted as one class."""
    counts = np.bincount(prediction, minlength=len(names))
    top = int(counts.argmax())
    num_images, count = len(prediction), int(counts[top])
    if num_images < _MIN_IMAGES or len(names) < 2 or count < 0.99 * num_images:
        return []
    # no finding if the images really are of this class
    if (label == top).mean() > 0.9:
        return []
    text = f"{count:,} of {num_images:,} images are predicted as class {names[top]!r}. {causes}"
    return [Finding(text.strip(), suspicious=count == num_images)]


def _chance_accuracy(
    label: NDArray[np.integer[Any]], prediction: NDArray[np.integer[Any]], num_classes: int
) -> float:
    """Return the expected accuracy if the predictions were shuffled."""
    shares = [np.bincount(item, minlength=num_classes) / len(item) for item in (label, prediction)]
    return float(shares[0] @ shares[1])


def _check_class_order(
    label: NDArray[np.integer[Any]], prediction: NDArray[np.integer[Any]], names: Sequence[str]
) -> list[Finding]:
    """Check that no other order of the classes fits the predictions far better.

    The optimal assignment of labels to predictions is computed from the confusion matrix. It must
    be clearly better than that of shuffled predictions: with few images of many classes, some
    assignment always looks good.

    Args:
        label: ``(N,)`` classes, all known.
        prediction: ``(N,)`` predicted classes.
        names: Class names by label.

    Returns:
        A finding if an assignment doubles the accuracy, or if most images of some classes are
        predicted as each other; suspicious if the accuracy would be far better.
    """
    num_classes = len(names)
    if num_classes > _MAX_CLASSES:
        return []
    confusion = _confusion_matrix(label, prediction, num_classes)
    accuracy = confusion.trace() / len(label)
    rows, columns, best = _best_assignment(confusion)
    sizes = confusion.sum(axis=1)
    moved = [
        (row, column)
        for row, column in zip(rows, columns, strict=True)
        if row != column and confusion[row, column] > sizes[row] / 2 and sizes[row] >= 5
    ]
    far_better = best >= max(2 * accuracy, accuracy + 0.05) or best > accuracy + 0.25
    if not far_better and len(moved) < 2:
        return []
    generator = np.random.default_rng(0)
    shuffles = (generator.permutation(prediction) for _ in range(_NUM_SHUFFLES))
    by_chance = max(
        _best_assignment(_confusion_matrix(label, shuffled, num_classes))[2]
        for shuffled in shuffles
    )
    if best < by_chance + _CHANCE_KAPPA * (1 - by_chance):
        return []
    moved = moved or [
        (row, column)
        for row, column in zip(rows, columns, strict=True)
        if row != column and confusion[row, column]
    ]
    moved.sort(key=lambda pair: -confusion[pair])
    examples = ", ".join(
        f"{confusion[row, column]} of {sizes[row]} images of {names[row]!r} are predicted as "
        f"{names[column]!r}"
        for row, column in moved[:_NUM_SHOWN]
    )
    more = f", and {len(moved) - _NUM_SHOWN} more classes" if len(moved) > _NUM_SHOWN else ""
    order = _better_order(confusion, names, best)
    return [
        Finding(
            f"the classes are in another order than the classifier's: accuracy is {accuracy:.2%}, "
            f"and {best:.2%} with the best assignment of classes ({examples}{more}). {order}",
            suspicious=bool(far_better),
        )
    ]


def _best_assignment(confusion: _Int64) -> tuple[list[int], list[int], float]:
    """Return the assignment of labels to predictions with the highest accuracy, and the latter."""
    # here: a third of a second, and most stages make no assignment
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(confusion, maximize=True)
    return rows.tolist(), columns.tolist(), float(confusion[rows, columns].sum() / confusion.sum())


def _better_order(confusion: _Int64, names: Sequence[str], best: float) -> str:
    """Return the remedy, with the order of class names that explains the assignment, if any."""
    for order, in_order in class_orders(names).items():
        columns = [in_order.index(name) for name in names]
        accuracy = confusion[range(len(names)), columns].sum() / confusion.sum()
        if accuracy > 0.99 * best:
            shown = ", ".join(in_order[:_NUM_SHOWN])
            return (
                f"The {order} order of the classes ({shown}, ...) gives {accuracy:.2%}: index the "
                f"folders with --class-order {order}."
            )
    return "Rename the class folders so that they sort in the order of the classifier's classes."


def check_class_names(source: str, names: Sequence[str], classes: Sequence[str]) -> list[Finding]:
    """Check that the class names of ID images are classes of the run.

    Args:
        source: Name of the image set.
        names: Its class names.
        classes: Class names of the run; empty if unknown.
    """
    unknown = [name for name in names if name not in classes]
    if not classes or not unknown:
        return []
    by_casefold = {name.casefold(): name for name in classes}
    similar = {name: by_casefold.get(name.casefold()) for name in unknown}
    shown = ", ".join(
        repr(name) if similar[name] is None else f"{name!r} (did you mean {similar[name]!r}?)"
        for name in unknown[:_NUM_SHOWN]
    )
    more = f" and {len(unknown) - _NUM_SHOWN} more" if len(unknown) > _NUM_SHOWN else ""
    known = ", ".join(repr(name) for name in classes[:_NUM_SHOWN])
    return [
        Finding(
            f"{source} has classes that the run does not have: {shown}{more}. Their images do not "
            f"count in the accuracy. The run has {len(classes)} classes: {known}, ..."
        )
    ]


def check_ood_names(source: str, names: Sequence[str], classes: Sequence[str]) -> list[Finding]:
    """Check that no class of OOD images has the name of a class of the run.

    Args:
        source: Name of the image set.
        names: Its class names; numbers are not names.
        classes: Class names of the run; empty if unknown.
    """
    known = {name.casefold() for name in classes if not name.isdigit()}
    both = [name for name in names if name.casefold() in known]
    if not both:
        return []
    shown = ", ".join(repr(name) for name in both[:_NUM_SHOWN])
    more = f" and {len(both) - _NUM_SHOWN} more" if len(both) > _NUM_SHOWN else ""
    return [
        Finding(
            f"OOD images of {source} are in classes with names of ID classes: {shown}{more}. "
            "Remove them if they show the same."
        )
    ]


def check_scores(scores: Mapping[str, Mapping[str, NDArray[np.floating[Any]]]]) -> list[Finding]:
    """Check that the scores of each method distinguish images.

    Args:
        scores: Scores by set and by method, ``(B,)`` each.
    """
    constant, tied = [], []
    for method in next(iter(scores.values())):
        values = np.concatenate([by_method[method] for by_method in scores.values()])
        largest = np.unique(values, return_counts=True)[1].max() / len(values)
        if np.ptp(values) <= 4 * np.finfo(np.float32).eps * np.abs(values).max():
            constant.append(method)
        elif largest > 0.5 and len(values) >= _MIN_IMAGES:
            tied.append(f"{method} ({largest:.0%})")
    findings = []
    if constant:
        findings.append(
            Finding(
                f"{', '.join(constant)}: every image has the same score, so the metrics are "
                "meaningless.",
                suspicious="heatmap" in constant,
            )
        )
    if tied:
        findings.append(
            Finding(
                f"{', '.join(tied)}: so many images have the same score that the metrics are of "
                "little use."
            )
        )
    return findings


def check_calibration(num_images: int, level: float) -> list[Finding]:
    """Check that there are enough held-out ID images for a false-alarm level.

    Args:
        num_images: Number of held-out ID images.
        level: Share of ID images that may be called OOD.
    """
    needed = num_needed(level)
    if num_images >= needed:
        return []
    return [
        Finding(
            f"no threshold and no decisions: a false-alarm level of {level:g} needs at least "
            f"{needed:,} held-out ID images, and there are {num_images:,}. Hold out more with "
            "--calibration or --calibration-share, or raise --false-alarm to "
            f"{math.ceil(1000 / (num_images + 1)) / 1000:g}."
        )
    ]


def check_fits(
    features: NDArray[np.float32],
    num_images: int,
    num_ood: int,
    neighbours: int,
    class_sizes: Sequence[int],
) -> list[Finding]:
    """Check that the training data suit all baselines.

    The bounds are where AUROC drops by more than 3 points on CIFAR-10 with a ResNet-20.

    Args:
        features: ``(B, D)`` features of some ID training images.
        num_images: Number of ID training images that the baselines are fitted on.
        num_ood: Number of auxiliary OOD images.
        neighbours: k of the kNN score.
        class_sizes: Number of ID training images predicted as each class.
    """
    num_features = features.shape[1]
    findings = []
    if num_images < 5 * num_features:
        findings.append(
            Finding(
                f"mahalanobis and vim: {num_images:,} ID images are few for a covariance of "
                f"{num_features:,} features (use at least {5 * num_features:,}), so they may look "
                "worse than they are."
            )
        )
    negative = float((features < 0).mean())
    if negative > 0.01:
        findings.append(
            Finding(
                f"ash and react: {negative:.0%} of all feature values are negative, and both are "
                "designed for features after a ReLU, so they may look worse than they are."
            )
        )
    small = [size for size in class_sizes if 0 < size <= neighbours]
    # k is chosen so that a tenth of the classes may be too small for it
    if len(small) > 0.1 * len(class_sizes) and neighbours > 1:
        findings.append(
            Finding(
                f"knn: {len(small):,} of {len(class_sizes):,} classes have no more than k = "
                f"{neighbours} ID images, whose k-th neighbour is of another class. Lower "
                "--neighbours."
            )
        )
    if num_ood < 50:
        findings.append(
            Finding(
                f"logistic_regression and mlp are fitted on {num_ood:,} OOD images (use at least "
                "50), so they may look worse than they are."
            )
        )
    return findings


def check_resamples(num_resamples: int) -> list[Finding]:
    """Check that there are enough resamples for a 95 % interval."""
    if num_resamples >= 100:
        return []
    return [Finding(f"intervals of {num_resamples} resamples are unreliable: use 1000.")]
