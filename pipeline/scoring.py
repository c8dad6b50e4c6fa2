"""Scores of every method for detection: one number per image, larger is more OOD."""

import copy
import logging
from collections.abc import Container, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save

from ood_heatmap.baselines import Outputs, Score, ScoreInputs, fit_methods
from ood_heatmap.cache.flat import FlatBank, unit_length
from ood_heatmap.cache.manifest import HASH_THREADS, hash_json
from ood_heatmap.classifier import Classifier, Output
from ood_heatmap.combined import BANK, WEIGHTS, Combination, CombinedParts, KnnDistance, make_bank
from ood_heatmap.decoder_base import Decoder
from ood_heatmap.detector import HeatmapDetector, run_decoder
from ood_heatmap.distances import TERMS, Standardization, three_terms
from ood_heatmap.distributed import all_gather, broadcast, is_main, rank, world_size
from ood_heatmap.duplicates import hash_pixels, relative_difference
from ood_heatmap.errors import OodHeatmapError
from ood_heatmap.heatmap import pixel_score
from ood_heatmap.images import ImageSet, Transform, relabel
from ood_heatmap.pipeline.config import EvaluateConfig
from ood_heatmap.pipeline.embed import Embedded, embed
from ood_heatmap.pipeline.fitting import (
    bank_rows,
    fit_data,
    num_neighbours,
    sample,
    to_outputs,
)
from ood_heatmap.pipeline.forward import BatchedClassifier
from ood_heatmap.pipeline.load import make_detector
from ood_heatmap.pipeline.meter import Meter
from ood_heatmap.pipeline.mixtures import mix
from ood_heatmap.pipeline.run import COMBINATION, Index, Targets, open_decoder
from ood_heatmap.pipeline.schedule import content_hash, source_hash
from ood_heatmap.pipeline.stage import Stage, log_event

_Float32 = NDArray[np.float32]
_Int64 = NDArray[np.int64]
_UInt8 = NDArray[np.uint8]
log = logging.getLogger(__name__)

ID, HEATMAP, SUM = "id", "heatmap", "sum"
# name of the set that the sum of three is standardised on, and thresholds are calibrated on
HELD_OUT = "calibration"
# the score that the detector decides with, and mixtures of held-out images that it is fitted with
COMBINED, MIXTURES = "combined", "mixtures"

# images scored at once, which bounds the heatmaps in memory, and the unit of distribution to ranks
_CHUNK = 1024
# ID training images that stand in for held-out ones
_MAX_REFERENCE = 2000


@dataclass(frozen=True)
class Subset:
    """The images of a set that are evaluated.

    Args:
        images: The set.
        rows: Rows of the set, ascending.
        classes: Class names of the run, by label.
        transform: Transform of the images to the input size; that of the classifier if None.
    """

    images: ImageSet
    rows: _Int64
    classes: Sequence[str]
    transform: Transform | None = None

    @cached_property
    def labels(self) -> NDArray[np.int32]:
        """Label of each image of the set, matched by class name; -1 if the run lacks the class."""
        return relabel(self.images, self.classes).labels


