"""Stage 4 of 4: evaluate the heatmap score and baselines of the same classifier.

Writes metrics, figures and a report, and the decision threshold, calibrated on held-out ID images.
"""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ood_heatmap.cache.files import to_json
from ood_heatmap.cache.manifest import Manifest, abbreviate, differing_fields, hash_json
from ood_heatmap.calibration import Calibration
from ood_heatmap.detector import HeatmapDetector
from ood_heatmap.devices import describe_environment, kernel_selection, one_blas_thread
from ood_heatmap.distributed import barrier, broadcast, is_main
from ood_heatmap.duplicates import AuditedSet, find_overlaps
from ood_heatmap.errors import OodHeatmapError, StaleCacheError, UsageError
from ood_heatmap.images import ImageSet
from ood_heatmap.pipeline.audit import audit_training_sets
from ood_heatmap.pipeline.config import EvaluateConfig, result_options
from ood_heatmap.pipeline.fitting import check_methods, num_neighbours
from ood_heatmap.pipeline.gallery import FIGURES, write_figures
from ood_heatmap.pipeline.load import make_detector, read_combination
from ood_heatmap.pipeline.page import CONTENT, draw_page
from ood_heatmap.pipeline.results import EvaluationResults
from ood_heatmap.pipeline.run import (
    CALIBRATION,
    COMBINATION,
    Index,
    Targets,
    check_files,
    open_decoder,
    open_index,
    open_targets,
    read_manifest,
)
from ood_heatmap.pipeline.schedule import source_hash
from ood_heatmap.pipeline.scoring import (
    COMBINED,
    HELD_OUT,
    ID,
    MIXTURES,
    SUM,
    DetectionMethods,
    ScoredSet,
    Subset,
    add_combined,
    current_content,
    fit_combination,
    make_detection_methods,
    open_detectors,
    save_scores,
    score_set,
    scores_name,
)
from ood_heatmap.pipeline.stage import Stage, run_lock
from ood_heatmap.pipeline.tables import decisions, metrics_json, metrics_table
from ood_heatmap.sanity import (
    Finding,
    check_calibration,
    check_class_names,
    check_classification,
    check_ood_names,
    check_resamples,
    check_scores,
    texts,
)

log = logging.getLogger(__name__)

# ID images per OOD image in the paper's protocol
_ID_TO_OOD = 5


@one_blas_thread()
def evaluate(
    run: Path,
    id_images: ImageSet,
    ood_sets: Mapping[str, ImageSet],
    device: torch.device,
    config: EvaluateConfig,
    *,
    calibration_images: ImageSet | None = None,
    more_runs: Sequence[Path] = (),
) -> Manifest:
    """Score the ID test set and each OOD set; write metrics, thresholds, figures and a report.

    Finished sets are kept, so an interrupted run resumes. Images are distributed over ranks; rank 0
    writes.

    Args:
        run: A run directory with a trained decoder.
        id_images: The ID test set.
        ood_sets: OOD test sets by name.
        device: Device to compute on.
        config: Settings of the stage.
        calibration_images: ID images only for the thresholds; a share of ``id_images`` if None.
        more_runs: Runs that differ from this one only in the seed of training.

    Returns:
        The manifest; its ``results`` are those of ``EvaluationResults``. The table is in
        ``metrics.json``.

    Raises:
        OodHeatmapError: A cache is stale or damaged, an image is unreadable, a set has an invalid
            name, or the runs are not comparable.
    """
    _check_names(ood_sets, config)
    with run_lock(run), kernel_selection(deterministic=config.deterministic):
        index = open_index(run)
        targets = open_targets(run, index)
        classes = index.results.classes
        decoders = _check_runs([run, *more_runs])
        subsets = _choose_images(id_images, ood_sets, calibration_images, classes, config)
        detectors = open_detectors([run, *more_runs], index, device)
        environment = describe_environment(device, deterministic=config.deterministic)
        stage = Stage(run, "evaluation", _inputs(decoders, subsets, config), environment)
        # decided by rank 0: all ranks must score the same sets
        complete, scored = broadcast(
            _resume_or_start(stage, subsets, config) if is_main() else (None, {})
        )
        if complete is not None:
            log.info("%s is already complete", stage.directory)
            if is_main():
                draw_page(run)
            return complete
        missing = [name for name in subsets if name not in scored]
        if missing:
            methods = make_detection_methods(index, targets, detectors, config)
            scored |= _score_missing(stage, subsets, scored, methods)
        scored = {name: scored[name] for name in subsets}
        if is_main():
            # its heatmaps have the level of the combined score
            path = stage.directory / COMBINATION
            scorer = read_combination(path) if HELD_OUT in scored else None
            decoder = open_decoder(run, index.manifest, device)
            detector = make_detector(index, decoder, device, scorer, detectors[0].classifier)
            _publish(stage, scored, subsets, decoders, detector, index, targets, config)
            draw_page(run)
        barrier()
        return read_manifest(run, "evaluation")


