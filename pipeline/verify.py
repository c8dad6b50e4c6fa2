"""Verify a run: every checksum, and a sample of targets by brute force."""

import logging
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ood_heatmap.cache.manifest import MANIFEST
from ood_heatmap.cache.neighbours import squared_distances
from ood_heatmap.cache.shards import Rows
from ood_heatmap.devices import one_blas_thread
from ood_heatmap.errors import DamagedCacheError
from ood_heatmap.heatmap import averaged_parts, difference
from ood_heatmap.images import ImageSet, apply_transform
from ood_heatmap.pipeline.config import VerifyConfig
from ood_heatmap.pipeline.run import (
    COMMANDS,
    INDEX,
    PRESENCE,
    Index,
    Targets,
    check_files,
    draw_rows,
    map_index,
    map_targets,
    read_manifest,
    redraw_paste_plan,
    require_from,
)
from ood_heatmap.sources import reopen_listed

log = logging.getLogger(__name__)

# rows compared at once: the bank of a large ID set is far larger than the memory
_CHUNK = 4096


@one_blas_thread()
def verify(
    run: Path, *, num_samples: int = VerifyConfig.samples, seed: int = VerifyConfig.seed
) -> list[str]:
    """Verify every checksum and the chain of fingerprints, and recompute a sample of targets.

    Args:
        run: The run directory.
        num_samples: Number of targets to recompute, in float64 against every ID image.
        seed: Random seed of the sample.

    Returns:
        One line per check.

    Raises:
        OodHeatmapError: A check failed; names the first one.
    """
    index_manifest = read_manifest(run, "index")
    # derived from the shards: it can be rebuilt
    lost = [] if (run / "index" / INDEX).is_file() else [INDEX]
    check_files(run, index_manifest, skip=lost)
    index = map_index(run, index_manifest)
    lines = [f"index: {len(index.manifest.files)} files unchanged"]
    _check_index_rows(index)
    earlier = [index.manifest]
    for stage in list(COMMANDS)[1:]:
        if not (run / stage / MANIFEST).is_file():
            lines.append(f"{stage}: not made yet")
            continue
        manifest = read_manifest(run, stage)
        for previous in earlier:
            if previous.stage in manifest.inputs:
                require_from(manifest, previous, run)
        check_files(run, manifest)
        lines.append(f"{stage}: {len(manifest.files)} files unchanged")
        if stage == "targets":
            targets = map_targets(run, manifest, index)
            _check_target_rows(index, targets)
            lines += _check_targets(index, targets, num_samples, seed)
        earlier.append(manifest)
    return lines


def _check_index_rows(index: Index) -> None:
    """Verify that the shards contain every row of the ID set once, except skipped ones.

    Raises:
        DamagedCacheError: A row is missing or duplicated.
    """
    row = index.columns["row"].read()
    num_images = index.manifest.inputs["images"]["num_images"]
    complete = len(row) + len(index.results.skipped) == num_images
    if not complete or (np.diff(row) <= 0).any() or row[0] < 0 or row[-1] >= num_images:
        raise DamagedCacheError(
            f"{index.run / 'index'} does not contain each row of its {num_images} images once."
        )


def _check_target_rows(index: Index, targets: Targets) -> None:
    """Verify that the shards contain every OOD row and patched image once and in order.

    Raises:
        DamagedCacheError: A row is missing, duplicated or out of order.
    """
    inputs, row = targets.manifest.inputs, targets.columns["row"].read()
    patched = targets.columns["patched"].read().astype(bool)
    options = inputs["options"]
    expected = draw_rows(inputs["images"]["num_images"], options["limit"], options["seed"])
    pasted = redraw_paste_plan(targets, index).row
    complete = (~patched).sum() + len(targets.results.skipped) == len(expected)
    in_order = np.array_equal(row[~patched], expected[np.isin(expected, row[~patched])])
    # an OOD image that was skipped as unreadable is not in a patched image either
    as_drawn = np.array_equal(row[patched], pasted[np.isin(pasted, row[~patched])])
    if not (complete and in_order and as_drawn):
        raise DamagedCacheError(
            f"{targets.run / 'targets'} does not contain each of the drawn rows once."
        )


