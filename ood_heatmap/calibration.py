"""Calibration: p-values and thresholds from held-out ID images.

Split conformal prediction: the share of held-out ID scores that are at least as high is a p-value,
valid for any further ID image and any score distribution. No OOD image is needed.

Source: Vovk, Gammerman and Shafer, Algorithmic Learning in a Random World, 2005; Bates et al.,
    Testing for Outliers with Conformal p-values, Annals of Statistics 2023.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from ood_heatmap.errors import DamagedCacheError

# so that 0.29 * 100, in float64 28.999999999999996, counts as 29
_TOLERANCE = 1e-9
_Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Calibration:
    """Scores of held-out ID images, the reference for p-values and thresholds.

    Args:
        scores: ``(n,)`` float32 image scores, ascending.
        max_pixel_scores: ``(n,)`` float32 maximum pixel score of each image, ascending.
    """

    scores: _Float32
    max_pixel_scores: _Float32

    @staticmethod
    def fit(scores: _Float32, max_pixel_scores: _Float32) -> "Calibration":
        """Fit a calibration to scores of held-out ID images, in any order."""
        columns = (scores, max_pixel_scores)
        return Calibration(*(np.sort(values.astype(np.float32)) for values in columns))

    def p_value(self, scores: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
        """Return ``(1 + number of held-out ID images with at least this score) / (n + 1)``.

        For an ID image, ``P(p_value <= a) <= a``.

        Args:
            scores: ``(B,)``.

        Returns:
            ``(B,)`` in (0, 1].
        """
        below = np.searchsorted(self.scores, np.asarray(scores, np.float32), side="left")
        return (1.0 + len(self.scores) - below) / (len(self.scores) + 1)

    def threshold(self, false_alarm: float) -> float:
        """Return the score above which an image is called OOD.

        ``p_value(score) <= false_alarm`` is equivalent to ``score > threshold``. Infinite when
        ``has_threshold`` is False: then no decision is possible.
        """
        return _largest_allowed(self.scores, false_alarm)

    def pixel_threshold(self, false_alarm: float) -> float:
        """Return the pixel score above which a pixel is called OOD; infinite as ``threshold`` is.

        At most a share ``false_alarm`` of ID images have any such pixel.
        """
        return _largest_allowed(self.max_pixel_scores, false_alarm)

    def has_threshold(self, false_alarm: float) -> bool:
        """Return whether there are enough held-out images for decisions at this level."""
        return len(self.scores) >= num_needed(false_alarm)

    def to_bytes(self) -> bytes:
        """Serialize to the bytes of a calibration file, for ``from_bytes``."""
        return save({"scores": self.scores, "peaks": self.max_pixel_scores})

    @staticmethod
    def from_bytes(content: bytes, name: str) -> "Calibration":
        """Parse the bytes of a calibration file.

        Args:
            content: Bytes returned by ``to_bytes``.
            name: Name of the file, for the message.

        Raises:
            DamagedCacheError: Not a calibration file.
        """
        try:
            tensors = load(content)
            return Calibration.fit(tensors["scores"], tensors["peaks"])
        except (SafetensorError, KeyError) as error:
            raise DamagedCacheError(
                f"{name} is not a calibration file ({error}). Evaluate again."
            ) from None


def num_needed(false_alarm: float) -> int:
    """Return the number of held-out ID images needed for a level: ``1 / level - 1``, rounded up.

    With fewer images, no p-value is as low as the level.
    """
    return math.ceil((1 - _TOLERANCE) / false_alarm - 1)


def _largest_allowed(ascending: _Float32, false_alarm: float) -> float:
    """Return the lowest value exceeded with probability at most ``false_alarm``, or infinity."""
    num_above = math.floor(false_alarm * (len(ascending) + 1) + _TOLERANCE)
    return float(ascending[-num_above]) if num_above else math.inf
