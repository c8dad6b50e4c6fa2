"""Read access to the finished stages of a run directory.

Nothing here builds a stage: inference imports no training code, and no stage imports another.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load

from ood_heatmap.cache import manifest as manifests
from ood_heatmap.cache.flat import read_index, write_index
from ood_heatmap.cache.manifest import Manifest, abbreviate
from ood_heatmap.cache.neighbours import Bank, order_by_class
from ood_heatmap.cache.shards import Column, Rows, open_rows
from ood_heatmap.cache.stamps import check_unstamped, current_stamps
from ood_heatmap.classifier import Classifier, ClassifierConfig, restore_classifier
from ood_heatmap.decoder import Decoder, load_decoder
from ood_heatmap.distributed import broadcast, is_main
from ood_heatmap.errors import DamagedCacheError, StaleCacheError, UsageError
from ood_heatmap.heatmap import SCALE
from ood_heatmap.networks import parse_user_code
from ood_heatmap.pipeline.patched import PastePlan, draw_paste_plan
from ood_heatmap.pipeline.results import (
    DecoderResults,
    IndexResults,
    TargetsResults,
)
from ood_heatmap.projection import Projection, load_projections
from ood_heatmap.user_code import UserCode

log = logging.getLogger(__name__)

PROBE, PROBED = "probe.safetensors", ("images", "features")
PIXEL_HASHES, PROJECTIONS = "pixel_hashes.safetensors", "projections.safetensors"
INDEX, WEIGHTS, DECODER = "index.faiss", "classifier.safetensors", "decoder.safetensors"
CALIBRATION = "calibration.safetensors"
COMBINATION = "combination.safetensors"
# folder with a copy of the user's model code
CODE = "code"
# column of the targets
PRESENCE = "presence"
_SQUARES = "squares"


# maps a stage, named as its directory, to the command that builds it
COMMANDS = {
    "index": "index",
    "targets": "targets",
    "decoder": "train",
    "evaluation": "evaluate",
    "localization": "localize",
}


def format_command(run: Path, stage: str) -> str:
    """Format the command line that builds a stage, for messages."""
    return f"ood-heatmap {COMMANDS.get(stage, stage)} {run} ..."


def read_manifest(run: Path, stage: str) -> Manifest:
    """Read the manifest of a finished stage.

    Raises:
        OodHeatmapError: The stage is missing, unfinished, damaged or of another format.
    """
    return manifests.read_manifest(run / stage, command=format_command(run, stage))


def check_files(run: Path, manifest: Manifest, *, skip: Collection[str] = ()) -> None:
    """Verify the checksum of every file of a finished stage.

    Args:
        run: The run directory.
        manifest: Manifest of the stage.
        skip: Names of files to skip.

    Raises:
        DamagedCacheError: A file is missing or changed; names the file.
    """
    command = format_command(run, manifest.stage)
    manifests.check_files(run / manifest.stage, manifest, command=command, skip=skip)


def _open_stage(
    run: Path, stage: str, *, derived: str = "", index: Manifest | None = None
) -> Manifest:
    """Read the manifest of a finished stage and check its files; rank 0 acts for all ranks.

    A file with size and time as recorded when it was hashed is not hashed again.

    Args:
        run: The run directory.
        stage: Name of the stage.
        derived: Name of a file that may be missing, since it can be rebuilt.
        index: Manifest of the index that the stage must be built from.

    Raises:
        OodHeatmapError: The stage is missing, unfinished, damaged or of another index.
    """
    if not is_main():
        return broadcast(None)
    manifest = read_manifest(run, stage)
    if index is not None:
        require_from(manifest, index, run)
    skip = [derived] if derived and not (run / stage / derived).is_file() else []
    command = format_command(run, stage)
    check_unstamped(run / stage, manifest, command=command, skip=skip)
    return broadcast(manifest)


def _open_columns(run: Path, manifest: Manifest, columns: Mapping[str, Column]) -> dict[str, Rows]:
    """Memory-map the shards of a finished stage.

    Raises:
        DamagedCacheError: A shard is missing or does not match the columns.
    """
    directory = run / manifest.stage
    stamps = current_stamps(directory, manifest)
    headers = {name: stamp.header for name, stamp in stamps.items() if stamp.header is not None}
    return open_rows(manifest.shard_paths(directory), columns, headers)


def read_result(run: Path, stage: str, name: str) -> dict[str, Any]:
    """Read a JSON file of a finished stage and verify its checksum.

    Raises:
        OodHeatmapError: The stage is not finished, or the file has changed.
    """
    manifest = read_manifest(run, stage)
    check_files(run, manifest, skip=[other for other in manifest.files if other != name])
    return manifests.read_json(run / stage / name, command=format_command(run, stage))


def read_file(run: Path, manifest: Manifest, name: str) -> bytes:
    """Return the verified bytes of a file of a finished stage.

    Raises:
        DamagedCacheError: The file is missing or has changed.
    """
    command = format_command(run, manifest.stage)
    return manifests.read_file(run / manifest.stage, manifest, name, command=command)


def require_from(manifest: Manifest, previous: Manifest, run: Path) -> None:
    """Reject a stage that was built from another version of the previous stage.

    Raises:
        StaleCacheError: The fingerprints differ; names both.
    """
    before, now = manifest.inputs.get(previous.stage), previous.fingerprint
    if before != now:
        raise StaleCacheError(
            f"{run / manifest.stage} was built from a different {previous.stage} "
            f"(fingerprint {abbreviate(before)}, now {abbreviate(now)}). "
            f"Run `{format_command(run, manifest.stage)}` again with --overwrite."
        )


def index_columns(
    size: int, num_features: int, map_shapes: Sequence[tuple[int, ...]]
) -> dict[str, Column]:
    """Return the columns of stage 1, one row per ID image."""
    return {
        "images": Column(
            "uint8",
            (3, size, size),
            "ID images at the classifier's input size, RGB, [n, C, H, W]",
        ),
        "features": _features(num_features, "n"),
        "prediction": Column("int32", (), "predicted class, [n]"),
        "label": Column("int32", (), "class of the data set, -1 where unknown, [n]"),
        "row": Column("int64", (), "row of the ID data set, [n]"),
        **_feature_maps(map_shapes),
    }


def target_columns(
    size: int, heatmap_size: int, num_features: int, map_shapes: Sequence[tuple[int, ...]]
) -> dict[str, Column]:
    """Return the columns of stage 2, one row per OOD image and per patched image."""
    heatmap = Column(
        "int16",
        (3, size, size),
        "nearest ID image minus OOD image, [m, C, H, W]; times scale it is in [-1, 1]",
        {"scale": SCALE},
    )
    if heatmap_size != size:
        heatmap = Column(
            "uint8",
            (2, 3, heatmap_size, heatmap_size),
            "area averages of the positive and negative part of nearest ID image minus OOD image, "
            "[m, 2, C, h, w]; first minus second, times scale, is in [-1, 1]",
            {"scale": SCALE},
        )
    return {
        "heatmap": heatmap,
        "features": _features(num_features, "m"),
        "prediction": Column("int32", (), "predicted class, [m]"),
        "row": Column("int64", (), "row of the OOD data set, [m]"),
        "nearest": Column("int64", (), "row of the ID data set of the nearest ID image, [m]"),
        "distance": Column("float32", (), "Euclidean distance of the features to it, [m]"),
        "same_class": Column(
            "uint8", (), "0 where no ID image has the predicted class and all were searched, [m]"
        ),
        "patched": Column(
            "uint8", (), "1 for an ID image (nearest) with a patch of an OOD image (row) in it, [m]"
        ),
        PRESENCE: Column(
            "uint8",
            (heatmap_size, heatmap_size),
            "opacity of the OOD image, averaged as the heatmap, [m, h, w]; times scale it is in "
            "[0, 1]: 1 everywhere in an OOD image, 0 outside the patch in a patched image",
            {"scale": 1 / 255},
        ),
        **_feature_maps(map_shapes),
    }


def _features(num_features: int, rows: str) -> Column:
    about = f"input of the classifier's last linear layer, [{rows}, D]"
    return Column("float32", (num_features,), about)


def _feature_maps(map_shapes: Sequence[tuple[int, ...]]) -> dict[str, Column]:
    about = "feature map of the classifier, [n, c, h, w]"
    return {
        map_column(number): Column("float16", shape, about)
        for number, shape in enumerate(map_shapes)
    }


def map_column(number: int) -> str:
    """Return the column name of a feature map; 0 is the deepest."""
    return f"feature_maps_{number + 1}"


@dataclass(frozen=True)
class Index:
    """A finished index, opened for reading.

    Args:
        run: The run directory.
        manifest: Manifest of stage 1.
        columns: ``images``, ``features``, ``prediction``, ``label``, ``row`` and feature maps, in
            data set order.
    """

    run: Path
    manifest: Manifest
    columns: Mapping[str, Rows]

    @cached_property
    def results(self) -> IndexResults:
        """Results of stage 1."""
        return IndexResults.from_manifest(self.manifest)

    @property
    def size(self) -> int:
        """Side length of the images in pixels."""
        return ClassifierConfig.from_json(self.results.classifier).transform.size

    @property
    def feature_range(self) -> tuple[float, float]:
        """Minimum and maximum over all ID training features."""
        return self.results.feature_min, self.results.feature_max

    @cached_property
    def row(self) -> NDArray[np.int64]:
        """``(N,)`` int64 rows of the ID data set, ascending."""
        return self.columns["row"].read()

    def bank(self, device: torch.device) -> Bank:
        """Open the features for nearest-neighbour search on a device."""
        prediction, row = self.columns["prediction"].read(), self.row
        order = order_by_class(prediction, row)
        path = self.run / "index" / INDEX
        # derived from the shards, so losing it does no harm
        if not path.is_file():
            log.warning("%s is missing: rebuilding it from the shards", path)
            write_index(path, self.columns["features"], order)
        features = read_index(path, len(row), self.results.num_features)
        return Bank(features, prediction[order], row[order], device=device)

    @property
    def classifier_config(self) -> ClassifierConfig:
        """Configuration of the classifier: everything except its weights."""
        return ClassifierConfig.from_json(self.results.classifier)

    def classifier(self, device: torch.device, num_maps: int | None = None) -> Classifier:
        """Restore the classifier of the index from the run's own copy of its weights.

        Args:
            device: Device of the classifier.
            num_maps: Number of feature maps to return; as many as the index has if None.

        Raises:
            StaleCacheError: The restored classifier is a different one; names what differs.
            OodHeatmapError: It runs code that the user does not trust, see ``user_code``.
        """
        classifier = restore_classifier(
            self.classifier_config,
            self.run / "index" / WEIGHTS,
            self.manifest.inputs["classifier"],
            num_maps,
            self._code(),
        )
        classifier.to(device).project(self._projections())
        path = self.run / "index" / PROBE
        try:
            tensors = load(read_file(self.run, self.manifest, PROBE))
        except SafetensorError as error:
            raise DamagedCacheError(f"{path} is not safetensors ({error}). Index again.") from error
        if not tensors.keys() >= set(PROBED):
            raise DamagedCacheError(f"{path} lacks {' or '.join(PROBED)}. Index again.")
        check_probe(classifier, tensors, self.results.versions)
        return classifier

    def _projections(self) -> dict[str, Projection]:
        """Return the projections of feature maps by name; none if all maps are narrow."""
        if PROJECTIONS not in self.manifest.files:
            return {}
        content = read_file(self.run, self.manifest, PROJECTIONS)
        return load_projections(content, self.run / "index" / PROJECTIONS)

    def _code(self) -> UserCode | None:
        """Return the run's copy of the user's model code; None for other networks.

        Raises:
            DamagedCacheError: A file is missing or has changed.
        """
        code = parse_user_code(self.classifier_config.spec)
        if code is None:
            return None
        prefix = f"{CODE}/"
        files = {
            name.removeprefix(prefix): read_file(self.run, self.manifest, name)
            for name in self.manifest.files
            if name.startswith(prefix)
        }
        kept = code.from_kept_files(files, self.run / self.manifest.stage / CODE)
        with suppress(UsageError):
            if kept.kept is not None and code.hash != kept.hash:
                log.warning(
                    "%s has changed since the run was made: its own copy %s is used",
                    code.module,
                    kept.place,
                )
        return kept

    def pixel_hashes(self) -> NDArray[np.uint64] | None:
        """Return the pixel hash of each image; None if an earlier version made the index.

        Raises:
            DamagedCacheError: The file is damaged.
        """
        if PIXEL_HASHES not in self.manifest.files:
            return None
        content = read_file(self.run, self.manifest, PIXEL_HASHES)
        return np.asarray(load(content)["pixel_hash"].numpy(), np.uint64)

    def positions(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the positions of data set rows in the columns.

        They differ from the rows if unreadable images were skipped.
        """
        return np.searchsorted(self.row, rows)


