"""Export the detector to a single file that runs without ood_heatmap: ONNX or torch.export."""

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
from ood_heatmap.cache.files import write_bytes
from ood_heatmap.detector import HeatmapDetector, decode
from ood_heatmap.errors import OodHeatmapError

if TYPE_CHECKING:
    from onnx import ModelProto

_OUTPUTS = ("score", "heatmap", "prediction", "p_value")
# maximum difference from the detector, in scores and in heatmaps
_TOLERANCE = 1e-4
# protobuf limits a message, and so a single-file ONNX model, to 2 GB
_MAX_ONNX_BYTES = 2**31 - 2**20
_Arrays = dict[str, NDArray[Any]]
_Run = Callable[[NDArray[np.uint8]], _Arrays]


@dataclass(frozen=True)
class Differences:
    """Maximum absolute differences between an exported file and its detector."""

    score: float
    heatmap: float


class _ExportedDetector(nn.Module):
    """The detector as a module, from pixels to p-values in tensor operations.

    Args:
        detector: The detector; its networks are copied to the CPU.
    """

    held_out: Tensor | None

    def __init__(self, detector: HeatmapDetector) -> None:
        super().__init__()
        self.classifier = copy.deepcopy(detector.classifier)
        self.decoder = copy.deepcopy(detector.decoder)
        self.scorer = copy.deepcopy(detector.scorer)
        calibration = detector.calibration
        held_out = torch.from_numpy(calibration.scores) if calibration else None
        self.register_buffer("held_out", held_out)
        # torch.export.save warns about weights in other memory formats
        self.cpu().to(memory_format=torch.contiguous_format).eval().requires_grad_(False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Detect on uint8 ``(B, 3, H, W)`` at the classifier's input size.

        Returns:
            ``score`` (B,) float32; ``heatmap`` (B, C, H, W) float32; ``prediction`` (B,) int64;
            ``p_value`` (B,) float64, NaN without a calibration.
        """
        output = self.classifier(images)
        prediction = output.logits.argmax(dim=1)
        heatmap, scores = decode(self.decoder, self.scorer, output, prediction)
        results = (scores, heatmap, prediction, self.p_value(scores))
        return dict(zip(_OUTPUTS, results, strict=True))

    def p_value(self, scores: Tensor) -> Tensor:
        """Compute ``Calibration.p_value`` by comparison: ONNX has no binary search."""
        if self.held_out is None:
            return torch.full_like(scores, torch.nan, dtype=torch.float64)
        at_least = (self.held_out >= scores[:, None]).sum(dim=1).to(torch.float64)
        return (at_least + 1) / (len(self.held_out) + 1)


def export(detector: HeatmapDetector, out: Path, kind: str) -> Differences | None:
    """Export the detector to one file, after comparing the exported program to the detector.

    Args:
        detector: A trained detector.
        out: The file to write.
        kind: ``onnx`` or ``torch``.

    Returns:
        Differences from the detector on a few images; None if ONNX Runtime, needed to run an ONNX
        file, is not installed.

    Raises:
        OodHeatmapError: A package is missing, the classifier cannot be exported, the file would
            differ from the detector, or it cannot be written. No partial file is left.
    """
    # checked first: exporting a large classifier takes minutes
    if not out.parent.is_dir():
        raise OodHeatmapError(f"cannot write {out}: there is no folder {out.parent}.")
    metadata = _metadata(detector)
    if kind == "onnx":
        content = _to_onnx(detector, metadata)
        run = _load_onnx(content)
    else:
        content = _to_torch_program(detector, metadata)
        run = _load_torch_program(content)
    differences = None if run is None else _compare(detector, run, out)
    write_bytes(out, content)
    return differences


def _metadata(detector: HeatmapDetector) -> dict[str, str]:
    """Return the metadata of the file as strings; numbers and lists are JSON."""
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
        # JSON has no infinity: null without decisions
        "threshold": detector.threshold if detector.decides else None,
        "pixel_threshold": detector.pixel_threshold if detector.decides else None,
        "fingerprint": detector.fingerprint,
        "version": __version__,
    }
    return {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for key, value in content.items()
    }


def _sample_images(detector: HeatmapDetector, count: int, seed: int = 0) -> NDArray[np.uint8]:
    """Return random images at the input size, alternating constant ones and noise."""
    size = detector.classifier.config.transform.size
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (count, 3, size, size)).astype(np.uint8)
    images[::2] = images[::2, :, :1, :1]
    return images


def _trace(detector: HeatmapDetector) -> torch.export.ExportedProgram:
    """Trace the detector to a graph with a dynamic batch size.

    Raises:
        OodHeatmapError: The classifier's code cannot be traced.
    """
    images = torch.from_numpy(_sample_images(detector, 2))
    try:
        with torch.no_grad():
            program = torch.export.export(
                _ExportedDetector(detector),
                (images,),
                dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            )
    except Exception as error:
        # a user's own network can raise anything when traced
        raise _export_error(detector, error) from error
    for node in program.graph.nodes:
        # paths on this machine
        node.meta.pop("stack_trace", None)
    return program


def _export_error(detector: HeatmapDetector, error: Exception) -> OodHeatmapError:
    """Return the error for a classifier that cannot be exported."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return OodHeatmapError(
        f"the classifier {detector.classifier.config.spec} cannot be exported ({reason[:200]}). "
        "Its forward must not branch on pixel values or assume a batch size."
    )


