"""Does the heatmap know where? Patches of OOD test images in ID test images, at known places.

Beside the heatmap: controls that know nothing of the decoder, and sanity checks that must lower
its figures.
"""

import contextlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from ood_heatmap import figures
from ood_heatmap.cache.files import locked, write_json
from ood_heatmap.cache.manifest import Manifest, Stage, fingerprint_of
from ood_heatmap.cache.neighbours import Bank, mean_distance_to_kth
from ood_heatmap.classifier import Classifier, Output
from ood_heatmap.decoder import Decoder
from ood_heatmap.errors import OodHeatmapError, UsageError
from ood_heatmap.heatmap import strength
from ood_heatmap.images import ImageSet, Transform, batches
from ood_heatmap.localization import METRICS, localization_metrics, resampled_metrics
from ood_heatmap.metrics import bootstrap_weights, intervals
from ood_heatmap.patches import EDGES, SIDES, draw_patch, paste_all
from ood_heatmap.pipeline.config import LocalizeConfig
from ood_heatmap.pipeline.forward import Forward
from ood_heatmap.pipeline.log import log_event
from ood_heatmap.pipeline.run import Index, open_decoder, open_index
from ood_heatmap.pipeline.shares import content_of
from ood_heatmap.pipeline.table import aligned, margin

log = logging.getLogger(__name__)
UInt8 = NDArray[np.uint8]
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Strengths = dict[str, Float32]  # method to (B, H, W), larger is more OOD

ID, HEATMAP = "id", "heatmap"
CENTRE, DIFFERENCE, DISTANCE = "centre prior", "nearest difference", "feature distance"
SHUFFLED, SWAPPED = "shuffled weights", "swapped class"
MEAN = "mean"
METRIC_HEADS = ("AUROC", "AUPRO", "pointing")
NUM_IMAGES, NUM_LOCATIONS = 2_000, 20_000  # of the ID set, for the feature distance


def localize(
    run: Path,
    id_images: ImageSet,
    ood_sets: Mapping[str, ImageSet],
    device: torch.device,
    config: LocalizeConfig,
) -> Manifest:
    """Measure where the heatmap is right, and write numbers and a picture.

    Args:
        run: A run directory with a trained decoder.
        id_images: The ID test set.
        ood_sets: OOD test sets by name.
        device: Where to compute.
        config: Settings.

    Returns:
        The manifest; ``localization.json`` beside it holds the table.

    Raises:
        OodHeatmapError: Stale or damaged caches, unreadable images and so on.
    """
    taken = {ID, MEAN} & set(ood_sets)
    if taken:
        raise UsageError(f"an OOD set cannot be called {taken.pop()!r}: name it NAME=SOURCE.")
    with locked(run):
        index = open_index(run)
        trained = open_decoder(run, index.manifest, device)
        sets = {ID: id_images, **ood_sets}
        inputs = {
            "decoder": trained.manifest.fingerprint,
            "images": {name: images.describe() for name, images in sets.items()},
            "options": {
                "count": config.count,
                "seed": config.seed,
                "resamples": config.resamples,
                "skip_unreadable": config.skip_unreadable,
            },
        }
        stage = Stage(run, "localization", inputs)
        finished = stage.begin(overwrite=config.overwrite)
        if finished is not None:
            log.info("%s is finished already", stage.directory)
            return finished
        judge = make_judge(index, trained.decoder, device, config)
        samples = {
            name: read_sample(images, judge.forward.classifier.config.transform, config)
            for name, images in sets.items()
        }
        cells, examples = measure(samples, judge, config)
        table = with_means(cells, list(ood_sets))
        write_json(stage.directory / "localization.json", report(table, sets, samples, config))
        (stage.directory / "figures").mkdir(exist_ok=True)
        color_max = trained.manifest.results["color_max"]
        picture = "figures/localization.png"
        figures.save(sheet(examples, color_max), stage.directory / picture)
        log_event(run, "localize", cells=len(cells), device=str(device))
        content = fingerprint_of({name: sample.content for name, sample in samples.items()})
        return stage.finish(content, sanity(table), ["localization.json", picture])