def check_probe(
    classifier: Classifier, tensors: Mapping[str, torch.Tensor], versions: Mapping[str, str]
) -> None:
    """Compare the outputs of a restored classifier on a few ID images with the stored ones.

    Args:
        classifier: The restored classifier, on its device.
        tensors: Content of the probe file.
        versions: Library versions at the time of indexing.

    Raises:
        StaleCacheError: The outputs differ by more than rounding.
    """
    maps = [tensors[name].numpy() for name in sorted(tensors) if name not in PROBED]
    images, features = (tensors[name].numpy() for name in PROBED)
    classifier.check_same_outputs(images, features, maps, versions)


def open_index(run: Path) -> Index:
    """Open a finished index; rank 0 checks its files for all ranks.

    Raises:
        OodHeatmapError: The index is missing, unfinished or damaged.
    """
    return map_index(run, _open_stage(run, "index", derived=INDEX))


def map_index(run: Path, manifest: Manifest) -> Index:
    """Memory-map a finished index without verifying its files.

    Raises:
        DamagedCacheError: A shard is missing or does not match the columns.
    """
    results = IndexResults.from_manifest(manifest)
    size = ClassifierConfig.from_json(results.classifier).transform.size
    columns = index_columns(size, results.num_features, results.map_shapes)
    return Index(run, manifest, _open_columns(run, manifest, columns))


