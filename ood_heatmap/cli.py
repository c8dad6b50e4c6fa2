"""The command `ood-heatmap`: each command parses, calls one function of the pipeline and prints.

PyTorch takes seconds to load, so a stage is imported inside its command.
"""

import contextlib
import io
import logging
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ood_heatmap import __version__
from ood_heatmap.errors import OodHeatmapError, UsageError
from ood_heatmap.pipeline.config import (
    EvaluateConfig,
    IndexConfig,
    LocalizeConfig,
    PredictConfig,
    TargetsConfig,
    TrainConfig,
)

if TYPE_CHECKING:
    from ood_heatmap.images import ImageSet

Command = TypeVar("Command", bound=Callable[..., Any])
Settings = TypeVar("Settings", IndexConfig, TargetsConfig, TrainConfig)
CONTEXT = {"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 100}
EXISTING = click.Path(exists=True, file_okay=False, path_type=Path)


class Commands(click.Group):
    """A group in which what a user can mend ends in one line.

    No traceback, exit code 1, or 2 for usage.
    """

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UsageError as error:
            raise click.UsageError(str(error), ctx) from error
        except OodHeatmapError as error:
            raise click.ClickException(str(error)) from error
        except KeyboardInterrupt:
            click.echo("\nstopped; start the same command again to go on", err=True)
            sys.exit(130)


class Numbers(click.ParamType):  # type: ignore[type-arg]
    """Three numbers, one for each channel: 0.49,0.48,0.45."""

    name = "R,G,B"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(float(part) for part in value.split(","))
        except ValueError:
            numbers = ()
        if len(numbers) != 3:
            self.fail(f"{value!r} is not three numbers such as 0.49,0.48,0.45", param, ctx)
        return numbers


def options(*decorators: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Return several options as one decorator."""

    def decorate(command: Command) -> Command:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


data_options = options(
    click.option(
        "--data-root",
        type=click.Path(file_okay=False, path_type=Path),
        default=Path("data"),
        help="Where torchvision's sets lie.",
    ),
    click.option("--download", is_flag=True, help="Fetch a torchvision set that is not there."),
)
device_option = click.option("--device", default="auto", help="auto, cpu, cuda or cuda:N.")
embed_options = options(
    device_option,
    click.option(
        "--batch-size",
        type=click.IntRange(1),
        default=IndexConfig.batch_size,
        help="Images the classifier takes at once.",
    ),
    click.option(
        "--workers",
        type=click.IntRange(1),
        default=IndexConfig.workers,
        help="Threads that decode images.",
    ),
    click.option("--skip-unreadable", is_flag=True, help="Leave out images that cannot be read."),
)
shard_option = click.option(
    "--shard-mb",
    type=click.IntRange(1),
    default=IndexConfig.shard_mb,
    help="Megabytes of a shard on disk, about.",
)
overwrite_option = click.option(
    "--overwrite", is_flag=True, help="Discard what was made from something else."
)
SHARED = ("index", "targets", "train", "evaluate")  # the commands that torchrun may start
false_alarm_option = click.option(
    "--false-alarm",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Share of ID images that may be called OOD; the evaluation's own when not given.",
)


@click.group(cls=Commands, context_settings=CONTEXT)
@click.version_option(__version__, prog_name="ood-heatmap")
@click.option("-v", "--verbose", is_flag=True, help="Say more.")
@click.pass_context
def main(context: click.Context, verbose: bool) -> None:
    """Heatmaps that show whether, and where, an image is not what a fixed classifier was trained
    on.

    The four stages, in order: index, targets, train, evaluate. Each goes on where it was when it is
    started again.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1" and context.invoked_subcommand not in SHARED:
        raise UsageError(
            f"{context.invoked_subcommand} runs in one process: start it without torchrun. "
            f"Those that share their work are {', '.join(SHARED)}."
        )
    level = logging.DEBUG if verbose else logging.INFO
    if os.environ.get("RANK", "0") != "0":  # under torchrun one process speaks for all
        level = logging.ERROR
        context.with_resource(contextlib.redirect_stdout(io.StringIO()))
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    quiet = (
        "matplotlib",
        "PIL",
        "h5py",
        "faiss",
        "asyncio",
        "pytorch_ood",
        "onnxscript",
        "onnx_ir",
    )
    for noisy in quiet:
        logging.getLogger(noisy).setLevel(logging.WARNING)


@main.command()
@click.argument("run", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--id", "source", required=True, help="ID training images: a folder, file or name/split."
)
@click.option(
    "--classifier",
    "spec",
    required=True,
    help="cifar-resnet18, cifar-resnet50-64px, wrn-40-2, torchvision/NAME, timm/NAME, "
    "file.py:function or package.module:function.",
)
@click.option(
    "--weights",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Safetensors or a state dict; the network's own when not given.",
)
@click.option("--num-classes", type=click.IntRange(2), help="Classes of the classifier.")
@click.option(
    "--mean", type=Numbers(), help="Of each channel, in [0, 1]; the network's own or 0,0,0."
)
@click.option(
    "--std", type=Numbers(), help="Of each channel, in [0, 1]; the network's own or 1,1,1."
)
@click.option("--size", type=click.IntRange(4), help="Pixels of the input; the network's own.")
@click.option("--head", default="", help="Name of the last linear layer; found by itself.")
@click.option(
    "--feature-maps",
    "num_maps",
    type=click.IntRange(0, 3),
    default=TrainConfig.feature_maps,
    help="Cache this many of the classifier's spatial feature maps, the deepest first.",
)
@click.option("--autocast", is_flag=True, help="Classify in bfloat16, for every stage of RUN.")
@click.option("--ignore-labels", is_flag=True, help="Take class folders for folders only.")
@embed_options
@shard_option
@data_options
@overwrite_option
def index(
    run: Path,
    source: str,
    spec: str,
    weights: Path | None,
    num_classes: int | None,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    size: int | None,
    head: str,
    num_maps: int,
    autocast: bool,
    ignore_labels: bool,
    device: str,
    batch_size: int,
    workers: int,
    skip_unreadable: bool,
    shard_mb: int,
    data_root: Path,
    download: bool,
    overwrite: bool,
) -> None:
    """Stage 1: embed the ID training set with the classifier and index it in RUN.

    \b
    Example:
        ood-heatmap index runs/c10 --id cifar10/train --classifier cifar-resnet18 --weights c10.pt
    """
    from ood_heatmap.classifier import load_classifier
    from ood_heatmap.devices import stage_device
    from ood_heatmap.distributed import main_first
    from ood_heatmap.images import open_images
    from ood_heatmap.pipeline.index import build_index

    with stage_device(device) as place:
        with main_first():
            classifier = load_classifier(
                spec,
                weights=weights,
                num_classes=num_classes,
                mean=mean,
                std=std,
                size=size,
                head=head,
                num_maps=num_maps,
                autocast=autocast,
            ).to(place)
            images = open_images(source, data_root=data_root, download=download)
        click.echo(
            f"classifier {spec}: {classifier.num_classes} classes, {classifier.num_features} "
            f"features (input of {classifier.head}), {classifier.config.transform.size} px, mean "
            f"{classifier.config.mean}, std {classifier.config.std}, on {place}"
        )
        manifest = build_index(
            run,
            images,
            classifier,
            IndexConfig(
                batch_size=batch_size,
                workers=workers,
                shard_mb=shard_mb,
                skip_unreadable=skip_unreadable,
                ignore_labels=ignore_labels,
                overwrite=overwrite,
            ),
        )
    results = manifest.results
    counts = results["class_counts"]
    accuracy = results["accuracy"]
    click.echo(f"{results['num_images']} ID images, {results['backend']}")
    click.echo(
        f"accuracy {accuracy:.2%}" if accuracy is not None else "accuracy unknown: no labels"
    )
    click.echo(f"images predicted as each class: {min(counts)} to {max(counts)}")
    empty = [str(label) for label, count in enumerate(counts) if count == 0]
    if empty:
        click.echo(f"no image is predicted as class {', '.join(empty)}")
    click.echo(f"next: ood-heatmap targets {run} --ood SOURCE")


@main.command()
@click.argument("run", type=EXISTING)
@click.option(
    "--ood", "source", required=True, help="OOD training images: a folder, file or name/split."
)
@click.option("--limit", type=click.IntRange(1), help="Take this many, drawn at random.")
@click.option("--seed", default=TargetsConfig.seed, help="Of that draw and of random pairing.")
@click.option(
    "--pairing",
    type=click.Choice(["nearest", "random", "any", "scrambled"]),
    default=TargetsConfig.pairing,
    help="The partner: the nearest ID image of the predicted class, a random one, the nearest of "
    "any class, or confused as in the released code.",
)
@click.option(
    "--patched",
    type=click.FloatRange(0),
    default=TargetsConfig.patched,
    help="ID images with a patch of an OOD image to make as well, for each OOD image.",
)
@embed_options
@shard_option
@data_options
@overwrite_option
def targets(
    run: Path,
    source: str,
    limit: int | None,
    seed: int,
    pairing: str,
    patched: float,
    device: str,
    batch_size: int,
    workers: int,
    skip_unreadable: bool,
    shard_mb: int,
    data_root: Path,
    download: bool,
    overwrite: bool,
) -> None:
    """Stage 2: pair OOD images with their nearest ID images in RUN and store the target heatmaps.

    \b
    Example:
        ood-heatmap targets runs/c10 --ood data/places365 --limit 10000
    """
    from ood_heatmap.devices import stage_device
    from ood_heatmap.distributed import main_first
    from ood_heatmap.images import open_images
    from ood_heatmap.pipeline.targets import build_targets

    config = TargetsConfig(
        limit=limit,
        seed=seed,
        pairing=pairing,
        patched=patched,
        batch_size=batch_size,
        workers=workers,
        shard_mb=shard_mb,
        skip_unreadable=skip_unreadable,
        overwrite=overwrite,
    )
    with stage_device(device) as place:
        with main_first():
            images = open_images(source, data_root=data_root, download=download)
        results = build_targets(run, images, place, config).results
    click.echo(
        f"{results['num_images']} OOD images paired ({results['pairing']}), {results['backend']}; "
        f"median distance {results['median_distance']:.3g}"
    )
    if results["num_without_class"]:
        click.echo(f"{results['num_without_class']} had no ID image of their class: searched all")
    if results["num_patched"]:
        click.echo(f"{results['num_patched']} ID images with a patch of an OOD image")
    click.echo(f"next: ood-heatmap train {run}")


@main.command()
@click.argument("run", type=EXISTING)
@click.option(
    "--epochs", type=click.IntRange(1), default=TrainConfig.epochs, help="Passes over all images."
)
@click.option(
    "--batch-size", type=click.IntRange(2), default=TrainConfig.batch_size, help="Images a step."
)
@click.option(
    "--lr", type=click.FloatRange(0, min_open=True), default=TrainConfig.lr, help="Learning rate."
)
@click.option(
    "--schedule",
    type=click.Choice(["cosine", "constant"]),
    default=TrainConfig.schedule,
    help="Of the learning rate: up in a tenth of the steps and down to 0, or the same throughout.",
)
@click.option(
    "--noise",
    type=click.FloatRange(0),
    default=TrainConfig.noise,
    help="On the inputs in training, in standard deviations; for the plain stack.",
)
@click.option("--seed", default=TrainConfig.seed, help="Of first weights, order and noise.")
@click.option(
    "--stack",
    type=click.Choice(["plain", "dcgan"]),
    default=TrainConfig.stack,
    help="Without batch norm and with noise, or with batch norm, as in the paper.",
)
@click.option(
    "--target",
    type=click.Choice(["signed", "magnitude"]),
    default=TrainConfig.target,
    help="The difference, as in the paper, or its absolute value.",
)
@click.option(
    "--region-weight",
    type=click.FloatRange(0, 1),
    default=TrainConfig.region_weight,
    help="How much more a patched image counts the smaller its patch: (image / patch) to this "
    "power. 0: not at all, as in the paper.",
)
@click.option(
    "--width",
    type=click.IntRange(0),
    default=TrainConfig.width,
    help="Channels of the decoder's first map; 0: from the features' width.",
)
@click.option(
    "--feature-maps",
    type=click.IntRange(0, 3),
    default=TrainConfig.feature_maps,
    help="How many of the classifier's feature maps to take as well.",
)
@click.option(
    "--feed",
    type=click.Choice(["auto", "resident", "pinned", "streaming"]),
    default=TrainConfig.feed,
    help="Everything in the device's memory, in the host's, or from mapped shards.",
)
@click.option(
    "--precision",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default=TrainConfig.precision,
    help="auto: bfloat16 on a GPU.",
)
@click.option(
    "--step",
    type=click.Choice(["auto", "plain", "compiled", "graph"]),
    default=TrainConfig.step,
    help="How a step is launched; auto: the faster of plain and a CUDA graph on a GPU.",
)
@device_option
@overwrite_option
def train(
    run: Path,
    epochs: int,
    batch_size: int,
    lr: float,
    schedule: str,
    noise: float,
    seed: int,
    stack: str,
    target: str,
    region_weight: float,
    width: int,
    feature_maps: int,
    feed: str,
    precision: str,
    step: str,
    device: str,
    overwrite: bool,
) -> None:
    """Stage 3: train the decoder of RUN from cached arrays alone.

    \b
    Example:
        ood-heatmap train runs/c10 --epochs 150
    """
    from ood_heatmap.devices import stage_device
    from ood_heatmap.pipeline.train import train_decoder

    config = TrainConfig(
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        schedule=schedule,
        noise=noise,
        seed=seed,
        stack=stack,
        target=target,
        region_weight=region_weight,
        width=width,
        feature_maps=feature_maps,
        feed=feed,
        precision=precision,
        step=step,
        overwrite=overwrite,
    )
    with stage_device(device) as place:
        results = train_decoder(run, place, config).results
    click.echo(
        f"decoder of {results['num_parameters']:,} parameters, {results['decoder']['target']} "
        f"target, "
        f"trained on {results['num_id']} ID and {results['num_ood']} OOD images"
    )
    click.echo(f"next: ood-heatmap evaluate {run} --id SOURCE --ood NAME=SOURCE")


@main.command()
@click.argument("run", type=EXISTING)
@click.option("--id", "source", required=True, help="ID test images: a folder, file or name/split.")
@click.option(
    "--ood",
    "ood_sources",
    required=True,
    multiple=True,
    metavar="[NAME=]SOURCE",
    help="An OOD test set; may be repeated.",
)
@click.option(
    "--near", multiple=True, metavar="NAME", help="An OOD set that is near; may be repeated."
)
@click.option(
    "--runs",
    "more_runs",
    multiple=True,
    type=EXISTING,
    metavar="OTHER_RUN",
    help="A run trained with another seed, for mean and spread; may be repeated.",
)
@click.option(
    "--protocol",
    type=click.Choice(["all", "paper", "openood"]),
    default=EvaluateConfig.protocol,
    help="paper: ID positive, ID:OOD = 5:1 by a random draw; openood: OOD positive, means over "
    "near and far.",
)
@click.option(
    "--calibration",
    "calibration_source",
    metavar="SOURCE",
    help="ID images for the thresholds alone; a share of --id when not given.",
)
@click.option(
    "--calibration-share",
    type=click.FloatRange(0, 1, max_open=True),
    default=EvaluateConfig.calibration_share,
    help="That share; its images are not in the table. 0: no thresholds.",
)
@click.option(
    "--false-alarm",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=EvaluateConfig.false_alarm,
    help="Share of ID images that may be called OOD.",
)
@click.option(
    "--gallery",
    type=click.IntRange(1),
    default=EvaluateConfig.gallery,
    help="Images of each set in the report.",
)
@click.option("--seed", default=EvaluateConfig.seed, help="Of every random draw.")
@embed_options
@data_options
@overwrite_option
def evaluate(
    run: Path,
    source: str,
    ood_sources: tuple[str, ...],
    near: tuple[str, ...],
    more_runs: tuple[Path, ...],
    protocol: str,
    calibration_source: str | None,
    calibration_share: float,
    false_alarm: float,
    gallery: int,
    seed: int,
    device: str,
    batch_size: int,
    workers: int,
    skip_unreadable: bool,
    data_root: Path,
    download: bool,
    overwrite: bool,
) -> None:
    """Stage 4: say how well RUN detects, beside baselines, in numbers and pictures.

    \b
    Example:
        ood-heatmap evaluate runs/c10 --id cifar10/test --ood svhn/test --ood near=cifar100/test
        --near near
    """
    import json

    from ood_heatmap.devices import stage_device
    from ood_heatmap.distributed import main_first
    from ood_heatmap.images import open_images
    from ood_heatmap.pipeline.evaluate import evaluate as run_stage
    from ood_heatmap.pipeline.table import format_decisions, format_table

    config = EvaluateConfig(
        near=near,
        protocol=protocol,
        calibration_share=calibration_share,
        false_alarm=false_alarm,
        seed=seed,
        gallery=gallery,
        batch_size=batch_size,
        workers=workers,
        skip_unreadable=skip_unreadable,
        overwrite=overwrite,
    )
    with stage_device(device) as place:
        with main_first():
            id_images = open_images(source, data_root=data_root, download=download)
            ood_sets = open_sets(ood_sources, data_root, download)
            held_out = None
            if calibration_source is not None:
                held_out = open_images(calibration_source, data_root=data_root, download=download)
        run_stage(
            run,
            id_images,
            ood_sets,
            place,
            config,
            calibration_images=held_out,
            more_runs=more_runs,
        )
    content = json.loads((run / "evaluation" / "metrics.json").read_text("utf-8"))
    if content["id_accuracy"] is not None:
        click.echo(f"accuracy on the ID test set {content['id_accuracy']:.2%}")
    click.echo(format_table(content))
    if "decisions" in content:
        click.echo(format_decisions(content["decisions"]))
    click.echo(f"report: {run / 'evaluation' / 'report.html'}")
    click.echo(f"next: ood-heatmap predict {run} IMAGE_OR_FOLDER --out DIR")


def open_sets(sources: tuple[str, ...], data_root: Path, download: bool) -> "dict[str, ImageSet]":
    """Return the OOD sets that a user names, by name."""
    from ood_heatmap.images import open_images

    sets: dict[str, ImageSet] = {}
    for item in sources:
        name, place = named_source(item)
        if name in sets:
            raise UsageError(f"two OOD sets are called {name!r}: name them with NAME=SOURCE.")
        sets[name] = open_images(place, data_root=data_root, download=download)
    return sets


def named_source(item: str) -> tuple[str, str]:
    """Split ``NAME=SOURCE``; without a name the source's last part is it."""
    name, equals, place = item.partition("=")
    if equals and not Path(item).exists():
        return name, place
    path = Path(item)
    return (path.stem if path.exists() else item.partition("/")[0]), item


@main.command()
@click.argument("run", type=EXISTING)
@click.option("--id", "source", required=True, help="ID test images: a folder, file or name/split.")
@click.option(
    "--ood",
    "ood_sources",
    required=True,
    multiple=True,
    metavar="[NAME=]SOURCE",
    help="An OOD test set; may be repeated.",
)
@click.option(
    "--count",
    type=click.IntRange(1),
    default=LocalizeConfig.count,
    help="Images of each set; each with patches of every size, hard and blended.",
)
@click.option("--seed", default=LocalizeConfig.seed, help="Of images, places and sanity checks.")
@embed_options
@data_options
@overwrite_option
def localize(
    run: Path,
    source: str,
    ood_sources: tuple[str, ...],
    count: int,
    seed: int,
    device: str,
    batch_size: int,
    workers: int,
    skip_unreadable: bool,
    data_root: Path,
    download: bool,
    overwrite: bool,
) -> None:
    """Say how well the heatmaps of RUN show where, on patches of OOD images pasted into ID images.

    \b
    Example:
        ood-heatmap localize runs/c10 --id cifar10/test --ood svhn/test
    """
    import json

    from ood_heatmap.devices import choose_device
    from ood_heatmap.images import open_images
    from ood_heatmap.pipeline.localize import format_table
    from ood_heatmap.pipeline.localize import localize as run_stage

    id_images = open_images(source, data_root=data_root, download=download)
    ood_sets = open_sets(ood_sources, data_root, download)
    config = LocalizeConfig(
        count=count,
        seed=seed,
        batch_size=batch_size,
        workers=workers,
        skip_unreadable=skip_unreadable,
        overwrite=overwrite,
    )
    run_stage(run, id_images, ood_sets, choose_device(device), config)
    folder = run / "localization"
    click.echo(format_table(json.loads((folder / "localization.json").read_text("utf-8"))))
    click.echo(f"picture: {folder / 'figures' / 'localization.png'}")


@main.command()
@click.argument("run", type=EXISTING)
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Where the results go.",
)
@click.option(
    "--format",
    "table",
    type=click.Choice(["csv", "jsonl"]),
    default=PredictConfig.format,
    help="Of the table: scores.csv, or scores.jsonl, a JSON object a line.",
)
@click.option("--no-pictures", is_flag=True, help="Write the table alone.")
@false_alarm_option
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=PredictConfig.batch_size,
    help="Images the classifier takes at once.",
)
@click.option(
    "--workers",
    type=click.IntRange(1),
    default=PredictConfig.workers,
    help="Threads that decode images, and as many that draw and write.",
)
@device_option
def predict(
    run: Path,
    images: tuple[Path, ...],
    out: Path,
    table: str,
    no_pictures: bool,
    false_alarm: float | None,
    batch_size: int,
    workers: int,
    device: str,
) -> None:
    """Score IMAGES, say which are OOD, and show where: files, folders, or - for a list of them.

    Writes scores.csv with a line for each image, an overlay (PNG) and the raw heatmap (.npy).
    p_value and is_ood are empty until the run has been evaluated. What cannot be read is named and
    skipped, and the exit code is then 1.

    \b
    Examples:
        ood-heatmap predict runs/c10 photo.jpg more-photos/ --out results
        find photos -name '*.jpg' | ood-heatmap predict runs/c10 - --out results --format jsonl
    """
    from ood_heatmap.detector import HeatmapDetector
    from ood_heatmap.pipeline.predict import list_images
    from ood_heatmap.pipeline.predict import predict as run_predict

    paths = list_images(images, out)  # say what is missing before the classifier is loaded
    config = PredictConfig(
        batch_size=batch_size, workers=workers, format=table, pictures=not no_pictures
    )
    done, unreadable = run_predict(
        HeatmapDetector.load(run, device, false_alarm), paths, out, config
    )
    click.echo(f"{done} images, scores in {out / f'scores.{table}'}")
    if unreadable:
        raise OodHeatmapError(f"{len(unreadable)} images could not be read, {unreadable[0]} first.")


