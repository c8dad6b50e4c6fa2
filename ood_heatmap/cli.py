"""The command `ood-heatmap`: each command parses, calls one function of the pipeline and prints.

PyTorch takes seconds to load, so a stage is imported inside its command. Options are described in
``pipeline/config.py``; here are only those that are not settings of a stage.
"""

import contextlib
import io
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ood_heatmap import __version__
from ood_heatmap.errors import OodHeatmapError, UsageError, printable
from ood_heatmap.options import (
    CommandGroup,
    device_option,
    existing_run,
    log_to_stderr,
    new_run,
    options,
    raise_descriptor_limit,
    share_cores,
    trust_option,
)
from ood_heatmap.pipeline.config import (
    AuditConfig,
    AuditData,
    ClassifierOptions,
    EvaluateConfig,
    EvaluateData,
    ExportOptions,
    IndexConfig,
    IndexData,
    LocalizeConfig,
    PredictConfig,
    PredictOptions,
    TargetsConfig,
    TargetsData,
    TestData,
    TrainConfig,
    VerifyConfig,
)

if TYPE_CHECKING:
    import torch

    from ood_heatmap.pipeline.plan import Plan
    from ood_heatmap.pipeline.results import Results

_CONTEXT = {"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 100}
# the commands that can run under torchrun
_SHARED = ("index", "targets", "train", "evaluate")

_index_options = options(data=IndexData, classifier=ClassifierOptions, config=IndexConfig)
_targets_options = options(data=TargetsData, config=TargetsConfig)
_train_options = options(config=TrainConfig)


@click.group("ood-heatmap", cls=CommandGroup, context_settings=_CONTEXT)
@click.version_option(__version__, prog_name="ood-heatmap")
@click.pass_context
def main(context: click.Context) -> None:
    """Show whether, and where, an image is not what a fixed classifier was trained on.

    The four stages, in order: index, targets, train, evaluate. An interrupted stage resumes when
    its command is run again.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1" and context.invoked_subcommand not in _SHARED:
        raise UsageError(
            f"{context.invoked_subcommand} runs in one process: start it without torchrun. "
            f"Commands that run in several processes are {', '.join(_SHARED)}."
        )
    if os.environ.get("RANK", "0") != "0":
        context.with_resource(contextlib.redirect_stdout(io.StringIO()))
    elif isinstance(sys.stdout, io.TextIOWrapper):
        # a file name that is not UTF-8 is printed escaped, as on stderr
        sys.stdout.reconfigure(errors="backslashreplace")
    raise_descriptor_limit()
    share_cores()
    log_to_stderr(context)


def conclude(results: "Results", next_command: str = "", *, allow_suspicious: bool = True) -> None:
    """Print the summary and warnings of a stage, and the next command.

    Raises:
        OodHeatmapError: A result is suspicious and that is not allowed.
    """
    for line in results.summary():
        click.echo(line)
    for warning in results.warnings:
        click.echo(f"{click.style('warning:', fg='yellow')} {printable(warning)}", err=True)
    if results.suspicious and not allow_suspicious:
        raise OodHeatmapError(
            "the stage is complete, but its result is suspicious (see the warning). Correct the "
            "command and add --overwrite, or add --allow-suspicious if it is intended."
        )
    if next_command:
        click.echo(f"next: ood-heatmap {next_command}")


@main.command()
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
    conclude(results, f"targets {run} --ood SOURCE", allow_suspicious=config.allow_suspicious)


@main.command()
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
    conclude(results, f"train {run}", allow_suspicious=config.allow_suspicious)


@main.command()
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
    conclude(results, f"evaluate {run} --id SOURCE --ood NAME=SOURCE")


@main.command()
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
    from ood_heatmap.pipeline.results import EvaluationResults
    from ood_heatmap.pipeline.run import read_result
    from ood_heatmap.pipeline.tables import format_metrics

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
    click.echo(format_metrics(read_result(run, "evaluation", "metrics.json")))
    click.echo(f"report: {run / 'evaluation' / 'report.html'}")
    next_command = f"predict {run} IMAGE_OR_FOLDER --out DIR"
    conclude(results, next_command, allow_suspicious=config.allow_suspicious)


@main.command()
@existing_run
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@options(given=PredictOptions, config=PredictConfig)
@device_option
@trust_option
def predict(
    run: Path,
    images: tuple[Path, ...],
    given: PredictOptions,
    config: PredictConfig,
    device: str,
) -> None:
    """Score IMAGES and show where they are OOD: files, folders, or - for a list of files on stdin.

    IMAGES may also be image sets of other kinds, such as .tar shards and .parquet files.
    Writes scores.csv with a row per image, and an overlay (PNG) and the raw heatmap (.npy) of each.
    p_value and is_ood are empty until the run has been evaluated; is_ood also if it was evaluated
    on too few ID images for the level. Images that cannot be read are reported and skipped, and the
    exit code is then 1. In scores.csv, text that a spreadsheet would interpret as a formula begins
    with an apostrophe; scores.jsonl has it unchanged.

    \b
    Examples:
        ood-heatmap predict runs/c10 photo.jpg more-photos/ --out results
        find photos -name '*.jpg' | ood-heatmap predict runs/c10 - --out results --format jsonl
    """
    from ood_heatmap.detector import HeatmapDetector
    from ood_heatmap.devices import keep_freed_memory
    from ood_heatmap.pipeline.predict import open_inputs
    from ood_heatmap.pipeline.predict import predict as predict_images

    keep_freed_memory()
    # before the classifier is loaded, so that a missing file is reported at once
    paths, image_set = open_inputs(images, given.out)
    detector = HeatmapDetector.load(run, device, given.false_alarm)
    results = predict_images(detector, paths, given.out, config, image_set)
    click.echo(f"{results.num_images} images, scores in {results.table}")
    if results.problems:
        raise OodHeatmapError("; ".join(results.problems) + ".")


@main.command()
@existing_run
@options(data=AuditData, config=AuditConfig)
@device_option
@trust_option
def audit(run: Path, data: AuditData, config: AuditConfig, device: str) -> None:
    """Find images that the training sets of RUN share with each other and with further sets.

    Exact copies are found in any file format, as are most copies that were compressed or rescaled.
    Writes nothing. The exit code is 1 if most images of a set are also in a set that it must not
    overlap with.

    \b
    Example:
        ood-heatmap audit runs/c10 --id cifar10/test --ood svhn/test
    """
    from ood_heatmap.devices import stage_device
    from ood_heatmap.pipeline.audit import audit as audit_run
    from ood_heatmap.pipeline.inputs import open_source, split_named_source
    from ood_heatmap.pipeline.results import Results
    from ood_heatmap.sanity import texts

    id_sets, ood_sets = (
        {source: open_source(split_named_source(source)[1], data) for source in sources}
        for sources in (data.id_sources, data.ood_sources)
    )
    with stage_device(device) as torch_device:
        findings = audit_run(run, id_sets, ood_sets, torch_device, config)
    results = Results(**texts(findings))
    conclude(results)
    if not findings:
        click.echo("no image is in two sets")
    if results.suspicious and not config.allow_suspicious:
        raise OodHeatmapError("image sets overlap. Add --allow-suspicious if that is intended.")


@main.command()
@existing_run
@options(data=TestData, config=LocalizeConfig)
@device_option
@trust_option
def localize(run: Path, data: TestData, config: LocalizeConfig, device: str) -> None:
    """Measure how well the heatmaps of RUN locate patches of OOD images pasted into ID images.

    \b
    Example:
        ood-heatmap localize runs/c10 --id cifar10/test --ood svhn/test
    """
    from ood_heatmap.devices import stage_device
    from ood_heatmap.pipeline.inputs import open_ood_sets, open_sources
    from ood_heatmap.pipeline.localize import localize as localize_run
    from ood_heatmap.pipeline.results import LocalizationResults
    from ood_heatmap.pipeline.run import read_result
    from ood_heatmap.pipeline.tables import format_localization

    id_images, ood_sets = open_sources(data.id_sources, data), open_ood_sets(data)
    with stage_device(device) as torch_device:
        manifest = localize_run(run, id_images, ood_sets, torch_device, config)
    results = LocalizationResults.from_manifest(manifest)
    folder = run / "localization"
    click.echo(format_localization(read_result(run, "localization", "localization.json")))
    click.echo(f"picture: {folder / 'figures' / 'localization.png'}")
    conclude(results)


@main.command()
@existing_run
@options(given=ExportOptions)
@trust_option
def export(run: Path, given: ExportOptions) -> None:
    """Export the detector of RUN as one file that runs without ood_heatmap.

    The input is uint8 (B, 3, H, W) at the classifier's input size; the outputs are score, heatmap,
    prediction and p_value. The file is run and compared with the detector before it is put in
    place.

    \b
    Example:
        ood-heatmap export runs/c10 --format onnx --out c10.onnx
    """
    from ood_heatmap.detector import HeatmapDetector
    from ood_heatmap.pipeline.export import export as export_detector

    detector = HeatmapDetector.load(run, "cpu", given.false_alarm)
    differences = export_detector(detector, given.out, given.format)
    click.echo(f"{given.out}, {given.out.stat().st_size / 1e6:.1f} MB")
    if differences is None:
        click.echo("not compared with the detector: pip install onnxruntime and export again")
    else:
        click.echo(
            f"differs from the detector by at most {differences.score:.1e} in scores and "
            f"{differences.heatmap:.1e} in heatmaps"
        )


@main.group()
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


@main.command()
@existing_run
@options(config=VerifyConfig)
def verify(run: Path, config: VerifyConfig) -> None:
    """Check every checksum of RUN and recompute a sample of targets by brute force in float64.

    \b
    Example:
        ood-heatmap verify runs/c10
    """
    from ood_heatmap.pipeline.verify import verify as verify_run

    for line in verify_run(run, num_samples=config.samples, seed=config.seed):
        click.echo(line)


@main.command()
@click.argument("run", type=click.Path(file_okay=False, path_type=Path), default=Path("runs/demo"))
@device_option
@click.pass_context
def demo(context: click.Context, run: Path, device: str) -> None:
    """Run all four stages in RUN on handwritten digits that come with the dependencies.

    \b
    Example:
        ood-heatmap demo runs/demo
    """
    from ood_heatmap.demo import demo_commands
    from ood_heatmap.devices import choose_device
    from ood_heatmap.pipeline.demo import prepare_demo

    # a device that does not exist is refused before anything is written
    choose_device(device)
    data = prepare_demo(run)
    for name, *arguments in demo_commands(run, data):
        arguments += ["--device", device]
        click.echo(f"\n$ ood-heatmap {name} {' '.join(arguments)}")
        command = main.commands[name]
        with command.make_context(name, arguments, parent=context.find_root()) as stage:
            command.invoke(stage)
    click.echo(f"\nTry: ood-heatmap predict {run} {data / 'letters'} --out {run / 'predictions'}")
