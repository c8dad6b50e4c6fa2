"""Heatmap-based out-of-distribution detection for a fixed image classifier.

from ood_heatmap import HeatmapDetector

detector = HeatmapDetector.load("runs/cifar10")
result = detector(images)  # PIL images, paths, uint8 arrays or tensors of any size
result.score, result.is_ood, result.p_value, result.heatmap, result.prediction

The four stages that make a run are ``build_index``, ``build_targets``, ``train`` and ``evaluate``.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.2.0"

if TYPE_CHECKING:
    from ood_heatmap.detector import HeatmapDetector
    from ood_heatmap.images import Transform
    from ood_heatmap.nearest import Nearest
    from ood_heatmap.pipeline.config import EvaluateConfig, IndexConfig, TargetsConfig, TrainConfig
    from ood_heatmap.pipeline.stages import build_index, build_targets, evaluate, train
    from ood_heatmap.result import Detection, Result, TensorResult

__all__ = [
    "Detection",
    "EvaluateConfig",
    "HeatmapDetector",
    "IndexConfig",
    "Nearest",
    "Result",
    "TargetsConfig",
    "TensorResult",
    "TrainConfig",
    "Transform",
    "__version__",
    "build_index",
    "build_targets",
    "evaluate",
    "train",
]
_MODULES = {
    "detector": ("HeatmapDetector",),
    "images": ("Transform",),
    "nearest": ("Nearest",),
    "pipeline.config": ("EvaluateConfig", "IndexConfig", "TargetsConfig", "TrainConfig"),
    "pipeline.stages": ("build_index", "build_targets", "evaluate", "train"),
    "result": ("Detection", "Result", "TensorResult"),
}


def __getattr__(name: str) -> object:
    # PyTorch takes seconds to load; `ood-heatmap --help` must not wait for it
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"ood_heatmap.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
