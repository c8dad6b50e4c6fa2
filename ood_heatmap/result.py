"""What the detector returns: arrays for a batch, a record for one image, and their pictures."""

import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ood_heatmap.errors import UsageError
from ood_heatmap.heatmap import pixel_score
from ood_heatmap.images import Transform
from ood_heatmap.nearest import Nearest, Selection
from ood_heatmap.pixels import ImageLike, source_name, to_picture

if TYPE_CHECKING:
    import pandas

    # drawing needs matplotlib's fonts, and is imported where it is called
    from ood_heatmap.pictures import ColorScale


@dataclass(frozen=True)
class Scale:
    """What all results of a detector have in common: names, thresholds, colours.

    Args:
        classes: Class names; empty when unknown.
        false_alarm: Share of ID images that may be called OOD.
        threshold: Score above which an image is called OOD; NaN or infinite without a decision.
        pixel_threshold: Pixel score above which a pixel is called OOD, likewise.
        color_max: Top of the colour scale.
        transform: Transform of the classifier; None if the images are not known.
    """

    classes: tuple[str, ...] = ()
    false_alarm: float = 0.05
    threshold: float = math.nan
    pixel_threshold: float = math.nan
    color_max: float = 1.0
    transform: Transform | None = None

    def class_name(self, label: int) -> str:
        """Return the name of a class, or its number if class names are unknown."""
        return self.classes[label] if self.classes else str(label)


@dataclass(frozen=True)
class Detection:
    """Output of the detector for one image, as plain Python values.

    Args:
        image: Path of the image; None if it was given as pixels.
        score: Larger is more OOD.
        p_value: Share of held-out ID images that score at least as high; None without a
            calibration.
        is_ood: The decision; None without one, see ``Result``.
        prediction: Predicted class.
        class_name: Its name, or its number if class names are unknown.
        confidence: Softmax probability of the predicted class.
        nearest: Rows of the nearest ID training images; empty unless asked for.
        distance: Their distances.
        heatmap: ``(C, H, W)`` float32.
    """

    image: str | None
    score: float
    p_value: float | None
    is_ood: bool | None
    prediction: int
    class_name: str
    confidence: float
    nearest: tuple[int, ...]
    distance: tuple[float, ...]
    heatmap: NDArray[np.float32]

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the heatmap, as values that JSON has."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        del values["heatmap"]
        return {**values, "nearest": list(self.nearest), "distance": list(self.distance)}

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value!r}" for name, value in self.to_dict().items())
        return f"Detection({shown}, heatmap={_shape(self.heatmap)})"


