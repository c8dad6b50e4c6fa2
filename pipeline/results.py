"""What each stage hands on in its manifest, typed: written by the stage, parsed when it is read."""

import types
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from ood_heatmap.cache.manifest import Manifest
from ood_heatmap.errors import DamagedCacheError

_ResultsT = TypeVar("_ResultsT", bound="Results")


@dataclass(frozen=True, kw_only=True)
class Results:
    """What every stage hands on.

    Args:
        warnings: What was measured and is probably not meant, one sentence each.
        suspicious: Those of the warnings after which going on is pointless unless it is meant.
    """

    warnings: tuple[str, ...] = ()
    suspicious: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the results as a manifest holds them."""
        return asdict(self)

    @classmethod
    def from_manifest(cls: type[_ResultsT], manifest: Manifest) -> _ResultsT:
        """Return the results of a stage.

        Raises:
            DamagedCacheError: A field is missing, or of another type.
        """
        hints = get_type_hints(cls)
        values = {}
        for field in fields(cls):
            try:
                values[field.name] = _parse(hints[field.name], manifest.results[field.name])
            except (KeyError, TypeError) as error:
                raise DamagedCacheError(
                    f"the manifest of stage {manifest.stage} is damaged (results.{field.name}). "
                    "Make the stage again with --overwrite."
                ) from error
        return cls(**values)


def _parse(kind: Any, value: Any) -> Any:
    """Return a value of JSON as one of a type: tuples from lists, numbers as float."""
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
        source: The ID training set, as it was named.
        classes: Class names by label, empty when unknown.
        classifier: ``ClassifierConfig.to_json()``.
        head: Name of the classifier's last linear layer.
        num_features: D, width of the features.
        num_classes: L, classes of the classifier.
        map_names: Modules that the feature maps come from, the deepest first.
        map_shapes: ``(C, h, w)`` of each feature map.
        backend: What searches.
        num_images: ID images indexed.
        num_labelled: Those with a known label.
        accuracy: Share of them that is predicted as labelled; None when there are none.
        class_counts: ID images predicted as each class.
        feature_min: Over all ID training features.
        feature_max: Over all ID training features.
        skipped: Names of the images left out as unreadable.
        versions: Of the libraries that decode, resize and classify.
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


@dataclass(frozen=True, kw_only=True)
class TargetsResults(Results):
    """Results of stage 2.

    Args:
        source: The OOD training set, as it was named.
        num_images: OOD images paired.
        num_patched: ID images with a patch of an OOD image.
        pairing: How they were paired.
        backend: What searched.
        num_without_class: OOD images whose predicted class has no ID image.
        median_distance: Of the features, between the images of a pair.
        skipped: Names of the images left out as unreadable.
    """

    source: str
    num_images: int
    num_patched: int
    pairing: str
    backend: str
    num_without_class: int
    median_distance: float
    skipped: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class DecoderResults(Results):
    """Results of stage 3.

    Args:
        decoder: The fields of ``DecoderConfig``.
        num_parameters: Of the decoder.
        num_id: ID images trained on.
        num_ood: OOD images trained on, patched ones included.
        pairing: How the OOD images were paired.
        color_max: Top of the one colour scale for heatmaps of this decoder.
    """

    decoder: dict[str, Any]
    num_parameters: int
    num_id: int
    num_ood: int
    pairing: str
    color_max: float


@dataclass(frozen=True, kw_only=True)
class EvaluationResults(Results):
    """Results of stage 4; the table is in ``metrics.json``.

    Args:
        sets: Names of the OOD test sets.
        near: Those that count as near.
        false_alarm: Share of ID images that may be called OOD; None without thresholds.
        num_calibration: Held-out ID images that the thresholds are from; None without.
    """

    sets: tuple[str, ...]
    near: tuple[str, ...]
    false_alarm: float | None = None
    num_calibration: int | None = None


@dataclass(frozen=True, kw_only=True)
class LocalizationResults(Results):
    """Results of ``localize``; the table is in ``localization.json``.

    Args:
        lowered_pixel_auroc: By how much each sanity check lowers the pixel AUROC.
    """

    lowered_pixel_auroc: dict[str, Any]