def open_for_classifier(run: Path) -> Index:
    """Open a finished index without its columns, for its classifier only.

    Raises:
        OodHeatmapError: The index is missing or unfinished, or the weights are damaged.
    """
    manifest = read_manifest(run, "index")
    check_files(run, manifest, skip=[name for name in manifest.files if name != WEIGHTS])
    return Index(run, manifest, {})


@dataclass(frozen=True)
class Targets:
    """Finished targets, opened for reading; the columns are those of ``target_columns``."""

    run: Path
    manifest: Manifest
    columns: Mapping[str, Rows]

    @cached_property
    def results(self) -> TargetsResults:
        """Results of stage 2."""
        return TargetsResults.from_manifest(self.manifest)

    @property
    def heatmap_size(self) -> int:
        """Side of the targets in pixels."""
        return self.columns["heatmap"].shape[-1]

    @property
    def is_averaged(self) -> bool:
        """Whether the targets are smaller than the images: area averages of the difference."""
        return self.columns["heatmap"].dtype == np.uint8


def open_targets(run: Path, index: Index) -> Targets:
    """Open finished targets; rank 0 checks their files for all ranks.

    Raises:
        OodHeatmapError: The targets are missing, unfinished, damaged or of another index.
    """
    return map_targets(run, _open_stage(run, "targets", index=index.manifest), index)


