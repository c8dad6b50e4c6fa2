"""From a score to a decision: p-values and thresholds from held-out ID images alone.

Split conformal: of n held-out ID scores, the share that is at least as high is a p-value that holds
for every further ID image, whatever the scores' distribution. No OOD image is needed.

Source: Vovk, Gammerman and Shafer, Algorithmic Learning in a Random World, 2005; Bates et al.,
    Testing for Outliers with Conformal p-values, Annals of Statistics 2023.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from ood_heatmap.errors import DamagedCacheError

Float32 = NDArray[np.float32]
FALSE_ALARM = 0.05


@dataclass(frozen=True)
class Calibration:
    """What held-out ID images look like to the detector.

    Args:
        scores: ``(n,)`` float32 image scores, ascending.
        peaks: ``(n,)`` float32 strongest pixel of each image, ascending.
    """

    scores: Float32
    peaks: Float32

    @staticmethod
    def fit(scores: Float32, peaks: Float32) -> "Calibration":
        """Return the calibration of held-out ID images, in any order."""
        return Calibration(*(np.sort(item.astype(np.float32)) for item in (scores, peaks)))

    def p_value(self, scores: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
        """Return ``(1 + how many held-out ID images score at least as high) / (n + 1)``, ``(B,)``.

        For an ID image it is at most ``a`` with a probability of at most ``a``.
        """
        below = np.searchsorted(self.scores, np.asarray(scores, np.float32), side="left")
        return (1.0 + len(self.scores) - below) / (len(self.scores) + 1)

    def threshold(self, false_alarm: float = FALSE_ALARM) -> float:
        """Return the score above which an image is called OOD.

        ``p_value(score) <= false_alarm`` and ``score > threshold`` are the same. Infinite when
        there are too few held-out images for so low a level.
        """
        return highest_allowed(self.scores, false_alarm)

    def pixel_threshold(self, false_alarm: float = FALSE_ALARM) -> float:
        """Return the strength above which a pixel is called OOD.

        At most a share ``false_alarm`` of ID images have any such pixel.
        """
        return highest_allowed(self.peaks, false_alarm)

    def save(self, path: Path) -> None:
        """Write it; wrap the call to make the file whole or absent."""
        save_file({"scores": self.scores, "peaks": self.peaks}, path)

    @staticmethod
    def load(path: Path) -> "Calibration":
        """Read what ``save`` wrote.

        Raises:
            DamagedCacheError: It is none.
        """
        try:
            content = load_file(path)
            return Calibration.fit(content["scores"], content["peaks"])
        except (SafetensorError, OSError, KeyError) as error:
            raise DamagedCacheError(
                f"{path} is no calibration ({error}). Evaluate again."
            ) from None


def highest_allowed(ascending: Float32, false_alarm: float) -> float:
    """Return the value that a share of at most ``false_alarm`` of exchangeable values exceeds."""
    # the tolerance: 0.29 * 100 is 28.999999999999996
    num_above = math.floor(false_alarm * (len(ascending) + 1) + 1e-9)
    return float(ascending[-num_above]) if num_above else math.inf