@dataclass(frozen=True)
class Sample:
    """Some images of a set at the input size, in random order.

    Args:
        pixels: ``(B, 3, H, W)`` uint8.
        content: sha256 of the images' bytes.
    """

    pixels: UInt8
    content: str


def read_sample(images: ImageSet, transform: Transform, config: LocalizeConfig) -> Sample:
    """Return a seeded sample of a set; all of it when it is smaller.

    Raises:
        OodHeatmapError: None of it is readable.
    """
    generator = np.random.default_rng(config.seed)
    count = min(config.count, len(images))
    rows = np.sort(generator.choice(len(images), count, replace=False))
    pieces = [rows[at : at + config.batch_size] for at in range(0, count, config.batch_size)]
    taken = list(
        batches(
            images,
            pieces,
            transform,
            workers=config.workers,
            skip_unreadable=config.skip_unreadable,
        )
    )
    pixels = np.concatenate([batch.pixels for batch in taken])
    if not len(pixels):
        raise OodHeatmapError(f"none of {count} images of {images.source} is readable.")
    # sets lie class by class: without this the same classes would always meet
    order = generator.permutation(len(pixels))
    return Sample(pixels[order], content_of(b"".join(batch.digests for batch in taken)))


@dataclass(frozen=True)
class Judge:
    """The heatmap, its controls and its sanity checks.

    Args:
        index: Finished, for the nearest ID images.
        bank: Its features.
        decoder: Trained, in eval mode.
        forward: The classifier; returns one feature map at least, where its network has any.
        shuffled: The same with the elements of each weight in random order.
        locations: ``(M, C)`` features of places in ID training images; None without feature maps.
        batch_size: Images the decoder takes at once.
    """

    index: Index
    bank: Bank
    decoder: Decoder
    forward: Forward
    shuffled: Forward
    locations: Float32 | None
    batch_size: int

    def __call__(self, pixels: UInt8) -> Strengths:
        """Return how OOD each pixel is, for each method."""
        output = self.forward(pixels)
        prediction = output.logits.argmax(dim=1)
        strengths = {
            HEATMAP: self.heatmap(output, prediction),
            CENTRE: np.broadcast_to(centre_prior(pixels.shape[-1]), pixels[:, 0].shape),
            DIFFERENCE: self.difference(pixels, output, prediction),
        }
        if self.locations is not None:
            strengths[DISTANCE] = self.distance(output.maps[0], pixels.shape[-1])
        blind = self.shuffled(pixels)
        strengths[SHUFFLED] = self.heatmap(blind, blind.logits.argmax(dim=1))
        swapped = (prediction + 1) % self.forward.classifier.num_classes
        return {**strengths, SWAPPED: self.heatmap(output, swapped)}

    @torch.inference_mode()
    def heatmap(self, output: Output, prediction: Tensor) -> Float32:
        """Return the decoder's heatmaps, ``(B, H, W)``."""
        device, parts = self.forward.classifier.device, []
        maps = output.maps[: len(self.decoder.config.map_shapes)]
        for start in range(0, len(prediction), self.batch_size):
            rows = slice(start, start + self.batch_size)
            heatmap = self.decoder(
                output.features[rows].to(device),
                prediction[rows].to(device),
                [item[rows].to(device).float() for item in maps],
            )
            parts.append(strength(heatmap).cpu())
        # shuffled weights may blow up to infinity: such a heatmap says nothing
        found: Float32 = torch.cat(parts).nan_to_num(0.0).numpy()
        return found

    def difference(self, pixels: UInt8, output: Output, prediction: Tensor) -> Float32:
        """Return the absolute difference to the nearest ID image of the predicted class."""
        found = self.bank.nearest(output.features.numpy(), prediction.numpy())
        nearest = self.index.columns["images"].take(self.index.positions(found.row))
        change: Float32 = np.abs(nearest.astype(np.float32) - pixels).max(axis=1)
        return change

    def distance(self, maps: Tensor, size: int) -> Float32:
        """Return each place's distance to the nearest of the ID places, ``(B, size, size)``.

        Source: after Roth et al., Towards Total Recall in Industrial Anomaly Detection, CVPR 2022.
        """
        assert self.locations is not None
        centre = self.locations.mean(axis=0)  # FAISS loses digits far from the origin
        queries = np.ascontiguousarray(places_of(maps).reshape(-1, maps.shape[1]) - centre)
        distance = mean_distance_to_kth(queries, self.locations - centre, k=1)
        coarse = torch.from_numpy(distance).view(len(maps), 1, *maps.shape[2:])
        fine: Float32 = interpolate(coarse, (size, size), mode="bilinear")[:, 0].numpy()
        return fine