def _check_targets(index: Index, targets: Targets, num_samples: int, seed: int) -> list[str]:
    """Recompute a sample of targets by brute force and compare; return one line per check."""
    patched = targets.columns["patched"].read().astype(bool)
    checks = {"paired": (~patched, _check_pairs), "pasted": (patched, _check_patched)}
    lines = []
    for verb, (selected, check) in checks.items():
        rows = np.flatnonzero(selected)
        sample = np.random.default_rng(seed).choice(rows, min(num_samples, len(rows)), False)
        if len(rows) or verb == "paired":
            check(index, targets, np.sort(sample))
            lines.append(f"targets: {len(sample)} of {len(rows)} {verb} again, all equal")
    if targets.is_averaged:
        size = targets.heatmap_size
        how = "from the images again, all equal"
        if _find_ood_set(targets) is None:
            how = f"only their bounds checked: {targets.results.source} was moved or has changed"
        lines.append(f"targets: averaged to {size} px, {how}")
    return lines


def _check_pairs(index: Index, targets: Targets, sample: NDArray[np.int64]) -> None:
    """Pair a sample of OOD images again, by brute force over every ID image.

    Raises:
        DamagedCacheError: A target differs; names its row.
    """
    prediction, row = index.columns["prediction"].read(), index.row
    stored = {name: rows.take(sample) for name, rows in targets.columns.items()}
    pairing = targets.results.pairing
    for i in range(len(sample)):
        name = f"row {stored['row'][i]} of {targets.run / 'targets'}"
        same_class = np.flatnonzero(prediction == stored["prediction"][i])
        in_class = len(same_class) > 0 and pairing in ("nearest", "random")
        searched = same_class if in_class else np.arange(len(row))
        if bool(stored["same_class"][i]) != bool(len(same_class)):
            raise DamagedCacheError(f"{name}: the stored same_class is wrong.")
        partner = stored["nearest"][i]
        squared = _squared_distances(stored["features"][i], index.columns["features"], searched)
        if pairing in ("nearest", "any"):
            nearest = row[searched[squared == squared.min()]].min()
            if partner != nearest:
                raise DamagedCacheError(
                    f"{name}: its nearest ID row is {nearest}, but {partner} is stored."
                )
        elif partner not in row[searched]:
            raise DamagedCacheError(f"{name}: its nearest ID row {partner} is of another class.")
        _check_distance(squared[row[searched] == partner], stored["distance"][i], name)
        nearest = index.columns["images"].take(index.positions(np.array([partner])))
        if targets.is_averaged:
            image = _read_ood_image(index, targets, int(stored["row"][i]))
            _check_averages(nearest, image, stored["heatmap"][i], name)
        elif not _is_image(nearest[0] - stored["heatmap"][i]):
            raise DamagedCacheError(f"{name}: nearest minus heatmap is not an image.")
        # an earlier version did not store it
        if PRESENCE in stored:
            message = f"{name}: its presence is not 255 everywhere"
            _check_presence(stored[PRESENCE][i], np.uint8(255), message)


def _check_averages(
    nearest: NDArray[np.uint8],
    image: NDArray[np.uint8] | None,
    stored: NDArray[np.uint8],
    name: str,
) -> None:
    """Average the difference to the nearest ID image again, and compare.

    Args:
        nearest: ``(1, 3, H, W)``, the nearest ID image.
        image: Same shape, the image itself; None if it is no longer there.
        stored: ``(2, 3, h, w)``, its target.
        name: Name of the target, for messages.

    Raises:
        DamagedCacheError: The target is not what the image gives, or what no image can give.
    """
    size = stored.shape[-1]
    if image is not None:
        if not np.array_equal(averaged_parts(nearest, image, size)[0], stored):
            raise DamagedCacheError(
                f"{name}: its heatmap is not the average of nearest minus image, or the image has "
                "changed since."
            )
        return
    # no image is darker than black or brighter than white
    bounds = [averaged_parts(nearest, np.full_like(nearest, value), size)[0] for value in (0, 255)]
    if (stored > np.maximum(*bounds)).any():
        raise DamagedCacheError(f"{name}: its heatmap is not an average of differences.")


