"""A detector as one file: safetensors with JSON metadata, no pickle, and no code that runs unasked.

A bundle has weights, decoder, calibration and what the combined score needs, with the ID features
in float16; it has no image. It comes from anywhere: everything in it is checked before it is used,
and the text of a model file in it runs only if the user trusts it.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ood_heatmap import __version__
from ood_heatmap.calibration import Calibration
from ood_heatmap.checks import library_versions
from ood_heatmap.classifier import Classifier, ClassifierConfig, rebuild_classifier
from ood_heatmap.combined import BANK, CombinedParts, CombinedScorer
from ood_heatmap.decoder import Decoder, DecoderConfig, make_decoder
from ood_heatmap.detector import HeatmapDetector
from ood_heatmap.errors import DamagedCacheError, OodHeatmapError, StaleCacheError
from ood_heatmap.networks import parse_user_code
from ood_heatmap.probing import FeatureMap
from ood_heatmap.projection import Projection
from ood_heatmap.scorer import Scorer
from ood_heatmap.user_code import UserCode

_FORMAT, _KEY = 1, "ood_heatmap"
_DTYPES = (
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.uint8, torch.bool),
)
# sides of images that a file may ask for, in pixels
_MAX_SIZE = 4096
# relative difference of scores that is due to other hardware
_TOLERANCE = 1e-2


def to_bundle(detector: HeatmapDetector) -> bytes:
    """Return the bytes of a bundle.

    Raises:
        OodHeatmapError: The score of the detector is of a kind that cannot be saved.
    """
    classifier, decoder, calibration = detector.classifier, detector.decoder, detector.calibration
    scorer_tensors, scorer = _describe_scorer(detector.scorer)
    # where the model file lies is nobody's business
    code = classifier.code.keep().without_folder() if classifier.code else None
    config = replace(classifier.config, spec=str(code) if code else classifier.config.spec)
    tensors = {
        **_prefixed("classifier", classifier.network.state_dict()),
        **_prefixed("decoder", decoder.state_dict()),
        **_prefixed("scorer", scorer_tensors),
    }
    for name, projection in classifier.projections().items():
        tensors |= _prefixed(f"projection.{name}", vars(projection))
    if calibration is not None:
        tensors["calibration.scores"] = torch.from_numpy(calibration.scores)
        tensors["calibration.peaks"] = torch.from_numpy(calibration.max_pixel_scores)
    about = {
        "format": _FORMAT,
        "version": __version__,
        "libraries": library_versions(),
        "classifier": config.to_json(),
        "classifier_fingerprint": classifier.fingerprint(),
        "maps": list(classifier.map_names),
        "code": {name: text.decode() for name, text in (code.kept_files() if code else {}).items()},
        "decoder": asdict(decoder.config),
        "scorer": scorer,
        "classes": list(detector.classes),
        "color_max": detector.color_max,
        "false_alarm": detector.false_alarm,
        "fingerprint": detector.fingerprint,
        "probe": _probe(detector),
    }
    # a tensor that shares memory with another cannot be saved
    stored = {name: item.detach().cpu().contiguous().clone() for name, item in tensors.items()}
    about["sha256"] = _hash(stored, about)
    return save(stored, {_KEY: json.dumps(about)})


def read_bundle(path: Path) -> HeatmapDetector:
    """Read a bundle; return its detector, on the CPU.

    Raises:
        OodHeatmapError: The file is not a bundle, of another format or damaged, or has code that
            the user does not trust.
        StaleCacheError: The classifier cannot be restored as it was.
    """
    try:
        content = path.read_bytes()
        tensors = load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        about = json.loads(header["__metadata__"][_KEY])
    except OSError as error:
        raise OodHeatmapError(f"{path} cannot be read ({error.strerror}).") from error
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = str(error).partition("\n")[0][:80]
        raise DamagedCacheError(
            f"{path} is not a bundle ({reason}): make one with `ood-heatmap bundle RUN`."
        ) from error
    if not isinstance(about, dict) or about.get("format") != _FORMAT:
        raise StaleCacheError(
            f"{path} is a bundle of another format, this version reads {_FORMAT}. "
            "Make it again with `ood-heatmap bundle RUN`."
        )
    if about.pop("sha256", None) != _hash(tensors, about):
        raise _damaged(path, "its checksum is another")
    try:
        return _build(tensors, about, path)
    except OodHeatmapError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        raise _damaged(path, str(e).partition("\n")[0][:120]) from e


def _damaged(path: Path, reason: str) -> DamagedCacheError:
    return DamagedCacheError(
        f"{path} is damaged ({reason}): copy it again, or make it with `ood-heatmap bundle RUN`."
    )


def _build(tensors: Mapping[str, Tensor], about: Mapping[str, Any], path: Path) -> HeatmapDetector:
    """Check the content of a bundle, and make its detector."""
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{name} is {tensor.dtype}")
    config = ClassifierConfig.from_json(about["classifier"])
    if not 1 <= config.transform.size <= _MAX_SIZE or config.transform.resize > 4 * _MAX_SIZE:
        raise ValueError(f"images of {config.transform.size} pixels")
    decoder = _build_decoder(_under("decoder", tensors), about["decoder"], config)
    classifier = _build_classifier(tensors, about, config, path)
    detector = HeatmapDetector(
        classifier,
        decoder,
        scorer=_build_scorer(_under("scorer", tensors), about["scorer"]),
        classes=tuple(map(str, about["classes"])),
        color_max=float(about["color_max"]),
        fingerprint=str(about["fingerprint"]),
    )
    if len(detector.classes) not in (0, classifier.num_classes):
        raise ValueError(f"{len(detector.classes)} class names")
    found, wanted = _probe(detector), [float(value) for value in about["probe"]]
    if not np.allclose(found, wanted, rtol=_TOLERANCE, atol=_TOLERANCE):
        raise StaleCacheError(
            f"the bundle's detector has other scores here ({found[0]:.4g}, was {wanted[0]:.4g}): "
            f"it was made with {about['libraries']}. Install these versions."
        )
    columns = _under("calibration", tensors)
    if columns:
        scores, peaks = (columns[name].numpy() for name in ("scores", "peaks"))
        if scores.ndim != 1 or scores.shape != peaks.shape or scores.dtype != np.float32:
            raise ValueError("the calibration")
        return detector.calibrated(Calibration.fit(scores, peaks), float(about["false_alarm"]))
    return detector


def _build_decoder(
    state: Mapping[str, Tensor], content: Mapping[str, Any], config: ClassifierConfig
) -> Decoder:
    """Make the decoder; its layers are as large as their weights in the file."""
    decoder_config = DecoderConfig.from_json(content)
    if decoder_config.size > config.transform.size:
        raise ValueError(f"a decoder of {decoder_config.size} pixels")
    with torch.device("meta"):
        described = make_decoder(decoder_config).state_dict()
    if _shapes(described) != _shapes(state):
        raise ValueError("the decoder does not fit its description")
    decoder = make_decoder(decoder_config)
    decoder.load_state_dict(dict(state))
    return decoder.eval().to(memory_format=torch.channels_last)


def _build_classifier(
    tensors: Mapping[str, Tensor], about: Mapping[str, Any], config: ClassifierConfig, path: Path
) -> Classifier:
    """Make the classifier; code in the bundle runs only if it is trusted."""
    fingerprint, state = about["classifier_fingerprint"], _under("classifier", tensors)
    head = state.get(f"{fingerprint['head']}.weight")
    if head is not None and config.num_classes not in (None, len(head)):
        raise ValueError(f"a classifier of {config.num_classes} classes")
    code: UserCode | None = parse_user_code(config.spec)
    if code is not None:
        files = {str(name): str(text).encode() for name, text in about["code"].items()}
        code = code.from_kept_files(files, path)
    maps = [FeatureMap.parse(str(text)) for text in about["maps"]]
    projections = {}
    for name in about["maps"]:
        fields = _under(f"projection.{name}", tensors)
        if fields:
            projections[name] = Projection(fields["weight"], fields["mean"])
    return rebuild_classifier(config, state, maps, projections, code, fingerprint=fingerprint)


def _describe_scorer(scorer: Scorer) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
    """Return tensors and description of a scorer."""
    if isinstance(scorer, CombinedScorer):
        tensors, metadata = scorer.parts.to_tensors()
        tensors[BANK] = scorer.knn_distance.bank.half()
        return tensors, {"kind": scorer.kind, "parts": metadata}
    if scorer.state_dict():
        raise OodHeatmapError(f"a detector with a {scorer.kind} score cannot be bundled.")
    return {}, {"kind": scorer.kind}


def _build_scorer(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> Scorer | None:
    """Make the scorer that ``_describe_scorer`` described."""
    if about["kind"] != CombinedScorer.kind:
        return None
    return CombinedScorer(CombinedParts.from_tensors(tensors, about["parts"]), tensors[BANK])


def _probe(detector: HeatmapDetector) -> list[float]:
    """Return scores of two images that are made by a formula, for comparison."""
    size = detector.transform.size
    channel, y, x = np.indices((3, size, size))
    smooth = 127.5 + 127.5 * np.sin((x + 2 * y) * 6 / size + channel)
    images = np.stack([smooth, (37 * x + 101 * y + 53 * channel) % 256]).astype(np.uint8)
    score = detector.detect(images)[0].score
    return [float(value) for value in score]


def _hash(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> str:
    """Return the sha256 of all tensors and of the description."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, item in sorted(tensors.items()):
        digest.update(f"{name}\0{tuple(item.shape)}\0{item.dtype}\n".encode())
        digest.update(item.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": item for name, item in tensors.items()}


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(item.shape) for name, item in tensors.items()}


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names begin with a prefix, without it."""
    start = f"{prefix}."
    return {
        name.removeprefix(start): item for name, item in tensors.items() if name.startswith(start)
    }
