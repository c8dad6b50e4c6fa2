"""The detector as one file that needs no ood_heatmap to run: ONNX, or a program of torch.export."""

import copy
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ood_heatmap import __version__
from ood_heatmap.cache.files import replacing
from ood_heatmap.detector import HeatmapDetector, decode_heatmap
from ood_heatmap.errors import OodHeatmapError
from ood_heatmap.heatmap import score

if TYPE_CHECKING:
    from onnx import ModelProto

OUTPUTS = ("score", "heatmap", "prediction", "p_value")
TOLERANCE = 1e-4
Arrays = dict[str, NDArray[Any]]
Run = Callable[[NDArray[np.uint8]], Arrays]


@dataclass(frozen=True)
class Differences:
    """The largest between a file and its detector, in scores and in pixels of heatmaps."""

    score: float
    heatmap: float


class Exported(nn.Module):
    """The whole way from pixels to p-values, in tensors alone.

    Args:
        detector: On the CPU; its networks are copied.
    """

    held_out: Tensor | None

    def __init__(self, detector: HeatmapDetector) -> None:
        super().__init__()
        self.classifier = copy.deepcopy(detector.classifier)
        self.decoder = copy.deepcopy(detector.decoder)
        known = detector.calibration
        self.register_buffer("held_out", torch.from_numpy(known.scores) if known else None)
        # torch.export.save warns of weights in any other order
        self.to(memory_format=torch.contiguous_format).eval().requires_grad_(False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Detect on uint8 ``(B, 3, H, W)`` of the classifier's input size.

        Returns:
            ``score`` (B,) float32; ``heatmap`` (B, C, H, W) float32; ``prediction`` (B,) int64;
            ``p_value`` (B,) float64, NaN when not calibrated.
        """
        output = self.classifier(images)
        prediction = output.logits.argmax(dim=1)
        heatmap = decode_heatmap(self.decoder, output, prediction)
        scores = score(heatmap)
        results = (scores, heatmap, prediction, self.p_value(scores))
        return dict(zip(OUTPUTS, results, strict=True))

    def p_value(self, scores: Tensor) -> Tensor:
        """Return what ``Calibration.p_value`` does; ONNX has no binary search, so it compares."""
        if self.held_out is None:
            return torch.full_like(scores, torch.nan, dtype=torch.float64)
        at_least = (self.held_out >= scores[:, None]).sum(dim=1).to(torch.float64)
        return (at_least + 1) / (len(self.held_out) + 1)


def export(detector: HeatmapDetector, out: Path, kind: str) -> Differences | None:
    """Write the detector as one file, and compare it with the detector before it is put in place.

    Args:
        detector: On the CPU.
        out: The file.
        kind: ``onnx`` or ``torch``.

    Returns:
        How far the file is from the detector on a few images; None when ONNX Runtime, which would
        run the file, is not installed.

    Raises:
        OodHeatmapError: A package is missing, the classifier cannot be exported, or the file says
            something else than the detector. Nothing is left behind.
    """
    write = write_onnx if kind == "onnx" else write_torch
    about = metadata(detector)
    with replacing(out) as scratch:
        write(detector, scratch, about)
        run = open_onnx(scratch) if kind == "onnx" else open_torch(scratch)
        return None if run is None else compare(detector, run, out)


def metadata(detector: HeatmapDetector) -> dict[str, str]:
    """Return what a user of the file has to know, as text; numbers and lists are JSON."""
    content = {
        "class_names": list(detector.classes),
        "input_size": detector.classifier.config.transform.size,
        "resize": detector.classifier.config.transform.resize,
        "interpolation": detector.classifier.config.transform.interpolation,
        "crop_mode": detector.classifier.config.transform.crop_mode,
        "fill": detector.classifier.config.transform.fill,
        "target": detector.decoder.config.target,
        "color_max": detector.color_max,
        "false_alarm": detector.false_alarm,
        # JSON has no infinity; null where there are no decisions
        "threshold": detector.threshold if detector.decides else None,
        "pixel_threshold": detector.pixel_threshold if detector.decides else None,
        "fingerprint": detector.fingerprint,
        "version": __version__,
    }
    return {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for key, value in content.items()
    }


def sample(detector: HeatmapDetector, count: int, seed: int = 0) -> NDArray[np.uint8]:
    """Return random images: noise and flat ones by turns."""
    size = detector.classifier.config.transform.size
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (count, 3, size, size)).astype(np.uint8)
    images[::2] = images[::2, :, :1, :1]
    return images


def traced(detector: HeatmapDetector) -> torch.export.ExportedProgram:
    """Return the detector as a graph that takes any number of images.

    Raises:
        OodHeatmapError: The classifier's code does what a graph cannot.
    """
    module = Exported(detector)
    images = torch.from_numpy(sample(detector, 2))
    try:
        with torch.no_grad():
            return torch.export.export(
                module, (images,), dynamic_shapes={"images": {0: torch.export.Dim("batch")}}
            )
    except Exception as error:  # whatever a user's own network provokes in the tracer
        raise not_exported(detector, error) from error


def not_exported(detector: HeatmapDetector, error: Exception) -> OodHeatmapError:
    """Return the one line for a classifier that cannot be exported."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return OodHeatmapError(
        f"the classifier {detector.classifier.config.spec} cannot be exported ({reason[:200]}). "
        "Its forward must not branch on pixels or fix the number of images."
    )