@dataclass(frozen=True)
class TensorResult:
    """Output of the detector for B images, as tensors on its device; see ``Result``."""

    score: Tensor
    heatmap: Tensor
    prediction: Tensor
    p_value: Tensor
    confidence: Tensor
    is_ood: Tensor | None = None

    def __len__(self) -> int:
        return len(self.score)

    def to(self, device: torch.device | str) -> "TensorResult":
        """Copy to a device."""
        return TensorResult(**{name: item.to(device) for name, item in self._tensors().items()})

    @staticmethod
    def concatenate(results: Sequence["TensorResult"]) -> "TensorResult":
        """Join the results of batches, at least one."""
        parts = [result._tensors() for result in results]
        return TensorResult(
            **{name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        )

    def to_numpy(self, **about: Any) -> "Result":
        """Copy to the host.

        Args:
            **about: The other fields of the result.
        """
        arrays = {name: item.detach().cpu().numpy() for name, item in self._tensors().items()}
        return Result(**arrays, **about)

    def _tensors(self) -> dict[str, Any]:
        """Return the tensors that the result has, by field."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: item for name, item in found.items() if item is not None}


@dataclass(frozen=True, repr=False, eq=False)
class Result:
    """Output of the detector for B images.

    ``len(result)`` is B, ``result[i]`` is a ``Detection``, ``result[2:5]`` and ``result[mask]`` are
    results of fewer images, and iterating yields detections.

    Args:
        score: ``(B,)`` float32; larger is more OOD.
        heatmap: ``(B, C, H, W)`` float32 output of the decoder: in [-1, 1] for a signed target,
            else in [0, 1].
        prediction: ``(B,)`` int64 predicted class.
        p_value: ``(B,)`` float64 in (0, 1], the share of held-out ID images that score at least as
            high; NaN without a calibration.
        confidence: ``(B,)`` float32 softmax probability of the predicted class.
        is_ood: ``(B,)`` bool, the decision at the detector's false-alarm level. None without a
            calibration, or if it has fewer held-out ID images than the level needs.
        nearest: The nearest ID training images, if asked for.
        scale: Names, thresholds and colours of the detector.
        images: The images as given, for pictures: PIL images and paths at their own size. Pixels
            of an iterator or a normalized batch are kept at the classifier's input size.
        is_transformed: Images that are pixels are at the classifier's input size.
    """

    score: NDArray[np.float32]
    heatmap: NDArray[np.float32]
    prediction: NDArray[np.int64]
    p_value: NDArray[np.float64]
    confidence: NDArray[np.float32]
    is_ood: NDArray[np.bool_] | None = None
    nearest: Nearest | None = None
    scale: Scale = Scale()
    images: Sequence[ImageLike] = ()
    is_transformed: bool = False

    @cached_property
    def pixel_score(self) -> NDArray[np.float32]:
        """``(B, H, W)`` in [0, 1], maximum of |heatmap| over channels; larger is more OOD."""
        return pixel_score(torch.from_numpy(self.heatmap)).numpy()

    def __len__(self) -> int:
        return len(self.score)

    @overload
    def __getitem__(self, selected: int) -> Detection: ...
    @overload
    def __getitem__(self, selected: Selection) -> "Result": ...
    def __getitem__(self, selected: int | Selection) -> "Detection | Result":
        if not isinstance(selected, int | slice):
            selected = np.asarray(selected)
            if not selected.ndim:
                selected = operator.index(selected)
            elif not selected.size:
                # an empty list has no integers
                selected = slice(0)
        if isinstance(selected, int):
            return self._detection(range(len(self))[selected])
        rows = np.arange(len(self))[selected]
        return replace(
            self,
            score=self.score[rows],
            heatmap=self.heatmap[rows] if len(self.heatmap) else self.heatmap,
            prediction=self.prediction[rows],
            p_value=self.p_value[rows],
            is_ood=None if self.is_ood is None else self.is_ood[rows],
            confidence=self.confidence[rows],
            nearest=None if self.nearest is None else self.nearest[rows],
            images=[self.images[row] for row in rows.tolist()] if self.images else (),
        )

    def __iter__(self) -> Iterator[Detection]:
        return (self[row] for row in range(len(self)))

    @staticmethod
    def concatenate(results: Sequence["Result"]) -> "Result":
        """Join results of the same detector, at least one.

        Decisions, heatmaps, images, and equally many nearest ID images are left out unless all
        results have them.

        Raises:
            UsageError: There is no result, or class names, level or thresholds differ.
        """
        # compared as text: NaN, without a calibration, equals nothing
        if len({repr(result.scale) for result in results}) != 1:
            raise UsageError("only results of the same detector at the same level can be joined.")
        first = results[0]
        joined: dict[str, Any] = {
            name: np.concatenate([getattr(result, name) for result in results])
            for name in ("score", "heatmap", "prediction", "p_value", "confidence")
        }
        if len(joined["heatmap"]) != len(joined["score"]):
            joined["heatmap"] = first.heatmap[:0]
        decided = [result.is_ood for result in results if result.is_ood is not None]
        found = [result.nearest for result in results if result.nearest is not None]
        is_found = len(found) == len(results) and len({item.row.shape[1] for item in found}) == 1
        images = [image for result in results for image in result.images]
        of_pixels = {r.is_transformed for r in results if None in map(source_name, r.images)}
        return replace(
            first,
            **joined,
            is_ood=np.concatenate(decided) if len(decided) == len(results) else None,
            nearest=Nearest.concatenate(found) if is_found else None,
            images=images if len(of_pixels) < 2 and len(images) == len(joined["score"]) else (),
            is_transformed=True in of_pixels,
        )

    def _detection(self, row: int) -> Detection:
        """Return the record of one image."""
        p_value, label = float(self.p_value[row]), int(self.prediction[row])
        nearest = self.nearest
        known = slice(0) if nearest is None else nearest.row[row] >= 0
        return Detection(
            image=source_name(self.images[row]) if self.images else None,
            score=float(self.score[row]),
            p_value=None if math.isnan(p_value) else p_value,
            is_ood=None if self.is_ood is None else bool(self.is_ood[row]),
            prediction=label,
            class_name=self.scale.class_name(label),
            confidence=float(self.confidence[row]),
            nearest=() if nearest is None else tuple(nearest.row[row][known].tolist()),
            distance=() if nearest is None else tuple(nearest.distance[row][known].tolist()),
            heatmap=self.heatmap[row] if len(self.heatmap) else self.heatmap,
        )

    def __repr__(self) -> str:
        parts = [f"{len(self)} image" + "s" * (len(self) != 1)]
        if len(self):
            parts.append(f"score {self.score.min():.4f} to {self.score.max():.4f}")
        level = f"false-alarm level {self.scale.false_alarm:g}"
        if self.is_ood is not None:
            parts.append(f"{int(self.is_ood.sum())} OOD at {level}")
        elif np.isnan(self.p_value).all():
            parts.append("not calibrated")
        else:
            parts.append(f"no decision at {level}")
        return f"Result({', '.join(parts)}, heatmap {_shape(self.heatmap)})"

    def to_dict(self) -> dict[str, list[Any]]:
        """Return columns of plain Python values, without heatmaps: for JSON and data frames.

        The columns are those of ``Detection``; ``image``, ``nearest`` and ``distance`` are left out
        where no image has them.
        """
        records = [detection.to_dict() for detection in self]
        names = [field.name for field in fields(Detection) if field.name != "heatmap"]
        columns = {name: [record[name] for record in records] for name in names}
        for name in ("image", "nearest", "distance"):
            if not any(value not in (None, []) for value in columns[name]):
                del columns[name]
        return columns

    def to_pandas(self) -> "pandas.DataFrame":
        """Return a data frame with a row for each image, without heatmaps.

        Raises:
            UsageError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise UsageError("pandas is not installed: pip install pandas.") from None
        return pandas.DataFrame(self.to_dict())

    def image(self, row: int) -> Image.Image:
        """Return an image upright, in RGB, at the size at which it was given.

        Raises:
            UsageError: The result has no images, such as one made from a classifier's output.
        """
        if not self.images:
            raise UsageError("this result has no images: call the detector with images.")
        return to_picture(self.images[row])

    def overlay(self, row: int) -> Image.Image:
        """Draw the heatmap of an image over it, with the contour of what is called OOD.

        Returns:
            RGB, of the size of ``image(row)`` unless that is very large or small.

        Raises:
            UsageError: The result has no images or no heatmaps.
        """
        from ood_heatmap.pictures import draw_overlay

        photo = self.image(row)
        return draw_overlay(
            photo, self._pixel_score(row), self._seen_box(row, photo), self._colors()
        )

    def plot(self, row: int) -> Image.Image:
        """Draw a panel: image, overlay, nearest ID images if asked for; the decision in words.

        Returns:
            RGB; a notebook shows it where it is the last line of a cell.

        Raises:
            UsageError: The result has no images or no heatmaps.
        """
        from ood_heatmap.pictures import Decision, draw_panel

        photo = self.image(row)
        decision = Decision(
            score=float(self.score[row]),
            prediction=self.scale.class_name(int(self.prediction[row])),
            is_ood=None if self.is_ood is None else bool(self.is_ood[row]),
            threshold=self.scale.threshold,
            false_alarm=self.scale.false_alarm,
            p_value=float(self.p_value[row]),
            confidence=float(self.confidence[row]),
        )
        neighbours = self.nearest.neighbours(row) if self.nearest else []
        pixels, box = self._pixel_score(row), self._seen_box(row, photo)
        return draw_panel(photo, pixels, box, self._colors(), decision, neighbours)

    def _pixel_score(self, row: int) -> NDArray[np.float32]:
        if not len(self.heatmap):
            raise UsageError("this result has no heatmaps.")
        scores: NDArray[np.float32] = pixel_score(torch.from_numpy(self.heatmap[[row]])).numpy()[0]
        return scores

    def _seen_box(self, row: int, photo: Image.Image) -> tuple[float, float, float, float]:
        """Return the part of an image that the classifier sees."""
        transform = self.scale.transform
        if transform is None or (self.is_transformed and source_name(self.images[row]) is None):
            return 0.0, 0.0, float(photo.width), float(photo.height)
        return transform.seen_box(photo.width, photo.height)

    def _colors(self) -> "ColorScale":
        from ood_heatmap.pictures import ColorScale

        return ColorScale(self.scale.color_max, self.scale.pixel_threshold)


def _shape(array: NDArray[Any]) -> str:
    return " x ".join(map(str, array.shape))
