"""Draw the report of a run from its finished stages; no image is read.

The page is not a file of the evaluation's manifest: with time, command lines and the result of
``localize`` it says more than the evaluation, and it can be drawn again at any time.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ood_heatmap.cache.files import replacing
from ood_heatmap.cache.manifest import MANIFEST, Manifest
from ood_heatmap.errors import OodHeatmapError
from ood_heatmap.pipeline.results import DecoderResults, IndexResults, Results, TargetsResults
from ood_heatmap.pipeline.run import read_file, read_manifest, read_result
from ood_heatmap.report import render_report

log = logging.getLogger(__name__)

REPORT = "report.html"
# what the page shows beside metrics.json, see ``report.report_content``
CONTENT = "report.json"
_STAGES = ("index", "targets", "decoder")


def draw_page(run: Path) -> None:
    """Draw the page of an evaluated run, unless an earlier version evaluated it.

    Raises:
        OodHeatmapError: A stage is damaged.
    """
    evaluation = read_manifest(run, "evaluation")
    if CONTENT not in evaluation.files:
        return
    earlier = {stage: read_manifest(run, stage) for stage in _STAGES}
    metrics = json.loads(read_file(run, evaluation, "metrics.json"))
    localization = _read_localization(run, evaluation)
    stages = [*earlier.values(), evaluation, *([localization] if localization else [])]
    page = render_report(
        json.loads(read_file(run, evaluation, CONTENT)),
        metrics,
        title=f"OOD detection: {run.resolve().name}",
        facts=[(name, text) for name, text in _iter_facts(run, earlier, evaluation, metrics)],
        commands=list(dict.fromkeys(filter(None, (_command(stage) for stage in stages)))),
        localization=read_result(run, "localization", "localization.json")
        if localization
        else None,
    )
    with replacing(run / "evaluation" / REPORT) as scratch:
        scratch.write_bytes(page.encode())


def redraw_page(run: Path) -> None:
    """Draw the page again after another command, if there is one; a failure is only logged."""
    try:
        evaluated = (run / "evaluation" / MANIFEST).is_file()
        if evaluated and _is_of_decoder(run, read_manifest(run, "evaluation")):
            draw_page(run)
    except OodHeatmapError as error:
        log.warning("the report was not drawn again: %s", error)


def collect_warnings(run: Path, own: list[str]) -> list[str]:
    """Return the deduplicated warnings of the stages before the evaluation, and its own."""
    results = [Results.from_manifest(read_manifest(run, stage)) for stage in _STAGES]
    return list(dict.fromkeys([*(text for item in results for text in item.warnings), *own]))


def _is_of_decoder(run: Path, manifest: Manifest) -> bool:
    """Return whether a stage was made with the decoder that the run has now."""
    return bool(manifest.inputs.get("decoder") == read_manifest(run, "decoder").fingerprint)


def _read_localization(run: Path, evaluation: Manifest) -> Manifest | None:
    """Return the manifest of the localization of the same decoder, if it was measured."""
    if not (run / "localization" / MANIFEST).is_file():
        return None
    manifest = read_manifest(run, "localization")
    return manifest if manifest.inputs["decoder"] == evaluation.inputs["decoder"] else None


def _command(stage: Manifest) -> str:
    """Return the command line of a stage; "" if it was called from Python."""
    command: str = stage.speed.get("command", "")
    return command


def _iter_facts(
    run: Path, earlier: Mapping[str, Manifest], evaluation: Manifest, metrics: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    """Yield names and values of what the report is about; manifests may lack newer fields."""
    index = IndexResults.from_manifest(earlier["index"])
    targets = TargetsResults.from_manifest(earlier["targets"])
    decoder = DecoderResults.from_manifest(earlier["decoder"])
    yield "Run", str(run)
    if "time" in evaluation.speed:
        yield "Evaluated", evaluation.speed["time"].replace("T", " ")
    spec, size = index.classifier["spec"], index.classifier["transform"]["size"]
    yield "Classifier", f"{spec}, {index.num_classes:,} classes, input {size} x {size} pixels"
    yield "Weights (sha256)", earlier["index"].inputs["classifier"]["weights"]
    accuracy = "" if index.accuracy is None else f", accuracy {100 * index.accuracy:.2f} %"
    yield "ID training set", f"{index.source}, {index.num_images:,} images{accuracy}"
    patched = f", {targets.num_patched:,} patched ID images" if targets.num_patched else ""
    yield "Auxiliary OOD set", f"{targets.source}, {targets.num_images:,} images{patched}"
    options = earlier["decoder"].inputs["options"]
    seeds = ", ".join(str(one["seed"]) for one in metrics["runs"])
    yield (
        "Decoder",
        f"{decoder.num_parameters:,} parameters, {options['epochs']} epochs, seed {seeds}",
    )
    for name, found in metrics["sets"].items():
        title = {"id": "ID test set", "calibration": "Held-out ID images"}.get(name, f"OOD: {name}")
        yield title, f"{found['source']}, {found['num_images']:,} images"
    if "version" in evaluation.speed:
        torch = index.versions.get("torch")
        yield "Version", f"ood-heatmap {evaluation.speed['version']}, PyTorch {torch}"