def _to_torch_program(detector: HeatmapDetector, metadata: dict[str, str]) -> bytes:
    """Serialize to a ``.pt2`` file; ``torch.export.load(file).module()`` runs it."""
    content = io.BytesIO()
    extra = {"metadata.json": json.dumps(metadata, indent=1)}
    torch.export.save(_trace(detector), content, extra_files=extra)
    return content.getvalue()


def _load_torch_program(content: bytes) -> _Run:
    """Load a torch.export program as a function."""
    module = torch.export.load(io.BytesIO(content)).module()

    def run(images: NDArray[np.uint8]) -> _Arrays:
        with torch.no_grad():
            outputs = module(torch.from_numpy(images))
        return {name: values.numpy() for name, values in outputs.items()}

    return run


def _to_onnx(detector: HeatmapDetector, metadata: dict[str, str]) -> bytes:
    """Serialize to an ONNX file.

    Raises:
        OodHeatmapError: A package is missing, or the networks cannot be converted or are too large.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401  (torch.onnx needs it)
    except ImportError as error:
        raise OodHeatmapError(
            f"{error.name} is not installed: pip install 'ood-heatmap[export]'."
        ) from None
    networks = (detector.classifier, detector.decoder, detector.scorer)
    num_bytes = sum(
        values.nbytes for network in networks for values in network.state_dict().values()
    )
    if num_bytes > _MAX_ONNX_BYTES:
        raise OodHeatmapError(
            f"the weights have {num_bytes / 1e9:.1f} GB, but a single ONNX file is limited to "
            f"{_MAX_ONNX_BYTES / 1e9:.1f} GB. Use --format torch."
        )
    program = _trace(detector)
    try:
        converted = torch.onnx.export(
            program,
            dynamo=True,
            input_names=["images"],
            output_names=list(_OUTPUTS),
            verbose=False,
        )
    except Exception as error:
        # the exporter raises many types if ONNX lacks an operation
        raise _export_error(detector, error) from error
    assert converted is not None
    model = converted.model_proto
    _remove_traces(model)
    onnx.helper.set_model_props(model, metadata)
    content: bytes = model.SerializeToString()
    return content


def _remove_traces(model: "ModelProto") -> None:
    """Remove the exporter's node metadata, which contains local file paths.

    Also names the batch dimension ``batch``.
    """
    graph = model.graph
    for node in [*graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer]:
        del node.metadata_props[:]
    # intermediate shapes use the exporter's own name of the batch dimension
    del graph.value_info[:]
    for value in [*graph.input, *graph.output]:
        value.type.tensor_type.shape.dim[0].dim_param = "batch"


def _load_onnx(content: bytes) -> _Run | None:
    """Load an ONNX model as a function; None without ONNX Runtime."""
    try:
        import onnxruntime
    except ImportError:
        return None
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def run(images: NDArray[np.uint8]) -> _Arrays:
        outputs = session.run(list(_OUTPUTS), {"images": images})
        return dict(zip(_OUTPUTS, outputs, strict=True))

    return run


def _compare(detector: HeatmapDetector, run: _Run, out: Path) -> Differences:
    """Compare an exported program with its detector on a few random images.

    Raises:
        OodHeatmapError: Scores or heatmaps differ by more than 1e-4, predictions differ, or the
            p-values do not match the scores.
    """
    batches = [_sample_images(detector, count, seed=count) for count in (1, 15)]
    pairs = [(detector.detect(images)[0], run(images)) for images in batches]
    scores = [np.abs(outputs["score"] - result.score).max() for result, outputs in pairs]
    pixels = np.concatenate(
        [np.abs(outputs["heatmap"] - result.heatmap) for result, outputs in pairs]
    )
    # A feature map value halfway between two float16 numbers may be rounded either way, depending
    # on the last bit of a convolution. That changes single pixels by more than the tolerance
    # (2.6e-4 in 256 images of 32 px, 2e-5 at the 99.9th percentile).
    largest = np.quantile(pixels, 0.999 if detector.decoder.config.map_shapes else 1)
    same = all(
        np.array_equal(outputs["prediction"], result.prediction)
        # compared for the program's own scores: rounding may move a score past a held-out one
        and np.allclose(outputs["p_value"], detector.p_value(outputs["score"]), 0, 1e-12, True)
        for result, outputs in pairs
    )
    differences = Differences(float(max(scores)), float(pixels.max()))
    # negated, so that NaN fails too
    if not (same and max(*scores, largest) <= _TOLERANCE):
        raise OodHeatmapError(
            f"{out} was not written: it would differ from the detector "
            f"(scores by up to {differences.score:.1e}, heatmaps by {differences.heatmap:.1e}, "
            f"predictions and p-values are {'equal' if same else 'not equal'}). "
            "Try the other --format."
        )
    return differences
