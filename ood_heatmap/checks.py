"""Checks of a classifier's outputs: when it is loaded, restored, and run on images."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import metadata

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ood_heatmap.errors import OodHeatmapError, StaleCacheError


def rounding_bound(autocast: bool) -> float:
    """Return the largest relative distance that rounding can cause within one process.

    Another batch size may select other kernels: 4e-7 was measured for float32 and 0 for bfloat16,
    where a single rounding difference is 4e-3. Dropout and the like cause 0.1 to 1.
    """
    return 5e-2 if autocast else 1e-3


def device_bound(autocast: bool) -> float:
    """Return the largest relative distance that rounding can cause between devices.

    TF32 on a GPU multiplies with a 10-bit mantissa, which changes the features of trained CIFAR
    ResNets by up to 0.0014 and of EfficientNet-Lite0 by up to 0.0056; two implementations of
    bfloat16 differ by up to 0.013 and 0.021. A wrong network differs by more: Inception v3 without
    its own normalization by 0.8.
    """
    return 1.5e-1 if autocast else 3e-2


def _relative_distance(values: Tensor, expected: Tensor) -> float:
    """Return the maximum of ``||values - expected|| / ||expected||`` over rows ``(B, ...)``."""
    values, expected = values.double().flatten(1), expected.double().flatten(1)
    distance = (values - expected).norm(dim=1) / expected.norm(dim=1).clamp(min=1e-30)
    return float(distance.max())


def check_logits(spec: str, logits: Tensor) -> None:
    """Refuse logits ``(B, L)`` that a classifier cannot return."""
    if logits.shape[1] == 1:
        raise OodHeatmapError(
            f"{spec} returns one logit per image, whose softmax is always 1. Give its last layer "
            "two outputs, with weight and bias 0 for the first class."
        )
    if not logits.isfinite().all():
        label = int((~logits.isfinite()).any(dim=0).nonzero()[0])
        raise OodHeatmapError(
            f"{spec} returns NaN or infinite logits, first for class {label}. Check its weights, "
            "--mean and --std."
        )


def check_finite_outputs(
    spec: str, logits: Tensor, features: Tensor, maps: Sequence[Tensor]
) -> None:
    """Refuse outputs that are NaN or infinite."""
    check_logits(spec, logits)
    if not all(values.isfinite().all() for values in (features, *maps)):
        raise OodHeatmapError(
            f"{spec} returns NaN or infinite features. Check its weights, --mean and --std."
        )


def check_head(head: str, logits: Tensor, expected: Tensor, bound: float) -> None:
    """Refuse a network whose logits are not the output of its head.

    Args:
        head: Description of the head, for the message.
        logits: Output of the head for the features, ``(B, L)``.
        expected: Output of the network.
        bound: Largest relative distance that rounding can cause.
    """
    if not _relative_distance(logits, expected) <= bound:
        raise OodHeatmapError(
            f"{head} is not what the network returns: something follows, such as a log_softmax, or "
            "the mean of several heads or views. Pass --classifier a function whose network ends "
            "in one linear layer."
        )


def check_deterministic(spec: str, features: Tensor, alone: Tensor, bound: float) -> None:
    """Refuse features that are random or depend on the rest of the batch.

    Args:
        spec: The classifier's spec, for the message.
        features: ``(3, D)`` features of two images, and of the first again.
        alone: ``(1, D)`` features of the second image as a batch of one.
        bound: Largest relative distance that rounding can cause.
    """
    if not _relative_distance(features[2:], features[:1]) <= bound:
        raise OodHeatmapError(
            f"{spec} returns different features for the same image: something in it is random in "
            "eval mode, such as F.dropout without training=self.training."
        )
    if not _relative_distance(alone, features[1:2]) <= bound:
        raise OodHeatmapError(
            f"{spec} returns different features for an image alone and in a batch: they depend on "
            "the other images, as with batch norm that uses batch statistics."
        )


def check_same_outputs(
    spec: str,
    outputs: Mapping[str, Tensor],
    expected: Sequence[NDArray[np.floating]],
    bound: float,
    versions: Mapping[str, str],
) -> None:
    """Refuse a restored classifier whose outputs differ from those in the index.

    Args:
        spec: The classifier's spec, for the message.
        outputs: Current outputs by name, ``(n, ...)`` each.
        expected: Outputs in the index, in the same order; there may be fewer or more.
        bound: Largest relative distance that rounding can cause.
        versions: ``library_versions()`` when the run was indexed.

    Raises:
        StaleCacheError: An output differs.
    """
    for (name, values), before in zip(outputs.items(), expected, strict=False):
        if values.shape != before.shape:
            difference = f"shape {before.shape} then, {tuple(values.shape)} now"
        else:
            distance = _relative_distance(values.cpu(), torch.from_numpy(before))
            if distance <= bound:
                continue
            difference = f"relative difference {distance:.2g}, rounding causes up to {bound:g}"
        now = library_versions()
        upgrades = [
            f"{library} {version} then, {now.get(library, 'none')} now"
            for library, version in versions.items()
            if version != now.get(library)
        ]
        raise StaleCacheError(
            f"{spec} returns different {name} than when the run was indexed: "
            f"{'; '.join([difference, *upgrades])}. Restore what changed, or run `ood-heatmap "
            "index` again with --overwrite."
        )


def library_versions() -> dict[str, str]:
    """Return the versions of the installed libraries that features depend on."""
    versions = {}
    for name in ("torch", "torchvision", "timm", "pillow"):
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def check_finite(
    values: NDArray[np.float32],
    rows: NDArray[np.int64],
    names: Sequence[str],
    kind: str = "features",
) -> None:
    """Refuse outputs that are NaN or infinite, and name the image.

    Args:
        values: ``(B, D)`` outputs of the classifier.
        rows: ``(B,)`` rows in the image set.
        names: Names of all images of the set.
        kind: What the values are, for the message.

    Raises:
        OodHeatmapError: A value is not finite.
    """
    finite = np.isfinite(values).all(axis=1)
    if not finite.all():
        row = int(rows[int(finite.argmin())])
        raise OodHeatmapError(
            f"the classifier returns NaN or infinite {kind} for {names[row]}. "
            "Check its weights, --mean and --std."
        )