@main.group()
def plan() -> None:
    """Say what a stage would take: rows, bytes, feed, time, and what would not fit. Write nothing.

    \b
    Example:
        ood-heatmap plan train runs/c10 --epochs 150
    """


def planned(stage: click.Command) -> Callable[[Command], click.Command]:
    """Make a function the plan of a stage, with the very same arguments as the stage."""
    return plan.command(stage.name, params=stage.params, help=f"What `{stage.name}` would take.")


def settings(kind: type[Settings], given: Mapping[str, Any]) -> Settings:
    """Return a stage's settings from its options, which have the same names."""
    return kind(**{name: given[name] for name in kind.__dataclass_fields__})


@planned(index)
def plan_index(**given: Any) -> None:
    from ood_heatmap.classifier import load_classifier
    from ood_heatmap.devices import choose_device
    from ood_heatmap.images import open_images
    from ood_heatmap.pipeline import plan

    device = choose_device(given["device"])
    names = ("weights", "num_classes", "mean", "std", "size", "head", "num_maps")
    classifier = load_classifier(given["spec"], **{name: given[name] for name in names}).to(device)
    images = open_images(given["source"], data_root=given["data_root"])
    found = plan.plan_index(images, classifier, settings(IndexConfig, given))
    click.echo("\n".join(plan.lines_of(found, given["run"], device)))


