"""Heatmap-based out-of-distribution detection for a fixed image classifier.

from ood_heatmap import HeatmapDetector

detector = HeatmapDetector.load("runs/cifar10")
result = detector(images)  # uint8 arrays or PIL images of any size
result.score, result.is_ood, result.p_value, result.heatmap, result.prediction
"""

from typing import TYPE_CHECKING

__version__ = "0.2.0"
__all__ = ["HeatmapDetector", "__version__"]

if TYPE_CHECKING:
    from ood_heatmap.detector import HeatmapDetector


def __getattr__(name: str) -> object:
    # PyTorch takes seconds to load; `ood-heatmap --help` must not wait for it
    if name == "HeatmapDetector":
        from ood_heatmap.detector import HeatmapDetector

        return HeatmapDetector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