def map_targets(run: Path, manifest: Manifest, index: Index) -> Targets:
    """Memory-map finished targets without verifying their files.

    Raises:
        DamagedCacheError: A shard is missing or does not match the columns.
    """
    # an earlier version had no other size
    heatmap_size = manifest.inputs["options"].get("heatmap_size") or index.size
    columns = target_columns(
        index.size, heatmap_size, index.results.num_features, index.results.map_shapes
    )
    # an earlier version did not store it
    if "patch_shapes" not in manifest.inputs["options"]:
        del columns[PRESENCE]
    return Targets(run, manifest, _open_columns(run, manifest, columns))


def draw_rows(num_images: int, limit: int | None, seed: int) -> NDArray[np.int64]:
    """Draw ``limit`` random rows of a set, ascending; all rows if None."""
    if limit is None:
        return np.arange(num_images)
    return np.sort(np.random.default_rng(seed).choice(num_images, limit, replace=False))


def make_paste_plan(
    index: Index, rows: NDArray[np.int64], share: float, seed: int, *, squares: bool
) -> PastePlan:
    """Draw which patched images to make: ``share`` times the number of OOD images."""
    count, num_id = round(share * len(rows)), len(index.columns["row"])
    return draw_paste_plan(count, num_id, rows, seed, squares=squares)


def redraw_paste_plan(targets: Targets, index: Index) -> PastePlan:
    """Draw the paste plan of finished targets again from the settings in their manifest."""
    inputs = targets.manifest.inputs
    options = inputs["options"]
    rows = draw_rows(inputs["images"]["num_images"], options["limit"], options["seed"])
    # an earlier version pasted squares only
    squares = options.get("patch_shapes", _SQUARES) == _SQUARES
    return make_paste_plan(index, rows, options["patched"], options["seed"], squares=squares)


@dataclass(frozen=True)
class TrainedDecoder:
    """A finished decoder and its manifest."""

    decoder: Decoder
    manifest: Manifest

    @cached_property
    def results(self) -> DecoderResults:
        """Results of stage 3."""
        return DecoderResults.from_manifest(self.manifest)


def open_decoder(run: Path, index: Manifest, device: torch.device) -> TrainedDecoder:
    """Load a finished decoder.

    Raises:
        OodHeatmapError: The decoder is missing, unfinished, damaged or of another index.
    """
    manifest = read_manifest(run, "decoder")
    targets = read_manifest(run, "targets")
    require_from(targets, index, run)
    require_from(manifest, targets, run)
    decoder = load_decoder(read_file(run, manifest, DECODER), run / "decoder" / DECODER)
    decoder.to(device).to(memory_format=torch.channels_last)
    return TrainedDecoder(decoder, manifest)