@dataclass(frozen=True)
class ScoredSet:
    """Scores of all methods for B images.

    Args:
        scores: ``(B,)`` float32 by method; larger is more OOD.
        max_pixel_score: ``(B,)`` float32, the maximum pixel score of the detector's heatmaps.
        max_place: ``(B,)`` float32, the largest log-odds of a pixel that the decoder returns; 0
            without such.
        prediction: ``(B,)`` int32 predicted class.
        label: ``(B,)`` int32 class, -1 where unknown.
        row: ``(B,)`` int64 rows of the set.
        pixel_hash: ``(B,)`` uint64, see ``duplicates.hash_pixels``.
        nearest: ``(B,)`` int64 row of the ID training image with the nearest features.
        difference: ``(B,)`` float32 to that image, see ``duplicates.relative_difference``.
        content: sha256 of the images' bytes.
    """

    scores: Mapping[str, _Float32]
    max_pixel_score: _Float32
    max_place: _Float32
    prediction: NDArray[np.int32]
    label: NDArray[np.int32]
    row: _Int64
    pixel_hash: NDArray[np.uint64]
    nearest: _Int64
    difference: _Float32
    content: str

    def __len__(self) -> int:
        return len(self.row)

    @property
    def by_method(self) -> dict[str, _Float32]:
        """The scores without the heatmap scores of runs with other seeds."""
        return {
            name: values
            for name, values in self.scores.items()
            if not name.startswith(f"{HEATMAP}-")
        }

    @staticmethod
    def concatenate(parts: Sequence["ScoredSet"]) -> "ScoredSet":
        """Concatenate the scores of consecutive chunks of a set."""
        return ScoredSet(
            {key: np.concatenate([part.scores[key] for part in parts]) for key in parts[0].scores},
            **{
                field: np.concatenate([getattr(part, field) for part in parts])
                for field in _COLUMNS
            },
            content=hash_json([part.content for part in parts]),
        )

    @property
    def default(self) -> _Float32:
        """The score that the detector decides with."""
        return self.scores[default_score(self.scores)]

    def save(self, path: Path) -> None:
        """Save to an ``.npz`` file, deterministically; not atomic."""
        columns = {name: getattr(self, field) for field, name in _COLUMNS.items()}
        with path.open("wb") as file:
            np.savez(file, **{**self.scores, **columns, "content": np.array(self.content)})

    @staticmethod
    def load(path: Path) -> "ScoredSet":
        """Load a file written by ``save``; the caller verifies its checksum."""
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        # earlier versions had none
        arrays.setdefault("place", np.zeros_like(arrays["peak"]))
        columns = {field: arrays.pop(name) for field, name in _COLUMNS.items()}
        content = str(arrays.pop("content"))
        return ScoredSet(arrays, **columns, content=content)


# maps the array fields of a scored set to their names in the file
_COLUMNS = {
    "max_pixel_score": "peak",
    "max_place": "place",
    "prediction": "prediction",
    "label": "label",
    "row": "row",
    "pixel_hash": "pixel_hash",
    "nearest": "nearest",
    "difference": "difference",
}


def default_score(names: Container[str]) -> str:
    """Return the name of the score that the detector decides with.

    Without held-out ID images scores cannot be combined: it is that of the decoder.
    """
    return COMBINED if COMBINED in names else HEATMAP


def name_of_run(number: int) -> str:
    """Return the name of a decoder's score: 0 is the run itself, then runs with other seeds."""
    return f"{HEATMAP}-{number + 1}" if number else HEATMAP