def _squared_distances(
    query: NDArray[np.float32], features: Rows, rows: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return the squared distance of ``(D,)`` features to each of the rows, in float64."""
    chunks = [rows[start : start + _CHUNK] for start in range(0, len(rows), _CHUNK)]
    return np.concatenate([squared_distances(query, features.take(chunk)) for chunk in chunks])


def _check_patched(index: Index, targets: Targets, sample: NDArray[np.int64]) -> None:
    """Make a sample of patched images again, with OOD images reconstructed from paired targets.

    Raises:
        DamagedCacheError: A target differs; names its row.
    """
    columns, images = targets.columns, index.columns["images"]
    paste_plan = redraw_paste_plan(targets, index)
    paired = np.flatnonzero(columns["patched"].read() == 0)
    ood_rows = columns["row"].read()[paired]
    # an OOD image that was skipped as unreadable is not in a patched image either
    numbers = np.flatnonzero(np.isin(paste_plan.row, ood_rows))
    for row in sample:
        stored = {name: rows.take(np.array([row]))[0] for name, rows in columns.items()}
        name = f"patched row {row - len(paired)} of {targets.run / 'targets'}"
        number = numbers[row - len(paired)]
        position = paste_plan.position[number : number + 1]
        if stored["nearest"] != index.columns["row"].take(position)[0]:
            raise DamagedCacheError(f"{name}: it was pasted into another ID row.")
        id_image, patch = images.take(position), paste_plan.patch(int(number), index.size)
        if targets.is_averaged:
            image = _read_ood_image(index, targets, int(stored["row"]))
            pasted = None if image is None else patch.paste(id_image[0], image[0])[None]
            _check_averages(id_image, pasted, stored["heatmap"], name)
        else:
            source = paired[np.searchsorted(ood_rows, [stored["row"]])]
            nearest = images.take(index.positions(columns["nearest"].take(source)))
            ood_image = (nearest - columns["heatmap"].take(source)).astype(np.uint8)
            pasted = patch.paste(id_image[0], ood_image[0])[None]
            if not np.array_equal(difference(id_image, pasted)[0], stored["heatmap"]):
                raise DamagedCacheError(f"{name}: its heatmap is not the change made by the patch.")
        presence = paste_plan.presence(int(number), index.size, targets.heatmap_size)
        if PRESENCE in stored:
            message = f"{name}: its presence is not the opacity of the patch"
            _check_presence(stored[PRESENCE], presence, message)
        features = index.columns["features"].take(position)
        _check_distance(squared_distances(stored["features"], features), stored["distance"], name)


def _find_ood_set(targets: Targets) -> ImageSet | None:
    """Return the OOD training set, or None if it was moved or has changed."""
    return reopen_listed(targets.results.source, targets.manifest.inputs["images"]["listing"])


def _read_ood_image(index: Index, targets: Targets, row: int) -> NDArray[np.uint8] | None:
    """Return an OOD image at the input size, ``(1, 3, H, W)``; None if its set is not found."""
    images = _find_ood_set(targets)
    if images is None:
        return None
    pixels = apply_transform(
        index.classifier_config.transform, images.read(row)[0], images.names[row]
    )
    return pixels[None]


def _check_presence(
    stored: NDArray[np.uint8], wanted: NDArray[np.uint8] | np.uint8, message: str
) -> None:
    """Raise if a stored presence is not the wanted one."""
    if (stored != wanted).any():
        raise DamagedCacheError(f"{message}.")


def _check_distance(squared: NDArray[np.float64], stored: float, name: str) -> None:
    """Raise if a stored float32 distance is not the square root of a float64 one."""
    distance = float(np.sqrt(squared[0]))
    if not np.isclose(stored, distance, rtol=1e-6, atol=0):
        raise DamagedCacheError(
            f"{name}: its distance is {distance:.6g}, but {stored:.6g} is stored."
        )


def _is_image(image: np.ndarray[tuple[int, ...], np.dtype[np.int16]]) -> bool:
    """Return whether all values are valid uint8 pixels."""
    return bool((image >= 0).all() and (image <= 255).all())
