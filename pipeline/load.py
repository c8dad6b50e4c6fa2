"""Loads the detector of a run or bundle."""

import json
import logging
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from ood_heatmap.bundle import read_bundle
from ood_heatmap.cache.manifest import MANIFEST, Manifest
from ood_heatmap.calibration import Calibration
from ood_heatmap.classifier import Classifier
from ood_heatmap.combined import BANK, CombinedParts, CombinedScorer
from ood_heatmap.detector import HeatmapDetector
from ood_heatmap.devices import choose_device
from ood_heatmap.errors import DamagedCacheError, OodHeatmapError, StaleCacheError
from ood_heatmap.pipeline.nearest import NearestImages
from ood_heatmap.pipeline.results import EvaluationResults
from ood_heatmap.pipeline.run import (
    CALIBRATION,
    COMBINATION,
    Index,
    TrainedDecoder,
    format_command,
    open_decoder,
    open_for_classifier,
    read_file,
    read_manifest,
    require_from,
)

log = logging.getLogger(__name__)


def load_detector(
    run: Path, device: str = "auto", false_alarm: float | None = None
) -> HeatmapDetector:
    """Load the detector of a run or bundle: see ``HeatmapDetector.load``."""
    if run.is_file():
        return _load_bundle(run, device, false_alarm)
    index = open_for_classifier(run)
    torch_device = choose_device(device)
    trained = open_decoder(run, index.manifest, torch_device)
    calibration = _open_calibration(run, trained.manifest)
    scorer = _open_combination(run) if calibration is not None else None
    detector = make_detector(index, trained, torch_device, scorer)
    if calibration is not None:
        fitted, level = calibration
        return detector.calibrated(fitted, level if false_alarm is None else false_alarm)
    if false_alarm is not None:
        raise OodHeatmapError(
            f"{run} is not calibrated, so a false-alarm level cannot be applied: "
            f"run `ood-heatmap evaluate {run} ...` first."
        )
    return detector


def _load_bundle(path: Path, device: str, false_alarm: float | None) -> HeatmapDetector:
    """Load the detector of a bundle."""
    torch_device = choose_device(device)
    detector = read_bundle(path)
    if detector.calibration is not None and false_alarm is not None:
        detector = detector.at(false_alarm)
    elif false_alarm is not None:
        raise OodHeatmapError(
            f"{path} is not calibrated, so a false-alarm level cannot be applied: make it of a run "
            "that has been evaluated."
        )
    return detector.to(torch_device)


def make_detector(
    index: Index,
    trained: TrainedDecoder,
    device: torch.device,
    scorer: CombinedScorer | None = None,
    classifier: Classifier | None = None,
) -> HeatmapDetector:
    """Make the uncalibrated detector of an opened index and decoder.

    Args:
        index: The index.
        trained: The decoder.
        device: Device of both.
        scorer: The combined score; None for the score of the decoder.
        classifier: The classifier on this device; restored with the feature maps in use if None.
    """
    num_maps = len(trained.decoder.config.map_shapes)
    if scorer is not None:
        num_maps = max(num_maps, *(number + 1 for number in (-1, *scorer.layers)))
        scorer.to(device)
    return HeatmapDetector(
        classifier or index.classifier(device, num_maps=num_maps),
        trained.decoder,
        scorer=scorer,
        classes=index.results.classes,
        color_max=trained.results.color_max,
        fingerprint=trained.manifest.fingerprint,
        id_images=NearestImages(index.run, index.manifest.fingerprint),
    )


def _open_combination(run: Path) -> CombinedScorer | None:
    """Load the combined score of an evaluated run; None if an earlier version evaluated it.

    Raises:
        DamagedCacheError: The evaluation's manifest or the file is damaged.
    """
    manifest = read_manifest(run, "evaluation")
    if COMBINATION not in manifest.files:
        return None
    return _parse_combination(
        read_file(run, manifest, COMBINATION), run / "evaluation" / COMBINATION
    )


def read_combination(path: Path) -> CombinedScorer:
    """Read the combined score that an unfinished evaluation has written."""
    return _parse_combination(path.read_bytes(), path)


def _parse_combination(content: bytes, path: Path) -> CombinedScorer:
    """Parse the file of the combined score.

    Raises:
        DamagedCacheError: The file is damaged, or an earlier version wrote it.
    """
    try:
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        tensors = load(content)
        parts = CombinedParts.from_tensors(tensors, header["__metadata__"])
        return CombinedScorer(parts, tensors[BANK])
    except (SafetensorError, ValueError, KeyError, TypeError, IndexError) as error:
        command = format_command(path.parent.parent, "evaluation")
        raise DamagedCacheError(
            f"{path} is damaged, or an earlier version wrote it ({error}). Remove {path.parent} "
            f"and run `{command}` again."
        ) from error


def _open_calibration(run: Path, decoder: Manifest) -> tuple[Calibration, float] | None:
    """Load the calibration of a run and its false-alarm level.

    Args:
        run: The run directory.
        decoder: Manifest of the decoder in use. It is not read again: another process may be
            training and evaluating in the run, and its calibration would belong to its decoder.

    Returns:
        None if this decoder has not been evaluated, or was evaluated without held-out images.

    Raises:
        DamagedCacheError: The evaluation's manifest or the calibration is damaged.
    """
    if not (run / "evaluation" / MANIFEST).is_file():
        return None
    manifest = read_manifest(run, "evaluation")
    if CALIBRATION not in manifest.files:
        return None
    try:
        require_from(manifest, decoder, run)
    except StaleCacheError as error:
        log.warning("not calibrated: %s", error)
        return None
    path = run / "evaluation" / CALIBRATION
    calibration = Calibration.from_bytes(read_file(run, manifest, CALIBRATION), str(path))
    level = EvaluationResults.from_manifest(manifest).false_alarm
    return None if level is None else (calibration, level)
