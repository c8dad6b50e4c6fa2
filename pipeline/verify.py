"""Is what is on disk what was written, and is it right? Checksums, and a sample of targets by
brute force."""

import logging
from pathlib import Path

import numpy as np

from ood_heatmap.cache.manifest import COMMANDS, FINISHED, check_files, read_manifest, require_from
from ood_heatmap.cache.neighbours import squared_distances
from ood_heatmap.errors import DamagedCacheError
from ood_heatmap.pipeline.index import Index, open_index
from ood_heatmap.pipeline.targets import Targets, open_targets

log = logging.getLogger(__name__)


def verify(run: Path, *, num_samples: int = 200, seed: int = 0) -> list[str]:
    """Reread every checksum of a run, check the chain of fingerprints, and re-derive a sample of
    targets.

    Args:
        run: The run directory.
        num_samples: Targets to pair again, in float64, by plain differences to every ID image.
        seed: Of the sample.

    Returns:
        A line for each thing that was checked.

    Raises:
        OodHeatmapError: Names the first thing that is wrong.
    """
    index = open_index(run)
    lines = [f"index: {len(index.manifest.files)} files as they were written"]
    previous = index.manifest
    for stage in list(COMMANDS)[1:]:
        if not (run / stage / FINISHED).is_file():
            lines.append(f"{stage}: not made yet")
            continue
        manifest = read_manifest(run, stage)
        if previous.stage in manifest.inputs:
            require_from(manifest, previous, run)
        check_files(run, manifest)
        lines.append(f"{stage}: {len(manifest.files)} files as they were written")
        if stage == "targets":
            count = check_targets(index, open_targets(run, index), num_samples, seed)
            lines.append(
                f"targets: {count} of {manifest.results['num_images']} paired again, all equal"
            )
        previous = manifest
    return lines


def check_targets(index: Index, targets: Targets, num_samples: int, seed: int) -> int:
    """Pair a sample again by brute force and compare; return its size.

    Raises:
        DamagedCacheError: Names the row that differs.
    """
    columns = {name: rows.parts for name, rows in targets.columns.items()}
    num_rows = sum(map(len, columns["row"]))
    sample = np.sort(
        np.random.default_rng(seed).choice(num_rows, min(num_samples, num_rows), replace=False)
    )
    features, prediction, row = (
        index.columns[name].read() for name in ("features", "prediction", "row")
    )
    taken = {name: targets.columns[name].take(sample) for name in columns}
    nearest_wanted = targets.manifest.results["pairing"] == "nearest"
    for i in range(len(sample)):
        where = f"row {taken['row'][i]} of {targets.run / 'targets'}"
        own = np.flatnonzero(prediction == taken["prediction"][i])
        searched = own if len(own) else np.arange(len(row))
        if bool(taken["same_class"][i]) != bool(len(own)):
            raise DamagedCacheError(f"{where}: same_class is wrong.")
        partner = taken["nearest"][i]
        if nearest_wanted:
            squared = squared_distances(taken["features"][i], features[searched])
            partner = row[searched[squared == squared.min()]].min()
        elif partner not in row[searched]:
            raise DamagedCacheError(f"{where}: its partner is of another class.")
        if partner != taken["nearest"][i]:
            raise DamagedCacheError(
                f"{where}: its nearest ID row is {partner}, {taken['nearest'][i]} is stored."
            )
        image = index.columns["images"].take(index.positions(np.array([partner])))[0]
        if not in_range(image - taken["heatmap"][i]):
            raise DamagedCacheError(f"{where}: nearest minus heatmap is no image.")
    return len(sample)


def in_range(image: np.ndarray[tuple[int, ...], np.dtype[np.int16]]) -> bool:
    """Tell whether values are pixels."""
    return bool((image >= 0).all() and (image <= 255).all())
