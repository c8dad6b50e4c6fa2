"""The commands of the four stages, and `plan`, which estimates what they need."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ood_heatmap.config_file import save_config
from ood_heatmap.options import (
    Command,
    CommandGroup,
    device_option,
    existing_run,
    new_run,
    options,
    trust_option,
)
from ood_heatmap.output import conclude
from ood_heatmap.pipeline.config import (
    ClassifierOptions,
    EvaluateConfig,
    EvaluateData,
    IndexConfig,
    IndexData,
    TargetsConfig,
    TargetsData,
    TrainConfig,
)

if TYPE_CHECKING:
    import torch

    from ood_heatmap.pipeline.plan import Plan

_index_options = options(data=IndexData, classifier=ClassifierOptions, config=IndexConfig)
_targets_options = options(data=TargetsData, config=TargetsConfig)
_train_options = options(config=TrainConfig)


@click.command(cls=Command)
@new_run
@_index_options
@device_option
def index(
    run: Path, data: IndexData, classifier: ClassifierOptions, config: IndexConfig, device: str
) -> None:
    """Stage 1: embed the ID training set with the classifier and index it in RUN.

    \b
    Examples:
        ood-heatmap index runs/c10 --id cifar10/train --classifier cifar-resnet18 --weights c10.pt
        ood-heatmap index runs/own --id photos/train --classifier model.py:make_model
        --weights model.safetensors --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225 --size 224
    """
    from ood_heatmap.devices import stage_device
    from ood_heatmap.pipeline.index import build_index
    from ood_heatmap.pipeline.inputs import open_classifier, open_sources
    from ood_heatmap.pipeline.results import IndexResults

    with stage_device(device) as torch_device:
        network = open_classifier(classifier, torch_device)
        images = open_sources(
            data.id_sources,
            data,
            class_order=data.class_order,
            need_labels=not config.ignore_labels,
        )
        click.echo(
            f"classifier {classifier.spec}: {network.num_classes} classes, {network.num_features} "
            f"features (input of {network.head}), {network.config.transform.size} px, mean "
            f"{network.config.mean}, std {network.config.std}, on {torch_device}"
        )
        shapes = ("x".join(map(str, shape)) for shape in network.map_shapes)
        maps = [f"{name} {shape}" for name, shape in zip(network.map_names, shapes, strict=True)]
        click.echo(f"feature maps: {', '.join(maps) or 'none'}")
        results = IndexResults.from_manifest(build_index(run, images, network, config))
    save_config(run)
    conclude(results, f"targets {run} --ood SOURCE", allow_suspicious=config.allow_suspicious)


@click.command(cls=Command)
@existing_run
@_targets_options
@device_option
@trust_option
def targets(run: Path, data: TargetsData, config: TargetsConfig, device: str) -> None:
    """Stage 2: pair OOD images with their nearest ID images in RUN and store the target heatmaps.

    \b
    Example:
        ood-heatmap targets runs/c10 --ood data/places365 --limit 10000
    """
    from ood_heatmap.devices import stage_device
    from ood_heatmap.pipeline.inputs import open_sources
    from ood_heatmap.pipeline.results import TargetsResults
    from ood_heatmap.pipeline.targets import build_targets

    with stage_device(device) as torch_device:
        images = open_sources(data.ood_sources, data, need_labels=False)
        results = TargetsResults.from_manifest(build_targets(run, images, torch_device, config))
    save_config(run)
    conclude(results, f"train {run}", allow_suspicious=config.allow_suspicious)


@click.command(cls=Command)
@existing_run
@_train_options
@device_option
def train(run: Path, config: TrainConfig, device: str) -> None:
    """Stage 3: train the decoder of RUN from cached arrays only.

    \b
    Example:
        ood-heatmap train runs/c10 --epochs 150
    """
    from ood_heatmap.devices import stage_device
    from ood_heatmap.pipeline.results import DecoderResults
    from ood_heatmap.pipeline.train import train_decoder

    with stage_device(device) as torch_device:
        results = DecoderResults.from_manifest(train_decoder(run, torch_device, config))
    save_config(run)
    conclude(results, f"evaluate {run} --id SOURCE --ood NAME=SOURCE")


@click.command(cls=Command)
@existing_run
@options(data=EvaluateData, config=EvaluateConfig)
@device_option
@trust_option
def evaluate(run: Path, data: EvaluateData, config: EvaluateConfig, device: str) -> None:
    """Stage 4: measure how well RUN detects OOD images, against baselines; tables and figures.

    \b
    Example:
        ood-heatmap evaluate runs/c10 --id cifar10/test --ood svhn/test --ood near=cifar100/test
        --near near
    """
    from ood_heatmap.devices import stage_device
    from ood_heatmap.pipeline.evaluate import evaluate as evaluate_run
    from ood_heatmap.pipeline.inputs import near_names, open_ood_sets, open_source, open_sources
    from ood_heatmap.pipeline.overview import print_overview
    from ood_heatmap.pipeline.results import EvaluationResults
    from ood_heatmap.pipeline.run import read_result

    config = replace(config, near=near_names(config.near, data.ood_sources))
    with stage_device(device) as torch_device:
        id_images, ood_sets = open_sources(data.id_sources, data), open_ood_sets(data)
        held_out = None if data.calibration is None else open_source(data.calibration, data)
        manifest = evaluate_run(
            run,
            id_images,
            ood_sets,
            torch_device,
            config,
            calibration_images=held_out,
            more_runs=data.runs,
        )
    results = EvaluationResults.from_manifest(manifest)
    save_config(run)
    print_overview(read_result(run, "evaluation", "metrics.json"))
    click.echo(f"report: {run / 'evaluation' / 'report.html'}")
    next_command = f"predict {run} IMAGE_OR_FOLDER --out DIR"
    conclude(results, next_command, allow_suspicious=config.allow_suspicious)


@click.group(cls=CommandGroup)
def plan() -> None:
    """Estimate rows, disk space, memory and time of a stage, and whether they suffice.

    Nothing is written.

    \b
    Example:
        ood-heatmap plan train runs/c10 --epochs 150
    """


@plan.command("index")
@new_run
@_index_options
@device_option
def plan_index(
    run: Path, data: IndexData, classifier: ClassifierOptions, config: IndexConfig, device: str
) -> None:
    """Estimate the resources of `index`; nothing is written or downloaded.

    \b
    Example:
        ood-heatmap plan index runs/c10 --id cifar10/train --classifier cifar-resnet18
    """
    from ood_heatmap.devices import stage_device
    from ood_heatmap.pipeline.inputs import open_classifier, open_sources
    from ood_heatmap.pipeline.plan import plan_index as make_plan

    data = replace(data, download=False)
    images = open_sources(
        data.id_sources,
        data,
        class_order=data.class_order,
        need_labels=not config.ignore_labels,
    )
    with stage_device(device) as torch_device:
        network = open_classifier(classifier, torch_device)
        _echo_plan(make_plan(images, network, config), run, torch_device)


@plan.command("targets")
@existing_run
@_targets_options
@device_option
@trust_option
def plan_targets(run: Path, data: TargetsData, config: TargetsConfig, device: str) -> None:
    """Estimate the resources of `targets`; nothing is written or downloaded.

    \b
    Example:
        ood-heatmap plan targets runs/c10 --ood data/places365 --limit 10000
    """
    from ood_heatmap.devices import stage_device
    from ood_heatmap.pipeline.inputs import open_sources
    from ood_heatmap.pipeline.plan import plan_targets as make_plan

    images = open_sources(data.ood_sources, replace(data, download=False), need_labels=False)
    with stage_device(device) as torch_device:
        _echo_plan(make_plan(run, images, torch_device, config), run, torch_device)


@plan.command("train")
@existing_run
@_train_options
@device_option
def plan_train(run: Path, config: TrainConfig, device: str) -> None:
    """Estimate the resources of `train`; nothing is written.

    \b
    Example:
        ood-heatmap plan train runs/c10 --epochs 150
    """
    from ood_heatmap.devices import stage_device
    from ood_heatmap.pipeline.plan import plan_train as make_plan

    with stage_device(device) as torch_device:
        _echo_plan(make_plan(run, torch_device, config), run, torch_device)


def _echo_plan(estimate: "Plan", run: Path, device: "torch.device") -> None:
    from ood_heatmap.pipeline.plan import format_plan

    click.echo("\n".join(format_plan(estimate, run, device)))