def _score_missing(
    stage: Stage,
    subsets: Mapping[str, Subset],
    scored: Mapping[str, ScoredSet],
    methods: DetectionMethods,
) -> dict[str, ScoredSet]:
    """Score the sets that are not scored yet.

    First the held-out images, on which the sums are standardised.
    """
    found: dict[str, ScoredSet] = {}
    decoder = methods.detectors[0].decoder
    held_out, combination = scored.get(HELD_OUT), None
    if HELD_OUT in subsets:
        subset = subsets[HELD_OUT]
        if held_out is None:
            held_out = score_set(stage, HELD_OUT, subset, methods, None)
        combination = fit_combination(stage, subset, held_out, methods)
        if HELD_OUT not in scored:
            combined = add_combined(held_out, combination, decoder)
            held_out = save_scores(stage, HELD_OUT, subset, combined)
            found[HELD_OUT] = held_out
    for name, subset in subsets.items():
        if name not in scored and name != HELD_OUT:
            item = score_set(stage, name, subset, methods, held_out)
            item = add_combined(item, combination, decoder)
            found[name] = save_scores(stage, name, subset, item)
    return found


def _publish(
    stage: Stage,
    scored: Mapping[str, ScoredSet],
    subsets: Mapping[str, Subset],
    decoders: Sequence[Manifest],
    detector: HeatmapDetector,
    index: Index,
    targets: Targets,
    config: EvaluateConfig,
) -> None:
    """Write the table, the thresholds, the figures and the report, then the manifest."""
    shown = {name: item for name, item in scored.items() if name != HELD_OUT}
    table = metrics_table({name: item.scores for name, item in shown.items()}, config)
    metrics = metrics_json(table, shown[ID], num_neighbours(index, config), config)
    metrics["runs"] = [_describe_decoder(decoder) for decoder in decoders]
    metrics["sets"] = {
        name: _write_names(stage, name, subset.images, scored[name])
        for name, subset in subsets.items()
    }
    calibration = _calibrate(stage, scored.get(HELD_OUT))
    if calibration is not None:
        metrics["decisions"] = decisions(shown, calibration, config.false_alarm)
    findings = _check(scored, subsets, index, targets, config)
    metrics["warnings"] = [finding.text for finding in findings]
    with stage.writing("metrics.json") as scratch:
        scratch.write_bytes(to_json(metrics))
    write_figures(stage, metrics, subsets, shown, detector, index, calibration, config)
    _finish(stage, scored, calibration, findings, config)


def _check(
    scored: Mapping[str, ScoredSet],
    subsets: Mapping[str, Subset],
    index: Index,
    targets: Targets,
    config: EvaluateConfig,
) -> list[Finding]:
    """Check the measured scores for signs of mistakes."""
    results, id_set = index.results, scored[ID]
    classes, id_images = results.classes, subsets[ID].images
    accuracy = results.accuracy
    before = "unknown" if accuracy is None else f"{accuracy:.2%}"
    findings = [
        *check_class_names(id_images.source, id_images.class_names, classes),
        *check_classification(
            id_set.label,
            id_set.prediction,
            classes,
            results.num_classes,
            causes=f"On the ID training set it is {before}: "
            f"is {id_images.source} the test set of this classifier?",
        ),
    ]
    for name, subset in subsets.items():
        if name not in (ID, HELD_OUT):
            findings += check_ood_names(subset.images.source, subset.images.class_names, classes)
    findings += check_scores({name: item.by_method for name, item in scored.items()})
    findings += check_resamples(config.resamples)
    findings += check_methods(index, targets, config)
    if HELD_OUT in scored:
        findings += check_calibration(len(scored[HELD_OUT]), config.false_alarm)
    return [*findings, *_find_overlaps(scored, subsets, index, targets)]


def _find_overlaps(
    scored: Mapping[str, ScoredSet],
    subsets: Mapping[str, Subset],
    index: Index,
    targets: Targets,
) -> list[Finding]:
    """Check that no image is in two sets that must not share one."""
    titles = {HELD_OUT: "the held-out ID images", ID: "the ID test set"}
    titles |= {name: f"the OOD test set {name}" for name in scored if name not in titles}
    sets = audit_training_sets(index, targets)
    for name, title in titles.items():
        if name in scored:
            sets.append(_to_audited(name, title, scored[name], subsets[name].images, index))
    return find_overlaps(sets)