@planned(targets)
def plan_targets(**given: Any) -> None:
    from ood_heatmap.devices import choose_device
    from ood_heatmap.images import open_images
    from ood_heatmap.pipeline import plan

    device = choose_device(given["device"])
    images = open_images(given["source"], data_root=given["data_root"])
    found = plan.plan_targets(given["run"], images, device, settings(TargetsConfig, given))
    click.echo("\n".join(plan.lines_of(found, given["run"], device)))


@planned(train)
def plan_train(**given: Any) -> None:
    from ood_heatmap.devices import choose_device
    from ood_heatmap.pipeline import plan

    device = choose_device(given["device"])
    found = plan.plan_train(given["run"], device, settings(TrainConfig, given))
    click.echo("\n".join(plan.lines_of(found, given["run"], device)))


@main.command()
@click.argument("run", type=EXISTING)
@click.option(
    "--format",
    "kind",
    type=click.Choice(["onnx", "torch"]),
    required=True,
    help="ONNX, or a program of torch.export.",
)
@click.option(
    "--out",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="The one file, such as detector.onnx or detector.pt2.",
)
@false_alarm_option
def export(run: Path, kind: str, out: Path, false_alarm: float | None) -> None:
    """Write the detector of RUN as one file that needs no ood_heatmap to run.

    Images go in as uint8 (B, 3, H, W) at the classifier's input size; score, heatmap, prediction
    and p_value come out. The file is run and compared with the detector before it is put in place.

    \b
    Example:
        ood-heatmap export runs/c10 --format onnx --out c10.onnx
    """
    from ood_heatmap.cache.manifest import read_manifest
    from ood_heatmap.detector import HeatmapDetector
    from ood_heatmap.pipeline.export import export as run_export

    detector = HeatmapDetector.load(run, "cpu", false_alarm)
    differences = run_export(detector, out, kind, read_manifest(run, "decoder").fingerprint)
    click.echo(f"{out}, {out.stat().st_size / 1e6:.1f} MB")
    if differences is None:
        click.echo("not compared with the detector: pip install onnxruntime, and export again")
    else:
        click.echo(
            f"differs from the detector by at most {differences.score:.1e} in scores and "
            f"{differences.heatmap:.1e} in heatmaps"
        )


@main.command()
@click.argument("run", type=EXISTING)
@click.option("--samples", type=click.IntRange(0), default=200, help="Targets to pair again.")
@click.option("--seed", default=0, help="Of the sample.")
def verify(run: Path, samples: int, seed: int) -> None:
    """Reread every checksum of RUN, and pair a sample of targets again by brute force in float64.

    \b
    Example:
        ood-heatmap verify runs/c10
    """
    from ood_heatmap.pipeline.verify import verify as run_verify

    for line in run_verify(run, num_samples=samples, seed=seed):
        click.echo(line)


@main.command()
@click.argument("run", type=click.Path(file_okay=False, path_type=Path), default=Path("runs/demo"))
@device_option
def demo(run: Path, device: str) -> None:
    """Run all four stages in RUN on data that come with the dependencies: handwritten digits.

    \b
    Example:
        ood-heatmap demo runs/demo
    """
    from ood_heatmap.demo import run_demo

    run_demo(run, device)