def make_judge(
    index: Index, decoder: Decoder, device: torch.device, config: LocalizeConfig
) -> Judge:
    """Return all that is compared; the ID places are drawn and the weights shuffled by the seed."""
    num_maps = len(decoder.config.map_shapes)
    classifier = index.classifier(device, num_maps)
    if not num_maps:
        # one for the control, unless the network has none
        with contextlib.suppress(OodHeatmapError):
            classifier = index.classifier(device, 1)
    shuffled = index.classifier(device, num_maps)
    shuffle_weights(shuffled, config.seed)
    forward = Forward(classifier, config.batch_size)
    return Judge(
        index,
        index.bank(device),
        decoder,
        forward,
        Forward(shuffled, config.batch_size),
        draw_locations(index, forward, config) if classifier.map_names else None,
        config.batch_size,
    )


def shuffle_weights(classifier: Classifier, seed: int) -> None:
    """Put the elements of each of a classifier's weights in random order.

    Source: after Adebayo et al., Sanity Checks for Saliency Maps, NeurIPS 2018.
    """
    generator = torch.Generator().manual_seed(seed)
    for weight in classifier.network.parameters():
        order = torch.randperm(weight.numel(), generator=generator).to(weight.device)
        weight.data.copy_(weight.data.flatten()[order].view(weight.shape))


def places_of(maps: Tensor) -> Float32:
    """Return the features of each place, ``(B, h w, C)`` float32, of maps ``(B, C, h, w)``."""
    places: Float32 = maps.float().flatten(2).transpose(1, 2).contiguous().numpy()
    return places