def _to_audited(
    name: str, title: str, scored: ScoredSet, images: ImageSet, index: Index
) -> AuditedSet:
    """Prepare a scored set for the search of overlaps."""
    return AuditedSet(
        f"{title} ({images.source})",
        kind="ID" if name in (ID, HELD_OUT) else "OOD",
        fitted=name == HELD_OUT,
        name_of=lambda position: images.names[scored.row[position]],
        pixel_hash=scored.pixel_hash,
        nearest=index.positions(scored.nearest),
        difference=scored.difference,
    )


def _check_names(ood_sets: Mapping[str, ImageSet], config: EvaluateConfig) -> None:
    """Reject invalid and unknown set names.

    Raises:
        UsageError: There is no OOD set, a near set is not one of them, or a name is invalid.
    """
    if not ood_sets:
        raise UsageError("there is no OOD set to evaluate on: add --ood NAME=SOURCE.")
    unknown = [name for name in config.near if name not in ood_sets]
    if unknown:
        raise UsageError(f"--near {unknown[0]} is not one of the OOD sets ({', '.join(ood_sets)}).")
    bad = [
        name
        for name in ood_sets
        if name in (ID, HELD_OUT, MIXTURES) or not name.replace("-", "").replace("_", "").isalnum()
    ]
    if bad:
        raise UsageError(
            f"an OOD set cannot be named {bad[0]!r}: "
            f"use letters, digits, - and _, and neither {ID!r}, {HELD_OUT!r} nor {MIXTURES!r}."
        )


def _check_runs(runs: Sequence[Path]) -> list[Manifest]:
    """Return the manifests of the runs' decoders, after checking that only their seeds differ.

    Raises:
        OodHeatmapError: A run has another classifier, index or targets, other training options, or
            the same seed as another run; names what differs.
    """
    decoders = [read_manifest(run, "decoder") for run in runs]
    for number, other in enumerate(runs[1:], start=1):
        for stage in ("index", "targets", "decoder"):
            _check_same(read_manifest(runs[0], stage), read_manifest(other, stage), other)
        if decoders[number].fingerprint in [decoder.fingerprint for decoder in decoders[:number]]:
            raise UsageError(f"--runs {other} has the seed of another run: use another --seed.")
    return decoders


def _check_same(ours: Manifest, theirs: Manifest, other: Path) -> None:
    """Reject a stage of another run that was made from different inputs.

    Raises:
        OodHeatmapError: The inputs differ; names the fields.
    """
    differing = [
        f"{ours.stage} {name} ({abbreviate(there)}, here {abbreviate(here)})"
        for name, here, there in differing_fields(_made_from(ours), _made_from(theirs))
    ]
    if differing:
        raise OodHeatmapError(
            f"--runs {other} has a different {', '.join(differing[:3])}. "
            "Runs may differ only in the seed of training."
        )


def _made_from(manifest: Manifest) -> dict[str, Any]:
    """Return the inputs and content hash of a stage, without the seed of training."""
    inputs = {**manifest.inputs, "content": manifest.content}
    if manifest.stage == "decoder":
        options = manifest.inputs["options"]
        inputs["options"] = {name: value for name, value in options.items() if name != "seed"}
    return inputs


def _choose_images(
    id_images: ImageSet,
    ood_sets: Mapping[str, ImageSet],
    calibration_images: ImageSet | None,
    classes: Sequence[str],
    config: EvaluateConfig,
) -> dict[str, Subset]:
    """Choose the images of each set: ID, held-out ID, and OOD.

    Raises:
        UsageError: No ID image is left for the table.
    """
    held_out = Subset(id_images, np.arange(0), classes)
    if calibration_images is not None:
        held_out = Subset(calibration_images, np.arange(len(calibration_images)), classes)
    elif config.calibration_share:
        count = max(1, round(config.calibration_share * len(id_images)))
        held_out = Subset(id_images, _draw_rows(len(id_images), count, config.seed), classes)
    kept = np.arange(len(id_images))
    if held_out.images is id_images:
        kept = np.setdiff1d(kept, held_out.rows)
    if not len(kept):
        raise UsageError(
            f"{id_images.source} has no image left beside those held out for the thresholds: "
            "add images, or use --calibration or --calibration-share 0."
        )
    subsets = {ID: Subset(id_images, kept, classes)}
    if len(held_out.rows):
        subsets[HELD_OUT] = held_out
    for name, images in ood_sets.items():
        subsets[name] = Subset(images, _ood_rows(name, images, len(kept), config), classes)
    return subsets