@dataclass(frozen=True)
class DetectionMethods:
    """The heatmap and all methods of ``METHODS``, fitted.

    Args:
        detectors: Detector of the run, then of runs with other seeds; they share a classifier.
        classifier: The classifier; returns all feature maps of the index.
        index: Index of the run.
        id_features: Features of all ID training images, searched at unit length.
        knn_distance: Of the images that the kNN score searches.
        by_name: The fitted methods.
        neighbours: k of the kNN score.
        config: Settings of the stage.
    """

    detectors: Sequence[HeatmapDetector]
    classifier: Classifier
    index: Index
    id_features: FlatBank
    knn_distance: KnnDistance
    by_name: Mapping[str, Score]
    neighbours: int
    config: EvaluateConfig

    def __call__(self, embedded: Embedded, labels: NDArray[np.int32]) -> ScoredSet:
        """Score embedded images.

        Args:
            embedded: Images and outputs of the classifier.
            labels: ``(B,)`` classes, -1 where unknown.
        """
        heatmap_scores, max_pixel_score, max_place = self._decode(embedded)
        outputs = to_outputs(
            embedded.features,
            embedded.prediction,
            embedded.spatial,
            self.classifier.map_shapes,
            self._num_maps,
        )
        distance = self._knn_distances(embedded.features, self.neighbours)
        inputs = ScoreInputs(outputs, embedded.logits, distance)
        scores = {name: method(inputs) for name, method in self.by_name.items()}
        nearest = self.id_features.search(embedded.features, k=1)[1][:, 0]
        return ScoredSet(
            {**heatmap_scores, **scores},
            max_pixel_score=max_pixel_score,
            max_place=max_place,
            prediction=embedded.prediction,
            label=labels,
            row=embedded.rows,
            pixel_hash=hash_pixels(embedded.images),
            nearest=self.index.columns["row"].take(nearest),
            difference=relative_difference(
                embedded.images, self.index.columns["images"].take(nearest)
            ),
            content=embedded.content,
        )

    @cached_property
    def training_reference(self) -> dict[str, _Float32]:
        """Scores of ID training images, which stand in for held-out ID images where there are none.

        The nearest neighbour of an image in the bank is itself: one more is searched.
        """
        seed = self.config.seed
        chosen = sample(bank_rows(self.index, seed), seed, _MAX_REFERENCE)
        features = self.index.columns["features"].take(chosen)
        head = copy.deepcopy(self.classifier.last_layer()).cpu()
        with torch.inference_mode():
            logits = head(torch.from_numpy(features)).numpy()
        outputs = Outputs(features, logits.argmax(axis=1), (), features[:, :0])
        distance = self._knn_distances(features, self.neighbours + 1)
        inputs = ScoreInputs(outputs, logits, distance)
        return {name: self.by_name[name](inputs) for name in TERMS}

    def add_sum(self, scored: ScoredSet, held_out: ScoredSet | None) -> ScoredSet:
        """Return the scores of a set with the sum of three, standardised on held-out ID images."""
        reference = self.training_reference if held_out is None else held_out.scores
        standardization = Standardization.fit(_three_terms(reference))
        total = standardization(_three_terms(scored.scores)).sum(axis=1).astype(np.float32)
        return replace(scored, scores={**scored.scores, SUM: total})

    @property
    def _num_maps(self) -> int:
        """Number of feature maps that the decoders use."""
        return len(self.detectors[0].decoder.config.map_shapes)

    @torch.inference_mode()
    def _knn_distances(self, features: _Float32, neighbours: int) -> _Float32:
        """Return the kNN distances of features ``(B, D)``, as the detector computes them."""
        device, size = self.knn_distance.bank.device, self.config.batch_size
        found = [
            self.knn_distance(
                torch.from_numpy(features[start : start + size]).to(device), neighbours
            )
            for start in range(0, len(features), size)
        ]
        distances: _Float32 = torch.cat(found).cpu().numpy()
        return distances

    def _decode(self, embedded: Embedded) -> tuple[dict[str, _Float32], _Float32, _Float32]:
        """Return the image scores of each decoder, and maxima over the pixels of the run's.

        They are the maximum pixel score without a combined score, and the largest log-odds.
        """
        device, size = self.detectors[0].classifier.device, self.config.batch_size
        batches = [
            _to_output(embedded, slice(start, start + size), device, self._num_maps)
            for start in range(0, len(embedded.rows), size)
        ]
        scores, maxima = {}, np.empty((0, 2), np.float32)
        for number, detector in enumerate(self.detectors):
            found, of_pixels = zip(
                *(_score_images(detector.decoder, batch) for batch in batches), strict=True
            )
            scores[name_of_run(number)] = np.concatenate(found)
            if number == 0:
                maxima = np.concatenate(of_pixels)
        return scores, *maxima.T


def _three_terms(scores: Mapping[str, _Float32]) -> NDArray[np.float64]:
    """Return the terms of the sum of three, ``(B, 3)``, from the scores by method."""
    return three_terms(*(scores[name] for name in TERMS))


