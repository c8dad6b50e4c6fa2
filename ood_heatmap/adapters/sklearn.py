"""The detector as an outlier detector of scikit-learn."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, OutlierMixin
from sklearn.utils.validation import check_is_fitted

from ood_heatmap.calibration import Calibration, num_needed
from ood_heatmap.detector import HeatmapDetector, ImageLike
from ood_heatmap.errors import UsageError


class HeatmapOutlierDetector(OutlierMixin, BaseEstimator):  # type: ignore[misc]
    """Scores and decisions of a trained detector, with scikit-learn's signs.

    Larger scores are more normal, and decisions are +1 (ID) and -1 (OOD), as with
    ``IsolationForest``. Images are whatever the detector takes: a list of paths or PIL images, or a
    uint8 array ``(B, H, W, 3)``.

    Args:
        run: A run directory.
        false_alarm: Share of ID images that may be called OOD; that of the run if None.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        batch_size: Images at once.

    Attributes:
        detector_: The loaded detector, calibrated.
        offset_: Score below which an image is called OOD.
    """

    def __init__(
        self,
        run: str | Path = "run",
        *,
        false_alarm: float | None = None,
        device: str = "auto",
        batch_size: int = 64,
    ) -> None:
        # scikit-learn: validation is in fit, so that clone and set_params need none
        self.run = run
        self.false_alarm = false_alarm
        self.device = device
        self.batch_size = batch_size

    def fit(
        self, X: Iterable[ImageLike] | None = None, y: object = None
    ) -> "HeatmapOutlierDetector":
        """Load the run, and set the threshold; nothing is trained.

        Args:
            X: Held-out ID images that set the threshold, none of which the classifier or the
                decoder was trained on. None for the threshold of the run's evaluation.
            y: Ignored.

        Raises:
            OodHeatmapError: The run cannot be loaded.
            UsageError: There are too few images for the false-alarm level, or there is no ``X`` and
                the run has not been evaluated.
        """
        # loaded without the level, which needs a calibration
        detector = HeatmapDetector.load(self.run, self.device)
        level = detector.false_alarm if self.false_alarm is None else self.false_alarm
        calibration = detector.calibration
        if X is not None:
            calibration = Calibration.fit(*self._score(detector, X))
        self.detector_ = detector.calibrated(calibration, level)
        if not self.detector_.decides:
            raise UsageError(
                f"there is no threshold: a false-alarm level of {level:g} needs "
                f"{num_needed(level)} held-out ID images. Evaluate the run on more, fit on more, "
                "or choose a higher level."
            )
        self.offset_ = -self.detector_.threshold
        return self

    def score_samples(self, X: Iterable[ImageLike]) -> NDArray[np.float64]:
        """Return ``(B,)`` the negative OOD score of each image; larger is more normal."""
        check_is_fitted(self)
        return -self._score(self.detector_, X)[0].astype(np.float64)

    def decision_function(self, X: Iterable[ImageLike]) -> NDArray[np.float64]:
        """Return ``(B,)`` score minus ``offset_``; negative for images called OOD."""
        return self.score_samples(X) - self.offset_

    def predict(self, X: Iterable[ImageLike]) -> NDArray[np.int64]:
        """Return ``(B,)`` +1 for images called ID and -1 for those called OOD."""
        return np.where(self.decision_function(X) < 0, -1, 1)

    def _score(
        self, detector: HeatmapDetector, X: Iterable[ImageLike]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return OOD score and maximum pixel score of each image; heatmaps are not kept."""
        images = list(X)
        scores, peaks = [], []
        # at least one batch: the detector says what is wrong with no image
        for start in range(0, max(1, len(images)), self.batch_size):
            result = detector(images[start : start + self.batch_size])
            scores.append(result.score)
            peaks.append(result.pixel_score.max(axis=(1, 2)))
        return np.concatenate(scores), np.concatenate(peaks)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        tags.input_tags.string = True
        return tags