def _ood_rows(
    name: str, images: ImageSet, num_id: int, config: EvaluateConfig
) -> NDArray[np.int64]:
    """Draw the rows of an OOD set for the protocol, ascending."""
    count = len(images)
    if config.protocol == "paper":
        count = max(1, num_id // _ID_TO_OOD)
    if count > len(images):
        log.warning(
            "%s has %d images, fewer than the %d of ID:OOD = %d:1: using all of them",
            *(name, len(images), count, _ID_TO_OOD),
        )
    return _draw_rows(len(images), min(count, len(images)), config.seed)


def _draw_rows(num_rows: int, count: int, seed: int) -> NDArray[np.int64]:
    """Draw ``count`` distinct rows, ascending."""
    return np.sort(np.random.default_rng(seed).choice(num_rows, count, replace=False))


def _inputs(
    decoders: Sequence[Manifest], subsets: Mapping[str, Subset], config: EvaluateConfig
) -> dict[str, Any]:
    """Return everything the result depends on."""
    return {
        "decoder": decoders[0].fingerprint,
        "runs": [decoder.fingerprint for decoder in decoders[1:]],
        "images": {name: subset.images.describe() for name, subset in subsets.items()},
        "options": result_options(config),
    }


def _resume_or_start(
    stage: Stage, subsets: Mapping[str, Subset], config: EvaluateConfig
) -> tuple[Manifest | None, dict[str, ScoredSet]]:
    """Return the manifest if the stage is complete, and the sets already scored; on rank 0.

    Raises:
        StaleCacheError: The images of a scored set have changed.
        OodHeatmapError: The stage was made from different inputs or is damaged.
    """
    complete = stage.prepare(overwrite=config.overwrite)
    files = {name: scores_name(name) for name in subsets}
    if complete is not None:
        skip = [name for name in complete.files if name not in files.values()]
        check_files(stage.run, complete, skip=skip)
    scored = {
        name: ScoredSet.load(stage.directory / file)
        for name, file in files.items()
        if complete is not None or stage.is_intact(file)
    }
    if complete is None:
        # sets scored by an earlier version lack methods: they are scored again
        wanted = {SUM, COMBINED} if HELD_OUT in subsets else {SUM}
        scored = {name: item for name, item in scored.items() if wanted <= set(item.scores)}
    sources = stage.sources(list(files.values()), complete)
    for name, item in scored.items():
        source = source_hash(subsets[name].images, subsets[name].rows)
        if source and source == sources.get(files[name]):
            continue
        if item.content == current_content(subsets[name], item.row):
            continue
        if config.overwrite:
            stage.discard()
            stage.prepare(overwrite=False)
            return None, {}
        raise StaleCacheError(
            f"{stage.directory} was made from other images (images.{name}.content differs in "
            f"{subsets[name].images.source}). Add --overwrite to rebuild this stage."
        )
    return complete, scored


def _write_names(stage: Stage, name: str, images: ImageSet, scored: ScoredSet) -> dict[str, Any]:
    """Write the names of a set's images; describe the set for ``metrics.json``."""
    file = f"images-{name}.txt"
    # Python represents bytes of a file name that are not UTF-8 as lone surrogates
    text = "".join(f"{images.names[row]}\n" for row in scored.row)
    content = text.encode("utf-8", "surrogateescape")
    with stage.writing(file) as scratch:
        scratch.write_bytes(content)
    return {
        "source": images.source,
        "num_images": len(scored),
        "content": scored.content,
        "names": file,
        "names_sha256": hashlib.sha256(content).hexdigest(),
    }


def _describe_decoder(decoder: Manifest) -> dict[str, Any]:
    """Describe a decoder for ``metrics.json``."""
    return {"decoder": decoder.fingerprint, "seed": decoder.inputs["options"]["seed"]}


def _calibrate(stage: Stage, held_out: ScoredSet | None) -> Calibration | None:
    """Fit and write the calibration on the held-out ID images, if there are any."""
    if held_out is None:
        return None
    calibration = Calibration.fit(held_out.default, held_out.max_pixel_score)
    with stage.writing(CALIBRATION) as scratch:
        scratch.write_bytes(calibration.to_bytes())
    return calibration


def _finish(
    stage: Stage,
    scored: Mapping[str, ScoredSet],
    calibration: Calibration | None,
    findings: Sequence[Finding],
    config: EvaluateConfig,
) -> Manifest:
    """Write the manifest."""
    content = hash_json({name: item.content for name, item in scored.items()})
    names = [scores_name(name) for name in scored]
    names += [f"images-{name}.txt" for name in scored]
    sets = [name for name in scored if name not in (ID, HELD_OUT)]
    if calibration is not None:
        names += [CALIBRATION, COMBINATION]
        if (stage.directory / scores_name(MIXTURES)).is_file():
            names.append(scores_name(MIXTURES))
    results = EvaluationResults(
        sets=tuple(sets),
        near=config.near,
        false_alarm=config.false_alarm if calibration is not None else None,
        num_calibration=len(calibration.scores) if calibration is not None else None,
        **texts(findings),
    )
    names = ["metrics.json", *names, *FIGURES, CONTENT]
    return stage.commit(results, names, content=content)
