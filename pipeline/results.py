"""Typed results of each stage, stored in its manifest and parsed when it is read."""

import types
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from ood_heatmap.cache.manifest import Manifest
from ood_heatmap.checkpoints import first_few
from ood_heatmap.errors import DamagedCacheError

_ResultsT = TypeVar("_ResultsT", bound="Results")


@dataclass(frozen=True, kw_only=True)
class Results:
    """Fields common to the results of all stages.

    Args:
        warnings: Findings that are probably not intended, one sentence each.
        suspicious: The warnings after which continuing is pointless unless they are intended.
    """

    warnings: tuple[str, ...] = ()
    suspicious: tuple[str, ...] = ()

    def summary(self) -> list[str]:
        """Return lines that summarize the results for the terminal."""
        return []

    def to_json(self) -> dict[str, Any]:
        """Return the results as stored in a manifest."""
        return asdict(self)

    @classmethod
    def from_manifest(cls: type[_ResultsT], manifest: Manifest) -> _ResultsT:
        """Parse the results of a stage.

        Raises:
            DamagedCacheError: A field is missing or has another type.
        """
        hints = get_type_hints(cls)
        values = {}
        for field in fields(cls):
            try:
                values[field.name] = _parse(hints[field.name], manifest.results[field.name])
            except (KeyError, TypeError) as error:
                raise DamagedCacheError(
                    f"the manifest of stage {manifest.stage} is damaged (results.{field.name}). "
                    "Run the stage again with --overwrite."
                ) from error
        return cls(**values)


def _parse(kind: Any, value: Any) -> Any:
    """Convert a JSON value to a type: lists become tuples; other types are only checked."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return None if value is None else _parse(arguments[0], value)
    if origin is tuple:
        if not isinstance(value, list):
            raise TypeError(value)
        return tuple(_parse(arguments[0], item) for item in value)
    wanted = (int, float) if kind is float else origin or kind
    if not isinstance(value, wanted) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(value)
    return value


@dataclass(frozen=True, kw_only=True)
class IndexResults(Results):
    """Results of stage 1.

    Args:
        source: The ID training set, as named by the user.
        classes: Class names by label, empty when unknown.
        classifier: ``ClassifierConfig.to_json()``.
        head: Name of the classifier's last linear layer.
        num_features: D, feature width.
        num_classes: L, number of classes of the classifier.
        map_names: Names of the modules whose outputs are the feature maps, the deepest first.
        map_shapes: ``(C, h, w)`` of each feature map.
        backend: Search library and device.
        num_images: Number of ID images indexed.
        num_labelled: Number of ID images with a known label.
        accuracy: Accuracy on the labelled images; None if there are none.
        class_counts: Number of ID images predicted as each class.
        feature_min: Minimum over all ID training features.
        feature_max: Maximum over all ID training features.
        skipped: Names of the images skipped as unreadable.
        versions: Versions of the libraries that decode, resize and classify.
    """

    source: str
    classes: tuple[str, ...]
    classifier: dict[str, Any]
    head: str
    num_features: int
    num_classes: int
    map_names: tuple[str, ...]
    map_shapes: tuple[tuple[int, ...], ...]
    backend: str
    num_images: int
    num_labelled: int
    accuracy: float | None
    class_counts: tuple[int, ...]
    feature_min: float
    feature_max: float
    skipped: tuple[str, ...]
    versions: dict[str, Any]

    def summary(self) -> list[str]:
        """Return number of images, accuracy, and the spread of the predicted classes."""
        accuracy = "unknown: no labels" if self.accuracy is None else f"{self.accuracy:.2%}"
        empty = [str(label) for label, count in enumerate(self.class_counts) if count == 0]
        return [
            f"{self.num_images} ID images, {self.backend}",
            f"accuracy {accuracy}",
            f"images predicted as each class: {min(self.class_counts)} to {max(self.class_counts)}",
            *([f"no image is predicted as class {first_few(empty, 10)}"] if empty else []),
        ]


@dataclass(frozen=True, kw_only=True)
class TargetsResults(Results):
    """Results of stage 2.

    Args:
        source: The OOD training set, as named by the user.
        num_images: Number of OOD images paired.
        num_patched: Number of ID images with a patch of an OOD image.
        pairing: How OOD images were paired with ID images.
        backend: Search library and device.
        num_without_class: Number of OOD images whose predicted class has no ID image.
        median_distance: Median feature distance between the images of a pair.
        skipped: Names of the images skipped as unreadable.
    """

    source: str
    num_images: int
    num_patched: int
    pairing: str
    backend: str
    num_without_class: int
    median_distance: float
    skipped: tuple[str, ...]

    def summary(self) -> list[str]:
        """Return the number of pairs and patched images."""
        lines = [
            f"{self.num_images} OOD images paired ({self.pairing}), {self.backend}",
            f"median distance {self.median_distance:.3g}",
        ]
        if self.num_without_class:
            lines.append(f"{self.num_without_class} had no ID image of their class: searched all")
        if self.num_patched:
            lines.append(f"{self.num_patched} ID images with a patch of an OOD image")
        return lines


@dataclass(frozen=True, kw_only=True)
class DecoderResults(Results):
    """Results of stage 3.

    Args:
        decoder: The fields of ``DecoderConfig``.
        num_parameters: Number of parameters of the decoder.
        num_id: Number of ID training images.
        num_ood: Number of OOD training images, patched ones included.
        pairing: How OOD images were paired with ID images.
        color_max: Top of the shared colour scale for heatmaps of this decoder.
    """

    decoder: dict[str, Any]
    num_parameters: int
    num_id: int
    num_ood: int
    pairing: str
    color_max: float

    def summary(self) -> list[str]:
        """Return the size of the decoder and of its training set."""
        return [
            f"decoder of {self.num_parameters:,} parameters, {self.decoder['target']} target",
            f"trained on {self.num_id} ID and {self.num_ood} OOD images",
        ]


@dataclass(frozen=True, kw_only=True)
class EvaluationResults(Results):
    """Results of stage 4; the table is in ``metrics.json``.

    Args:
        sets: Names of the OOD test sets.
        near: Names of the near-OOD sets.
        false_alarm: Share of ID images that may be called OOD; None without thresholds.
        num_calibration: Number of held-out ID images behind the thresholds; None without.
    """

    sets: tuple[str, ...]
    near: tuple[str, ...]
    false_alarm: float | None = None
    num_calibration: int | None = None


@dataclass(frozen=True, kw_only=True)
class LocalizationResults(Results):
    """Results of ``localize``; the table is in ``localization.json``.

    Args:
        lowered_pixel_auroc: Decrease of the pixel AUROC in each sanity check.
    """

    lowered_pixel_auroc: dict[str, Any]