def draw_locations(index: Index, forward: Forward, config: LocalizeConfig) -> Float32:
    """Return features of random places in random ID training images, of the deepest map.

    Returns:
        ``(M, C)`` float32, M at most ``NUM_LOCATIONS``.
    """
    generator = np.random.default_rng(config.seed)
    num_id = len(index.columns["row"])
    rows = np.sort(generator.choice(num_id, min(num_id, NUM_IMAGES), replace=False))
    parts = []
    for start in range(0, len(rows), config.batch_size):
        images = index.columns["images"].take(rows[start : start + config.batch_size])
        places = places_of(forward(images).maps[0])
        order = generator.permuted(np.tile(np.arange(places.shape[1]), (len(places), 1)), axis=1)
        chosen = order[:, : max(1, NUM_LOCATIONS // len(rows)), None]
        parts.append(np.take_along_axis(places, chosen, axis=1).reshape(-1, places.shape[2]))
    return np.concatenate(parts)


def centre_prior(size: int) -> Float32:
    """Return a guess that looks at no image: the nearer to the centre the stronger."""
    offset = np.arange(size) - (size - 1) / 2
    prior: Float32 = -np.hypot(offset[:, None], offset).astype(np.float32)
    return prior


@dataclass(frozen=True)
class Row:
    """One line of the table: a method on a set, for patches of one size and kind, or a mean.

    Args:
        method: What was measured.
        set: Name of the OOD set, or ``mean``.
        side: The patch's side as a share of the image's, or ``mean``.
        edges: ``hard``, ``blended`` or ``mean``.
        figures: Metric to share in [0, 1].
        resampled: The same of resampled images, ``(R, METRICS)``; of a mean the mean.
    """

    method: str
    set: str
    side: float | str
    edges: str
    figures: Mapping[str, float]
    resampled: Float64

    def to_json(self) -> dict[str, Any]:
        """Return the row for ``localization.json``, with 95 % intervals."""
        where = {key: getattr(self, key) for key in ("method", "set", "side", "edges")}
        return {**where, **self.figures, "intervals": intervals(METRICS, self.resampled)}


@dataclass(frozen=True)
class Example:
    """One line of the picture: an image, where its patch is, and what each method says of it."""

    title: str
    image: UInt8
    mask: NDArray[np.bool_]
    strengths: Strengths


def measure(
    samples: Mapping[str, Sample], judge: Judge, config: LocalizeConfig
) -> tuple[list[Row], list[Example]]:
    """Return the figures of every set, size and kind of edges, and an image of each set and size.

    The same ID images, places and sizes in all of them; what is pasted differs. Resampled, an
    image that is drawn is drawn for all methods, sizes and edges.
    """
    rows, examples = [], []
    for (name, sample), side, edges in product(samples.items(), SIDES, EDGES):
        if name == ID:
            continue
        count = min(len(samples[ID].pixels), len(sample.pixels))
        size = sample.pixels.shape[-1]
        patches = [draw_patch(size, config.seed, row, (side,), (edges,)) for row in range(count)]
        images, masks = paste_all(samples[ID].pixels[:count], sample.pixels[:count], patches)
        strengths = judge(images)
        weights = bootstrap_weights(count, config.resamples, np.random.default_rng(config.seed))
        for method, values in strengths.items():
            figures = asdict(localization_metrics(values, masks))
            resampled = resampled_metrics(values, masks, weights)
            rows.append(Row(method, name, side, edges, figures, resampled))
        # hard and blended in turn, another image each time
        number = SIDES.index(side)
        if edges == EDGES[number % len(EDGES)]:
            at = number % count
            own = {method: values[at] for method, values in strengths.items()}
            examples.append(Example(f"{name}, {edges}", images[at], masks[at], own))
    return rows, examples


def with_means(cells: Sequence[Row], names: Sequence[str]) -> list[Row]:
    """Return the rows with their means over sets, sizes, edges and every combination of these."""
    methods = list(dict.fromkeys(row.method for row in cells))
    sides: list[float | str] = [*SIDES, MEAN]
    table = []
    for method, name, side, edges in product(methods, [*names, MEAN], sides, [*EDGES, MEAN]):
        mine = [
            row
            for row in cells
            if row.method == method
            and name in (row.set, MEAN)
            and side in (row.side, MEAN)
            and edges in (row.edges, MEAN)
        ]
        means = {key: float(np.mean([row.figures[key] for row in mine])) for key in METRICS}
        resampled = np.mean([row.resampled for row in mine], axis=0)
        table.append(Row(method, name, side, edges, means, resampled))
    return table


def overall(table: Sequence[Row], method: str) -> Row:
    """Return the means of a method over everything."""
    everything = (method, MEAN, MEAN, MEAN)
    return next(row for row in table if (row.method, row.set, row.side, row.edges) == everything)


def leads(table: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Return by how much the heatmap is ahead of each other method, with 95 % intervals.

    Of the means over everything. The same images were drawn for both, so the interval of the
    difference is narrower than the two beside each other suggest.
    """
    own, found = overall(table, HEATMAP), {}
    for method in dict.fromkeys(row.method for row in table if row.method != HEATMAP):
        other = overall(table, method)
        found[method] = {
            **{key: own.figures[key] - other.figures[key] for key in METRICS},
            "intervals": intervals(METRICS, own.resampled - other.resampled),
        }
    return found


def sanity(table: Sequence[Row]) -> dict[str, Any]:
    """Return by how much each sanity check lowers the overall pixel AUROC.

    It is said when one does not.
    """
    own = overall(table, HEATMAP).figures["pixel_auroc"]
    lowered = {
        method: own - overall(table, method).figures["pixel_auroc"]
        for method in (SHUFFLED, SWAPPED)
    }
    for method, by in lowered.items():
        if by <= 0:
            log.warning(
                "%s does not lower the heatmap's pixel AUROC: what it shows of places does not "
                "come from there",
                method,
            )
    return {"lowered_pixel_auroc": lowered}


def report(
    table: Sequence[Row],
    sets: Mapping[str, ImageSet],
    samples: Mapping[str, Sample],
    config: LocalizeConfig,
) -> dict[str, Any]:
    """Return the content of ``localization.json``."""
    return {
        "about": "Patches of OOD images in ID images; side: of the patch, as a share of the "
        "image's. pixel_auroc over all pixels of a set, size and kind of edges (0.5 by chance); "
        "aupro: per-region overlap up to a false positive rate of 0.3 (0.15 by chance); pointing: "
        "the strongest pixel lies in the patch. A mean is over sets, sizes or edges. Shares in "
        "[0, 1]; intervals: bootstrap over images, 95 %, percentiles. leads: the heatmap's figure "
        "less that of the other, means over everything. "
        f"{DISTANCE}: to the nearest of at most {NUM_LOCATIONS} places in {NUM_IMAGES} ID "
        "training images, Euclidean, in the deepest feature map.",
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
        "leads": leads(table),
    }


def sheet(examples: Sequence[Example], color_max: float) -> Figure:
    """Return image, patch outline, heatmap and controls; heatmaps on the one colour scale."""
    methods = list(examples[0].strengths)
    figure = Figure(figsize=(1.5 * (len(methods) + 1), 1.55 * len(examples)), layout="constrained")
    panels = np.atleast_2d(figure.subplots(len(examples), len(methods) + 1))
    top = {
        method: color_max
        if method in (HEATMAP, SHUFFLED, SWAPPED)
        else max(float(example.strengths[method].max()) for example in examples)
        for method in methods
    }
    for line, example in zip(panels, examples, strict=True):
        line[0].imshow(example.image.transpose(1, 2, 0))
        line[0].set_title(example.title, fontsize=7)
        for axes, method in zip(line[1:], methods, strict=True):
            low = float(example.strengths[method].min()) if method == CENTRE else 0
            axes.imshow(example.strengths[method], cmap=figures.COLORS, vmin=low, vmax=top[method])
            axes.set_title(method, fontsize=7)
        for axes in line:
            axes.set_axis_off()
            outline(axes, example.mask)
    return figure


def outline(axes: Any, mask: NDArray[np.bool_]) -> None:
    """Draw a line around the patch."""
    down, right = np.nonzero(mask)
    left, top = right.min() - 0.5, down.min() - 0.5
    side = down.max() - down.min() + 1
    xs, ys = np.array([0, 1, 1, 0, 0]) * side + left, np.array([0, 0, 1, 1, 0]) * side + top
    axes.plot(xs, ys, color="white", linewidth=1.8)
    axes.plot(xs, ys, color="tab:green", linewidth=0.9)


def format_table(content: Mapping[str, Any]) -> str:
    """Return ``localization.json`` as the table of the terminal, in percent, with intervals."""
    figures_of = {
        (row["method"], row["set"], row["side"]): row
        for row in content["table"]
        if row["edges"] == MEAN
    }
    pairs = dict.fromkeys((method, name) for method, name, _ in figures_of)
    heads = ["method", "set", *(f"AUROC {100 * side:g} %" for side in SIDES)]
    lines = [[*heads, *METRIC_HEADS]]
    for method, name in sorted(pairs, key=lambda pair: pair[1] == MEAN):
        by_side = [figures_of[method, name, side]["pixel_auroc"] for side in SIDES]
        whole = figures_of[method, name, MEAN]
        lines.append(
            [
                method,
                name,
                *(f"{100 * share:.1f}" for share in by_side),
                *(f"{100 * whole[key]:.1f} {margin(whole, key, 1)}" for key in METRICS),
            ]
        )
    ahead = [["heatmap ahead of", "", *METRIC_HEADS]]
    for method, lead in content["leads"].items():
        figures = (f"{100 * lead[key]:+.1f} {margin(lead, key, 1)}" for key in METRICS)
        ahead.append([method, "", *figures])
    return f"{aligned(lines)}\n\n{aligned(ahead)}"
