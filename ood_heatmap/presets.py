"""Reads size, crop, mean and std off the evaluation transform that a classifier came with."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from ood_heatmap.errors import UsageError
from ood_heatmap.images import CropMode, Transform, interpolation_of

# a side in pixels, or a transform of this package, torchvision or timm
TransformLike: TypeAlias = Transform | int | Any
# steps that change the type of an image, not its content
_CONVERSIONS = {
    "ConvertImageDtype",
    "MaybePILToTensor",
    "MaybeToTensor",
    "PILToTensor",
    "RGB",
    "ToDtype",
    "ToImage",
    "ToPILImage",
    "ToTensor",
}


@dataclass(frozen=True)
class Preset:
    """What a transform does: geometry, and normalization if it has one."""

    transform: Transform
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


def read_preset(transform: TransformLike) -> Preset:
    """Read an evaluation transform.

    Args:
        transform: Side of the input in pixels, a ``Transform``, ``weights.transforms()`` of
            torchvision, or a ``Compose`` of resize, center crop, conversions and normalization.

    Raises:
        UsageError: The transform does something else, or its output is not square.
    """
    if isinstance(transform, Transform):
        return Preset(transform)
    if isinstance(transform, int):
        return Preset(Transform(transform))
    if type(transform).__name__ == "ImageClassification":
        mean, std = tuple(transform.mean), tuple(transform.std)
        return Preset(Transform.from_torchvision(transform), mean, std)
    return _read_steps(list(_iter_steps(transform)))


def _iter_steps(transform: Any) -> Iterator[Any]:
    """Yield the steps of a transform, also of nested ones."""
    parts = getattr(transform, "transforms", None)
    if not isinstance(parts, Sequence):
        yield transform
        return
    for part in parts:
        yield from _iter_steps(part)


def _read_steps(steps: Sequence[Any]) -> Preset:
    """Read resize, center crop and normalization, in this order."""
    found: dict[str, Any] = {}
    for step in steps:
        name = type(step).__name__
        if name in _CONVERSIONS:
            continue
        if name not in ("Resize", "CenterCrop", "Normalize") or name in found:
            raise UsageError(
                f"the transform has a step {name}, which is not part of an evaluation transform "
                "(resize, center crop, normalization). Pass the one used for validation, or "
                "transform=Transform(size, resize)."
            )
        if found.keys() & {"Normalize"} or (name == "Resize" and found):
            raise UsageError(f"the transform has {name} after {next(reversed(found))}.")
        found[name] = step
    preset = Preset(_read_geometry(found))
    if "Normalize" not in found:
        return preset
    mean, std = (tuple(map(float, getattr(found["Normalize"], name))) for name in ("mean", "std"))
    return replace(preset, mean=mean, std=std)


def _read_geometry(steps: Mapping[str, Any]) -> Transform:
    """Return the transform of a resize and a center crop, of which one may be missing."""
    resize = _sides(steps["Resize"].size) if "Resize" in steps else ()
    crop = _sides(steps["CenterCrop"].size) if "CenterCrop" in steps else ()
    if len(set(resize)) > 1 or len(set(crop)) > 1 or not (resize or crop):
        raise UsageError("the transform's output is not square: resize or crop it to one side.")
    if len(resize) == 1 and not crop:
        raise UsageError(
            f"Resize({resize[0]}) keeps the ratio of the sides, so its output is not square: add "
            f"CenterCrop({resize[0]}), or use Resize(({resize[0]}, {resize[0]}))."
        )
    if not resize:
        raise UsageError("the transform crops images of any size: add a Resize before it.")
    kind = interpolation_of(str(getattr(steps["Resize"].interpolation, "value", "")))
    mode: CropMode = "center" if len(resize) == 1 else "squash"
    side = crop[0] if crop else resize[0]
    return Transform(side, 0 if side == resize[0] else resize[0], kind, mode)


def _sides(size: Any) -> tuple[int, ...]:
    """Return (side,), or (height, width)."""
    return (size,) if isinstance(size, int) else tuple(size)
