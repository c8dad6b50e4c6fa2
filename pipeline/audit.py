"""Checks of what a stage measured: is it what was meant?"""

from collections.abc import Mapping, Sequence

from ood_heatmap.cache.shards import Rows
from ood_heatmap.classifier import Classifier, ClassifierConfig
from ood_heatmap.sanity import Finding, check_classification


def check_index(
    columns: Mapping[str, Rows], classes: Sequence[str], classifier: Classifier
) -> list[Finding]:
    """Check what the classifier predicts on the ID training set.

    Args:
        columns: Of the index.
        classes: Class names by label; empty when unknown.
        classifier: The classifier of the index.
    """
    hints = []
    if is_users_code(classifier.config):
        hints.append("Unless its function loads weights, a network is random without --weights.")
    return check_classification(
        columns["label"].read(),
        columns["prediction"].read(),
        classes,
        classifier.num_classes,
        hints=hints,
        unnormalized=is_unnormalized(classifier.config),
    )


def is_users_code(config: ClassifierConfig) -> bool:
    """Tell whether a function of the user makes the network."""
    return ":" in config.spec and not config.spec.startswith(("torchvision/", "timm/"))


def is_unnormalized(config: ClassifierConfig) -> bool:
    """Tell whether the network takes pixels in [0, 1], which is so where nobody said otherwise."""
    return set(config.mean) == {0.0} and set(config.std) == {1.0}
