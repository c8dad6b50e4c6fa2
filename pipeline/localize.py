"""Measure localization on ID test images with pasted patches of OOD test images.

The heatmap is compared with controls that do not use the decoder, with sanity checks that must
lower its metrics, and on request with a network that is trained on the pixels. Patches of other ID
images show whether OOD content is found, or whatever does not belong into the image.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ood_heatmap import figures
from ood_heatmap.cache.files import to_json
from ood_heatmap.cache.manifest import Manifest, hash_json
from ood_heatmap.decoding import iter_batches
from ood_heatmap.devices import describe_environment, one_blas_thread
from ood_heatmap.errors import OodHeatmapError, StaleCacheError, UsageError
from ood_heatmap.images import ImageSet, Transform
from ood_heatmap.localization import localization_metrics, resampled_metrics
from ood_heatmap.patches import EDGES, SHAPES, SIDES, draw_patch, paste_all
from ood_heatmap.pipeline.ceiling import CEILING, train_ceiling
from ood_heatmap.pipeline.config import LocalizeConfig, result_options
from ood_heatmap.pipeline.localization_cells import Cell, draw_weights, iter_cells
from ood_heatmap.pipeline.localization_table import (
    LocalizationRow,
    compare_id_on_id,
    heatmap_leads,
    lowered_by_sanity_checks,
    mean_rows,
)
from ood_heatmap.pipeline.page import redraw_page
from ood_heatmap.pipeline.pixel_methods import (
    CENTRE,
    DISTANCE,
    NUM_IMAGES,
    NUM_LOCATIONS,
    SHUFFLED,
    SWAPPED,
    LocalizationMethods,
    PixelScores,
    make_localization_methods,
)
from ood_heatmap.pipeline.progress import Progress
from ood_heatmap.pipeline.results import LocalizationResults
from ood_heatmap.pipeline.run import open_decoder, open_index, open_targets
from ood_heatmap.pipeline.schedule import content_hash
from ood_heatmap.pipeline.scoring import HEATMAP, ID
from ood_heatmap.pipeline.stage import Stage, log_event, run_lock
from ood_heatmap.pipeline.tables import MEAN

log = logging.getLogger(__name__)
_UInt8 = NDArray[np.uint8]
_Int64 = NDArray[np.int64]
_Float64 = NDArray[np.float64]

_TABLE, _FIGURE = "localization.json", "figures/localization.png"
# pixels along a side that metrics are computed on, at most: of larger images every second, ...
_MAX_SIDE = 128


@one_blas_thread()
def localize(
    run: Path,
    id_images: ImageSet,
    ood_sets: Mapping[str, ImageSet],
    device: torch.device,
    config: LocalizeConfig,
    ceiling: ImageSet | None = None,
) -> Manifest:
    """Measure how well heatmaps locate OOD regions, and write a table and a figure.

    Args:
        run: A run directory with a trained decoder.
        id_images: The ID test set.
        ood_sets: OOD test sets by name.
        device: Device to compute on.
        config: Settings of the stage.
        ceiling: OOD training images, those of the run's targets: a network is trained on the pixels
            of its patched images, for comparison.

    Returns:
        The manifest; ``localization.json`` beside it holds the table.

    Raises:
        OodHeatmapError: Stale or damaged caches, unreadable images and so on.
    """
    taken = {ID, MEAN} & set(ood_sets)
    if taken:
        raise UsageError(f"an OOD set cannot be called {taken.pop()!r}: name it NAME=SOURCE.")
    with run_lock(run):
        index = open_index(run)
        trained = open_decoder(run, index.manifest, device)
        sets = {ID: id_images, **ood_sets}
        inputs = {
            "decoder": trained.manifest.fingerprint,
            "images": {name: images.describe() for name, images in sets.items()},
            "patches": {"sides": SIDES, "shapes": SHAPES, "edges": EDGES},
            "options": result_options(config),
        }
        if ceiling is not None:
            inputs["ceiling"] = ceiling.describe()
        environment = describe_environment(device, deterministic=False)
        stage = Stage(run, "localization", inputs, environment)
        transform = index.classifier_config.transform
        samples = {name: _read_sample(images, transform, config) for name, images in sets.items()}
        content = hash_json({name: sample.content for name, sample in samples.items()})
        complete = _resume_or_start(stage, content, config)
        if complete is not None:
            log.info("%s is already complete", stage.directory)
            redraw_page(run)
            return complete
        methods = make_localization_methods(index, trained.decoder, device, config)
        if ceiling is not None:
            targets = open_targets(run, index)
            methods.trained[CEILING] = train_ceiling(stage, index, targets, ceiling, device, config)
        cells, examples = _measure(samples, methods, config)
        table = mean_rows(cells, list(ood_sets))
        with stage.writing(_TABLE) as scratch:
            scratch.write_bytes(to_json(_localization_json(table, sets, samples, config)))
        with stage.writing(_FIGURE) as scratch:
            color_max = trained.results.color_max
            scratch.write_bytes(figures.to_png(_plot_examples(examples, color_max)))
        log_event(run, "localize", cells=len(cells), device=str(device))
        results = LocalizationResults(lowered_pixel_auroc=_check_sanity(table))
        manifest = stage.commit(results, [_TABLE, _FIGURE], content=content)
        redraw_page(run)
        return manifest


def _resume_or_start(stage: Stage, content: str, config: LocalizeConfig) -> Manifest | None:
    """Return the manifest of a complete stage.

    Args:
        stage: The stage.
        content: Hash of the current images.
        config: Settings of the stage.

    Raises:
        StaleCacheError: The images have changed since.
    """
    complete = stage.resume_or_start(overwrite=config.overwrite)
    if complete is None or complete.content == content:
        return complete
    if not config.overwrite:
        raise StaleCacheError(
            f"{stage.directory} was made from other images (images.content differs). "
            "Add --overwrite to rebuild this stage."
        )
    stage.discard()
    return stage.resume_or_start(overwrite=False)


@dataclass(frozen=True)
class _Sample:
    """Some images of a set at the input size, in random order.

    Args:
        pixels: ``(B, 3, H, W)`` uint8.
        label: ``(B,)`` int32, -1 where unknown.
        content: sha256 of the images' bytes.
    """

    pixels: _UInt8
    label: NDArray[np.int32]
    content: str


def _read_sample(images: ImageSet, transform: Transform, config: LocalizeConfig) -> _Sample:
    """Read a seeded sample of a set, or all of it if it is smaller.

    Raises:
        OodHeatmapError: No image of it is readable.
    """
    generator = np.random.default_rng(config.seed)
    count = min(config.count, len(images))
    rows = np.sort(generator.choice(len(images), count, replace=False))
    size = config.batch_size
    batches = list(
        iter_batches(
            images,
            [rows[start : start + size] for start in range(0, count, size)],
            transform,
            workers=config.num_workers,
            skip_unreadable=config.skip_unreadable,
        )
    )
    pixels = np.concatenate([batch.pixels for batch in batches])
    if not len(pixels):
        raise OodHeatmapError(f"none of {count} images of {images.source} is readable.")
    label = images.labels[np.concatenate([batch.rows for batch in batches])]
    # sets are ordered by class: otherwise the same classes would always be paired
    order = generator.permutation(len(pixels))
    content = content_hash(b"".join(batch.digests for batch in batches))
    return _Sample(pixels[order], label[order], content)


def _draw_partners(sample: _Sample, methods: LocalizationMethods, seed: int) -> _Int64:
    """Draw another ID image of another class for each ID image.

    Classes are the labels, or predictions if a label is unknown.

    Returns:
        ``(B,)``; empty if all images are of one class.
    """
    classes = sample.label if (sample.label >= 0).all() else methods.predict(sample.pixels)
    if (classes == classes[0]).all():
        return np.empty(0, np.int64)
    generator = np.random.default_rng(seed)
    return np.array([generator.choice(np.flatnonzero(classes != one)) for one in classes])


@dataclass(frozen=True)
class _Example:
    """One row of the figure: an image, the mask of its patch, and the scores of each method."""

    title: str
    image: _UInt8
    mask: NDArray[np.bool_]
    pixel_scores: PixelScores


def _measure(
    samples: Mapping[str, _Sample], methods: LocalizationMethods, config: LocalizeConfig
) -> tuple[list[LocalizationRow], list[_Example]]:
    """Return the metrics of every set and kind of patch, and an example of each set and shape.

    ID images and patches are the same for all sets; only the pasted images differ. All methods,
    sets and kinds share the resampled images.
    """
    id_pixels = samples[ID].pixels
    pasted = {name: sample.pixels for name, sample in samples.items() if name != ID}
    partners = _draw_partners(samples[ID], methods, config.seed)
    if len(partners):
        pasted[ID] = id_pixels[partners]
    counts = {name: min(len(id_pixels), len(pixels)) for name, pixels in pasted.items()}
    cells = {name: list(iter_cells(count)) for name, count in counts.items()}
    total = sum(len(cell.rows) for of_set in cells.values() for cell in of_set)
    progress = Progress(total, "localize")
    rows: list[LocalizationRow] = []
    examples: list[_Example] = []
    for name, of_set in cells.items():
        weights = draw_weights(counts[name], config.resamples, config.seed)
        for cell in of_set:
            pair = id_pixels[cell.rows], pasted[name][cell.rows]
            size = id_pixels.shape[-1]
            patches = [draw_patch(size, config.seed, row, cell.kinds) for row in cell.rows.tolist()]
            images, masks = paste_all(*pair, patches)
            first, pixel_scores = _score(methods, images, config.batch_size)
            rows += _measure_cell(name, cell, masks, pixel_scores, weights[:, cell.rows])
            if cell.is_example:
                title = f"{'other ID' if name == ID else name}, {cell.edges}"
                examples.append(_Example(title, images[0], masks[0], first))
            progress.update(len(cell.rows))
    progress.close()
    return rows, examples


def _score(
    methods: LocalizationMethods, images: _UInt8, batch_size: int
) -> tuple[PixelScores, PixelScores]:
    """Return the pixel scores of the first image, and those of all images on the grid."""
    grid = _grid(images.shape[-1])
    first: PixelScores = {}
    parts: list[PixelScores] = []
    for start in range(0, len(images), batch_size):
        found = methods(images[start : start + batch_size])
        first = first or {method: item[0].copy() for method, item in found.items()}
        # copies: a view would keep the scores of all pixels
        parts.append({method: np.ascontiguousarray(item[grid]) for method, item in found.items()})
    return first, {method: np.concatenate([part[method] for part in parts]) for method in first}


def _grid(size: int) -> tuple[slice, slice, slice]:
    """Return the pixels of images that metrics are computed on."""
    step = -(-size // _MAX_SIDE)
    return np.s_[:, step // 2 :: step, step // 2 :: step]


def _measure_cell(
    name: str,
    cell: Cell,
    masks: NDArray[np.bool_],
    pixel_scores: PixelScores,
    weights: _Float64,
) -> Iterator[LocalizationRow]:
    """Yield the metrics of each method for one set and kind of patch."""
    masks = masks[_grid(masks.shape[-1])]
    for method, scores in pixel_scores.items():
        metrics = asdict(localization_metrics(scores, masks))
        resampled = resampled_metrics(scores, masks, weights)
        yield LocalizationRow(method, name, *cell.kind, metrics, resampled)


def _check_sanity(table: Sequence[LocalizationRow]) -> dict[str, float]:
    """Return the decrease of the pixel AUROC in each sanity check; warn if there is none."""
    lowered = lowered_by_sanity_checks(table)
    for method, decrease in lowered.items():
        if decrease <= 0:
            log.warning(
                "%s does not lower the heatmap's pixel AUROC: the heatmap does not depend on it",
                method,
            )
    return lowered


def _localization_json(
    table: Sequence[LocalizationRow],
    sets: Mapping[str, ImageSet],
    samples: Mapping[str, _Sample],
    config: LocalizeConfig,
) -> dict[str, Any]:
    """Return the content of ``localization.json``."""
    return {
        "about": "Patches of OOD images, and of other ID images of another class (set id), in ID "
        "images; side: of the square with as many pixels, as a share of the image's. pixel_auroc "
        "over all pixels of a set and kind of patch (0.5 by chance); shuffled_auroc: background "
        "only where other images have their patch, weighted so that scores that depend on the "
        "location only have 0.5; aupro: per-region overlap up to a false positive rate of 0.3 "
        "(0.15 by chance); pointing: the highest pixel score lies in the patch. A mean is over OOD "
        "sets, sides, shapes or edges, of each combination. Shares in [0, 1]; intervals: bootstrap "
        "over images, 95 %, percentiles. leads: metric of the heatmap minus that of the other "
        "method, overall means. id_on_id: OOD patches compared with those of other ID images. "
        f"{DISTANCE}: Euclidean, to the nearest of at most {NUM_LOCATIONS} locations in "
        f"{NUM_IMAGES} ID training images, in the deepest feature map.",
        "count": config.count,
        "seed": config.seed,
        "resamples": config.resamples,
        "sets": {
            name: {
                "source": images.source,
                "num_images": len(samples[name].pixels),
                "content": samples[name].content,
            }
            for name, images in sets.items()
        },
        "table": [row.to_json() for row in table],
        "leads": heatmap_leads(table),
        "id_on_id": compare_id_on_id(table),
    }


def _plot_examples(examples: Sequence[_Example], color_max: float) -> Figure:
    """Plot image, patch outline, heatmap and controls; heatmaps share a colour scale."""
    methods = list(examples[0].pixel_scores)
    figure = Figure(figsize=(1.5 * (len(methods) + 1), 1.55 * len(examples)), layout="constrained")
    shape = len(examples), len(methods) + 1
    panels = np.atleast_2d(figure.subplots(*shape, subplot_kw=figures.NO_TICKS))
    top = {
        method: color_max
        if method in (HEATMAP, SHUFFLED, SWAPPED)
        else max(float(example.pixel_scores[method].max()) for example in examples)
        for method in methods
    }
    for line, example in zip(panels, examples, strict=True):
        line[0].imshow(example.image.transpose(1, 2, 0))
        line[0].set_title(example.title, fontsize=7)
        for axes, method in zip(line[1:], methods, strict=True):
            low = float(example.pixel_scores[method].min()) if method == CENTRE else 0
            axes.imshow(
                example.pixel_scores[method], cmap=figures.COLORMAP, vmin=low, vmax=top[method]
            )
            axes.set_title(method, fontsize=7)
        for axes in line:
            axes.set_axis_off()
            _outline(axes, example.mask)
    return figure


def _outline(axes: Any, mask: NDArray[np.bool_]) -> None:
    """Draw the outline of a patch."""
    for color, width in (("white", 1.8), ("tab:green", 0.9)):
        axes.contour(
            np.pad(mask, 1),
            levels=[0.5],
            colors=color,
            linewidths=width,
            origin=None,
            extent=(-1, mask.shape[1], -1, mask.shape[0]),
        )
