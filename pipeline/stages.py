"""The four stages for Python: paths, names and networks in, typed results out.

What a stage does is in its own module; here its image sets, classifier and device are opened, as
the command line does.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias, TypeVar

import torch
from torch import nn

from ood_heatmap.classifier import Classifier, ClassifierConfig, load_classifier
from ood_heatmap.devices import choose_device
from ood_heatmap.distributed import main_process_first, process_group
from ood_heatmap.errors import UsageError
from ood_heatmap.images import ClassOrder, ImageSet
from ood_heatmap.in_memory import copy_network, passing_network, remember_network, spec_of
from ood_heatmap.pipeline import evaluate as evaluate_module
from ood_heatmap.pipeline import index as index_module
from ood_heatmap.pipeline import targets as targets_module
from ood_heatmap.pipeline.config import (
    ClassifierOptions,
    DataOptions,
    EvaluateConfig,
    IndexConfig,
    Rgb,
    TargetsConfig,
    TrainConfig,
)
from ood_heatmap.pipeline.inputs import open_sources, split_named_source
from ood_heatmap.pipeline.results import (
    DecoderResults,
    EvaluationResults,
    IndexResults,
    Results,
    TargetsResults,
)
from ood_heatmap.pipeline.train import train_decoder
from ood_heatmap.presets import Preset, TransformLike, read_preset
from ood_heatmap.user_code import trusting_code

log = logging.getLogger(__name__)
_ResultsT = TypeVar("_ResultsT", bound=Results)

# a path or name as on the command line, several of them, or an opened set
Source: TypeAlias = str | Path | ImageSet
Sources: TypeAlias = Source | Sequence[Source]


def build_index(
    run: str | Path,
    images: Sources,
    *,
    network: nn.Module | str,
    transform: TransformLike = None,
    weights: str | Path | None = None,
    num_classes: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    head: str = ClassifierOptions.head,
    feature_maps: int = ClassifierOptions.feature_maps,
    autocast: bool = ClassifierOptions.autocast,
    class_order: ClassOrder = "name",
    device: str = "auto",
    config: IndexConfig = IndexConfig(),  # noqa: B008
    data: DataOptions = DataOptions(),  # noqa: B008
) -> IndexResults:
    """Run stage 1: embed the ID training set with a classifier, and index it.

    Args:
        run: The run directory; created if missing.
        images: The ID training set: a folder with a folder for each class, or any other source,
            or several.
        network: The classifier: a module that maps normalized images to logits, or the name of one
            as for ``--classifier``. A module is copied; later processes need it again, also
            ``HeatmapDetector.load``.
        transform: What the classifier was validated with, without augmentation: the side of its
            input in pixels, a ``Transform``, or one of torchvision or timm, whose normalization
            counts as well.
        weights: File with the weights; the network's own if None.
        num_classes: Number of classes; the network's own if None.
        mean: Mean of each channel, for pixels in [0, 1]; that of the transform if None.
        std: Standard deviation of each channel; that of the transform if None.
        head: Name of the last linear layer; detected if "".
        feature_maps: Number of the classifier's spatial feature maps to cache.
        autocast: Run the network in bfloat16.
        class_order: Order in which class folders are numbered, which must be the classifier's.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        config: Settings of the stage.
        data: Where data sets of torchvision are found.

    Raises:
        OodHeatmapError: As ``ood-heatmap index``.
    """
    options = ClassifierOptions(
        spec=network if isinstance(network, str) else spec_of(network),
        weights=None if weights is None else Path(weights),
        num_classes=num_classes,
        mean=_to_rgb(mean),
        std=_to_rgb(std),
        head=head,
        feature_maps=feature_maps,
        autocast=autocast,
    )
    preset = None if transform is None else read_preset(transform)
    with _stage_device(device) as torch_device:
        with main_process_first():
            if isinstance(network, str):
                classifier = _load(options, preset)
            else:
                classifier = _wrap(network, options, preset)
        opened = _open(images, data, class_order, need_labels=not config.ignore_labels)
        classifier.to(torch_device)
        manifest = index_module.build_index(Path(run), opened, classifier, config)
    return _conclude(IndexResults.from_manifest(manifest))


def _load(options: ClassifierOptions, preset: Preset | None) -> Classifier:
    """Load a network that is named."""
    return load_classifier(
        options.spec,
        weights=options.weights,
        num_classes=options.num_classes,
        mean=options.mean or (preset.mean if preset else None),
        std=options.std or (preset.std if preset else None),
        transform=preset.transform if preset else None,
        head=options.head,
        num_maps=options.feature_maps,
        autocast=options.autocast,
    )


def _wrap(network: nn.Module, options: ClassifierOptions, preset: Preset | None) -> Classifier:
    """Make a classifier of a copy of a network in memory."""
    if options.weights is not None:
        raise UsageError("weights= is for a network that is named: load them into this one.")
    if preset is None:
        raise UsageError(
            "the input size is not known: pass transform=, the side in pixels or the transform "
            "that the network was validated with."
        )
    config = ClassifierConfig(
        options.spec,
        options.num_classes,
        preset.transform,
        options.mean or preset.mean or (0.0, 0.0, 0.0),
        options.std or preset.std or (1.0, 1.0, 1.0),
        options.head,
        options.feature_maps,
        options.autocast,
    )
    classifier = Classifier(copy_network(network), config)
    if options.num_classes not in (None, classifier.num_classes):
        raise UsageError(
            f"the network has {classifier.num_classes} classes, not {options.num_classes}."
        )
    remember_network(network, classifier.fingerprint()["weights"])
    return classifier


def _to_rgb(values: Sequence[float] | None) -> Rgb | None:
    """Return the three values of a mean or std."""
    if values is None:
        return None
    if len(values) != 3:
        raise UsageError(f"mean and std must have three numbers each, got {list(values)}.")
    red, green, blue = map(float, values)
    return red, green, blue


def build_targets(
    run: str | Path,
    images: Sources,
    *,
    network: nn.Module | None = None,
    device: str = "auto",
    trust_code: bool = False,
    config: TargetsConfig = TargetsConfig(),  # noqa: B008
    data: DataOptions = DataOptions(),  # noqa: B008
) -> TargetsResults:
    """Run stage 2: pair auxiliary OOD images with their nearest ID images.

    Args:
        run: The run directory.
        images: The OOD training set: a folder, any other source, or several.
        network: The network of ``build_index``, if that was a module made in another process.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        trust_code: Run the model code that the run names, even if it never ran on this machine.
        config: Settings of the stage.
        data: Where data sets of torchvision are found.

    Raises:
        OodHeatmapError: As ``ood-heatmap targets``.
    """
    with _stage_device(device) as torch_device, _opening(network, trust_code):
        opened = _open(images, data, need_labels=False)
        manifest = targets_module.build_targets(Path(run), opened, torch_device, config)
    return _conclude(TargetsResults.from_manifest(manifest))


def train(
    run: str | Path,
    *,
    device: str = "auto",
    config: TrainConfig = TrainConfig(),  # noqa: B008
) -> DecoderResults:
    """Run stage 3: train the decoder from cached arrays; the classifier is not needed.

    Args:
        run: The run directory.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        config: Settings of the stage.

    Raises:
        OodHeatmapError: As ``ood-heatmap train``.
    """
    with _stage_device(device) as torch_device:
        manifest = train_decoder(Path(run), torch_device, config)
    return _conclude(DecoderResults.from_manifest(manifest))


def evaluate(
    run: str | Path,
    id_images: Sources,
    ood_images: Mapping[str, Source] | Sources,
    *,
    calibration: Source | None = None,
    network: nn.Module | None = None,
    device: str = "auto",
    trust_code: bool = False,
    config: EvaluateConfig = EvaluateConfig(),  # noqa: B008
    data: DataOptions = DataOptions(),  # noqa: B008
) -> EvaluationResults:
    """Run stage 4: compare with the baselines, and calibrate the decisions.

    Writes ``evaluation/metrics.json`` and ``evaluation/report.html`` in the run.

    Args:
        run: The run directory.
        id_images: The ID test set.
        ood_images: OOD test sets, by name or named by their paths.
        calibration: Held-out ID images for the thresholds; a share of ``id_images`` if None.
        network: The network of ``build_index``, if that was a module made in another process.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        trust_code: Run the model code that the run names, even if it never ran on this machine.
        config: Settings of the stage.
        data: Where data sets of torchvision are found.

    Raises:
        OodHeatmapError: As ``ood-heatmap evaluate``.
    """
    if not isinstance(ood_images, Mapping):
        ood_images = _name_sources(ood_images)
    with _stage_device(device) as torch_device, _opening(network, trust_code):
        manifest = evaluate_module.evaluate(
            Path(run),
            _open(id_images, data),
            {name: _open(source, data) for name, source in ood_images.items()},
            torch_device,
            config,
            calibration_images=None if calibration is None else _open(calibration, data),
        )
    return _conclude(EvaluationResults.from_manifest(manifest))


@contextmanager
def _stage_device(name: str) -> Iterator[torch.device]:
    """Yield the device of a stage, inside the process group if torchrun started this process."""
    device = choose_device(name)
    with process_group(device):
        yield device


@contextmanager
def _opening(network: nn.Module | None, trust_code: bool) -> Iterator[None]:
    """Open the classifier of a run with a network in memory, or with code that is trusted."""
    with passing_network(network), trusting_code(trust_code):
        yield


def _as_list(sources: Sources) -> list[Source]:
    return [sources] if isinstance(sources, str | Path | ImageSet) else list(sources)


def _open(
    sources: Sources,
    data: DataOptions,
    class_order: ClassOrder = "name",
    *,
    need_labels: bool = True,
) -> ImageSet:
    """Open image sets as one."""
    listed = _as_list(sources)
    if not listed:
        raise UsageError("there is no image set: name a folder or another source.")
    if isinstance(listed[0], ImageSet):
        if len(listed) > 1:
            raise UsageError("pass one opened image set, or the paths of several.")
        return listed[0]
    paths = tuple(map(str, listed))
    return open_sources(paths, data, class_order=class_order, need_labels=need_labels)


def _name_sources(sources: Sources) -> dict[str, Source]:
    """Name OOD test sets as the command line does."""
    named: dict[str, Source] = {}
    for source in _as_list(sources):
        name = source.source if isinstance(source, ImageSet) else str(source)
        name, path = split_named_source(name)
        if name in named:
            raise UsageError(f"two OOD sets are named {name!r}: pass a dictionary with names.")
        named[name] = source if isinstance(source, ImageSet) else path
    return named


def _conclude(results: _ResultsT) -> _ResultsT:
    """Log the warnings of a stage; they are in its results as well."""
    for warning in results.warnings:
        log.warning("%s", warning)
    return results