def write_torch(detector: HeatmapDetector, path: Path, about: dict[str, str]) -> None:
    """Write a program of torch.export; ``torch.export.load(file).module()`` runs it."""
    content = io.BytesIO()  # a path would have to end in .pt2
    torch.export.save(
        traced(detector), content, extra_files={"metadata.json": json.dumps(about, indent=1)}
    )
    path.write_bytes(content.getbuffer())


def open_torch(path: Path) -> Run:
    """Return a program of torch.export as a function."""
    module = torch.export.load(io.BytesIO(path.read_bytes())).module()

    def run(images: NDArray[np.uint8]) -> Arrays:
        with torch.no_grad():
            return {key: item.numpy() for key, item in module(torch.from_numpy(images)).items()}

    return run


def write_onnx(detector: HeatmapDetector, path: Path, about: dict[str, str]) -> None:
    """Write an ONNX model with its metadata."""
    try:
        import onnx
        import onnxscript  # noqa: F401  (torch.onnx needs it)
    except ImportError as error:
        raise OodHeatmapError(
            f"{error.name} is not installed: pip install 'ood-heatmap[export]'."
        ) from None
    program = traced(detector)
    try:
        converted = torch.onnx.export(
            program,
            dynamo=True,
            input_names=["images"],
            output_names=list(OUTPUTS),
            verbose=False,
        )
    except Exception as error:  # of many kinds, when ONNX lacks one of the network's operations
        raise not_exported(detector, error) from error
    assert converted is not None
    model = converted.model_proto
    tidy(model)
    onnx.helper.set_model_props(model, about)
    path.write_bytes(model.SerializeToString())


def tidy(model: "ModelProto") -> None:
    """Call the number of images ``batch``; drop the exporter's notes on every node.

    Those tell the paths of the files on the machine that exported.
    """
    graph = model.graph
    for node in [*graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer]:
        del node.metadata_props[:]
    del graph.value_info[:]  # shapes in between, under the exporter's own name of the batch
    for value in [*graph.input, *graph.output]:
        value.type.tensor_type.shape.dim[0].dim_param = "batch"


def open_onnx(path: Path) -> Run | None:
    """Return an ONNX model as a function; None without ONNX Runtime."""
    try:
        import onnxruntime
    except ImportError:
        return None
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])

    def run(images: NDArray[np.uint8]) -> Arrays:
        return dict(zip(OUTPUTS, session.run(list(OUTPUTS), {"images": images}), strict=True))

    return run


def compare(detector: HeatmapDetector, run: Run, out: Path) -> Differences:
    """Return how far a file is from its detector on a few random images.

    Raises:
        OodHeatmapError: Scores or heatmaps differ by more than 1e-4, the predictions differ, or the
            p-values are not those of the scores.
    """
    pairs = [
        (detector.detect(images)[0], run(images))
        for images in (sample(detector, count, seed=count) for count in (1, 15))
    ]
    scores = [np.abs(found["score"] - wanted.score).max() for wanted, found in pairs]
    pixels = np.concatenate([np.abs(found["heatmap"] - wanted.heatmap) for wanted, found in pairs])
    # A feature map's value that lies between two float16 numbers may be rounded either way, as the
    # last digit of a convolution falls; that moves single pixels by more (2.6e-4 in 256 images of
    # 32 px, 2e-5 at the 99.9th percentile).
    most = np.quantile(pixels, 0.999 if detector.decoder.config.map_shapes else 1)
    same = all(
        np.array_equal(found["prediction"], wanted.prediction)
        # of its own scores: a score's last digit may lie on the other side of a held-out one
        and np.allclose(found["p_value"], detector.p_value(found["score"]), 0, 1e-12, True)
        for wanted, found in pairs
    )
    differences = Differences(float(max(scores)), float(pixels.max()))
    if not (same and max(*scores, most) <= TOLERANCE):  # so that NaN is refused too
        raise OodHeatmapError(
            f"{out} would say something else than the detector (scores differ by up to "
            f"{differences.score:.1e}, heatmaps {differences.heatmap:.1e}; predictions, p-values "
            f"are {'the same' if same else 'others'}): not written. Try the other --format."
        )
    return differences