@torch.inference_mode()
def _score_images(decoder: Decoder, output: Output) -> tuple[_Float32, _Float32]:
    """Return the learned scores ``(B,)``, and maxima ``(B, 2)`` over the pixels of each image.

    They are of the pixel score, and of the log-odds; heatmaps stay on the device.
    """
    places, scores = run_decoder(decoder, output, output.logits.argmax(dim=1))
    max_pixel_score = pixel_score(decoder.heatmap(places, scores)).amax(dim=(1, 2))
    max_place = places.amax(dim=(1, 2, 3)) if decoder.has_level else torch.zeros_like(scores)
    return scores.cpu().numpy(), torch.stack([max_pixel_score, max_place], dim=1).cpu().numpy()


def _to_output(embedded: Embedded, rows: slice, device: torch.device, num_maps: int) -> Output:
    """Return the classifier's outputs of some rows, on the device, with the decoder's maps."""
    return Output(
        torch.from_numpy(embedded.features[rows]).to(device),
        torch.from_numpy(embedded.logits[rows]).to(device),
        tuple(torch.from_numpy(maps[rows]).to(device) for maps in embedded.maps[:num_maps]),
    )


def open_detectors(
    runs: Sequence[Path], index: Index, device: torch.device
) -> list[HeatmapDetector]:
    """Return the detector of each run; they share a classifier, with all feature maps."""
    classifier = index.classifier(device)
    decoders = (open_decoder(run, index.manifest, device) for run in runs)
    return [make_detector(index, decoder, device, classifier=classifier) for decoder in decoders]


def make_detection_methods(
    index: Index, targets: Targets, detectors: Sequence[HeatmapDetector], config: EvaluateConfig
) -> DetectionMethods:
    """Fit every method, on rank 0 for all ranks."""
    detector = detectors[0]
    classifier, num_maps = detector.classifier, len(detector.decoder.config.map_shapes)
    fitted = None
    if is_main():
        fitted = fit_methods(fit_data(index, targets, classifier, num_maps, config.seed))
    bank = index.columns["features"].take(bank_rows(index, config.seed))
    return DetectionMethods(
        detectors,
        classifier,
        index,
        FlatBank(index.columns["features"], unit_length, classifier.device),
        KnnDistance(make_bank(torch.from_numpy(bank))).to(classifier.device),
        broadcast(fitted),
        num_neighbours(index, config),
        config,
    )


def scores_name(name: str) -> str:
    """Return the name of the file with the scores of a set."""
    return f"scores-{name}.npz"


def _chunks(subset: Subset) -> list[_Int64]:
    """Split the rows into chunks that are scored at once.

    They do not depend on batch size or number of ranks, because the content hash of a set depends
    on them.
    """
    return [subset.rows[start : start + _CHUNK] for start in range(0, len(subset.rows), _CHUNK)]


def current_content(subset: Subset, rows: _Int64) -> str | None:
    """Return ``ScoredSet.content`` of the current images; None if an image is missing.

    Args:
        subset: The images.
        rows: The rows that were readable when they were scored.
    """
    digest = subset.images.digest

    def hash_chunk(chunk: _Int64) -> str:
        return content_hash(b"".join(map(digest, np.intersect1d(chunk, rows).tolist())))

    try:
        with ThreadPoolExecutor(HASH_THREADS) as pool:
            return hash_json(list(pool.map(hash_chunk, _chunks(subset))))
    except (OSError, OodHeatmapError):
        return None


def score_set(
    stage: Stage,
    name: str,
    subset: Subset,
    methods: DetectionMethods,
    held_out: ScoredSet | None,
) -> ScoredSet:
    """Score a set; chunks are assigned to ranks round-robin.

    Args:
        stage: The evaluation stage.
        name: Name of the set.
        subset: Its images.
        methods: The fitted methods.
        held_out: The scored held-out ID images; None if there are none, or these are the set.
    """
    config, classifier = methods.config, methods.classifier
    chunks = _chunks(subset)
    assigned = range(len(chunks))[rank() :: world_size()]
    meter = Meter(sum(len(chunks[number]) for number in assigned), f"evaluate {name}")
    embedded = embed(
        subset.images,
        [chunks[number] for number in assigned],
        BatchedClassifier(classifier, config.batch_size, spatial=True),
        meter,
        workers=config.num_workers,
        skip_unreadable=config.skip_unreadable,
        transform=subset.transform,
    )
    own = {
        number: methods(chunk, subset.labels[chunk.rows])
        for number, chunk in zip(assigned, embedded, strict=True)
    }
    stats = meter.close()
    gathered = {number: item for of_rank in all_gather(own) for number, item in of_rank.items()}
    scored = ScoredSet.concatenate([gathered[number] for number in range(len(chunks))])
    scored = methods.add_sum(scored, scored if name == HELD_OUT else held_out)
    if is_main():
        log_event(stage.run, "evaluate", set=name, **stats, device=str(classifier.device))
    return scored


def add_combined(scored: ScoredSet, combination: Combination | None, decoder: Decoder) -> ScoredSet:
    """Return the scores of a set with the combined one, which sets the level of heatmaps."""
    if combination is None:
        return scored
    total, max_pixel_score = combination(scored.scores), scored.max_pixel_score
    if decoder.has_level:
        level, places = (torch.from_numpy(item) for item in (total, scored.max_place))
        level, local = combination.level(level), combination.local(places)
        largest = level if local is None else torch.maximum(level, local)
        max_pixel_score = largest.sigmoid().numpy()
    scores = {**scored.scores, COMBINED: total}
    return replace(scored, scores=scores, max_pixel_score=max_pixel_score)


def save_scores(stage: Stage, name: str, subset: Subset, scored: ScoredSet) -> ScoredSet:
    """Write the scores of a set on rank 0, and return them."""
    if is_main():
        source = source_hash(subset.images, subset.rows)
        with stage.writing(scores_name(name), source=source) as scratch:
            scored.save(scratch)
    return scored


def fit_combination(
    stage: Stage, held_out: Subset, scored: ScoredSet, methods: DetectionMethods
) -> Combination:
    """Fit the combined score to held-out ID images and mixtures of them, and write it."""
    transform = methods.classifier.config.transform
    images = mix(held_out.images, scored.row, scored.prediction, transform, methods.config.seed)
    mixtures = None
    if images is not None:
        # mixtures are at the input size
        subset = Subset(images, np.arange(len(images)), (), Transform(transform.size))
        mixed = score_set(stage, MIXTURES, subset, methods, scored)
        save_scores(stage, MIXTURES, subset, mixed)
        mixtures = mixed.scores
    decoder = methods.detectors[0].decoder
    max_place = scored.max_place if decoder.has_level and decoder.config.map_shapes else None
    combination = Combination.fit(scored.scores, mixtures, HEATMAP, max_place)
    reason = "for all held-out images are predicted as one class"
    if mixtures is not None:
        pairs = zip(WEIGHTS, combination.mixture_auroc, strict=True)
        by_weight = ", ".join(f"{auroc:.3f} ({weight:g})" for weight, auroc in pairs)
        reason = f"by AUROC of mixtures: {by_weight}"
    log.info("combined score: weight %g of the learned score, %s", combination.weight, reason)
    if is_main():
        _save_combination(stage, combination, methods)
    return combination


def _save_combination(stage: Stage, combination: Combination, methods: DetectionMethods) -> None:
    """Write what the detector needs for the combined score."""
    # the fitted scores are partials of these
    fitted: dict[str, tuple[Any, ...]] = {
        name: getattr(score, "args", ()) for name, score in methods.by_name.items()
    }
    mahalanobis = fitted["mahalanobis_pp"][0]
    of_layers, layers = fitted.get("mahalanobis_pp_layers", (None, ()))
    parts = CombinedParts(combination, methods.neighbours, mahalanobis, tuple(layers), of_layers)
    tensors, metadata = parts.to_tensors()
    tensors[BANK] = methods.knn_distance.bank.half().cpu()
    with stage.writing(COMBINATION) as scratch:
        scratch.write_bytes(save(tensors, metadata))
