"""The commands that use, measure or check a run: predict, audit, localize, export, verify."""

from pathlib import Path

import click

from ood_heatmap.config_file import save_config
from ood_heatmap.errors import OodHeatmapError
from ood_heatmap.options import (
    Command,
    device_option,
    existing_run,
    options,
    run_or_bundle,
    trust_option,
)
from ood_heatmap.output import conclude
from ood_heatmap.pipeline.config import (
    AuditConfig,
    AuditData,
    BundleOptions,
    ExportOptions,
    LocalizeConfig,
    LocalizeData,
    PredictConfig,
    PredictOptions,
    VerifyConfig,
)


@click.command(cls=Command)
@run_or_bundle
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

    RUN is a run directory or a bundle. IMAGES may also be image sets of other kinds, such as .tar
    shards and .parquet files.
    Writes scores.csv with a row per image, and below pictures/ and heatmaps/, in a tree like that
    of IMAGES, a picture and the raw heatmap (.npy) of each.
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
    from ood_heatmap.pipeline.predict import predict as predict_images
    from ood_heatmap.pipeline.predict_inputs import open_inputs
    from ood_heatmap.pipeline.result_folder import common_folder

    keep_freed_memory()
    # before the classifier is loaded, so that a missing file is reported at once
    paths, image_set = open_inputs(images, given.out)
    detector = HeatmapDetector.load(run, device, given.false_alarm)
    results = predict_images(
        detector,
        paths,
        given.out,
        config,
        image_set,
        root=common_folder(images, paths),
    )
    decided = f", {results.num_ood} of them OOD" if detector.decides else ""
    noun = "image" if results.num_images == 1 else "images"
    click.echo(f"{results.num_images:,} {noun}{decided}, scores in {results.table}")
    if results.pictures is not None:
        click.echo(f"pictures: {results.pictures}")
    if results.problems:
        raise OodHeatmapError("; ".join(results.problems) + ".")


@click.command(cls=Command)
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


@click.command(cls=Command)
@existing_run
@options(data=LocalizeData, config=LocalizeConfig)
@device_option
@trust_option
def localize(run: Path, data: LocalizeData, config: LocalizeConfig, device: str) -> None:
    """Measure how well the heatmaps of RUN locate patches of OOD images pasted into ID images.

    \b
    Example:
        ood-heatmap localize runs/c10 --id cifar10/test --ood svhn/test
    """
    from ood_heatmap.devices import stage_device
    from ood_heatmap.pipeline.inputs import open_ood_sets, open_sources
    from ood_heatmap.pipeline.localization_table import format_localization
    from ood_heatmap.pipeline.localize import localize as localize_run
    from ood_heatmap.pipeline.results import LocalizationResults
    from ood_heatmap.pipeline.run import read_result

    id_images, ood_sets = open_sources(data.id_sources, data), open_ood_sets(data)
    ceiling = open_sources(data.ceiling, data) if data.ceiling else None
    with stage_device(device) as torch_device:
        manifest = localize_run(run, id_images, ood_sets, torch_device, config, ceiling)
    results = LocalizationResults.from_manifest(manifest)
    save_config(run)
    folder = run / "localization"
    click.echo(format_localization(read_result(run, "localization", "localization.json")))
    click.echo(f"picture: {folder / 'figures' / 'localization.png'}")
    conclude(results)


@click.command(cls=Command)
@existing_run
@options(given=BundleOptions)
@trust_option
def bundle(run: Path, given: BundleOptions) -> None:
    """Put the detector of RUN into one small file, without images.

    `predict`, `export` and `HeatmapDetector.load` take it in place of RUN.

    The file is safetensors with JSON. The text of a model file is in it, and runs only if the user
    who loads it trusts it.

    \b
    Example:
        ood-heatmap bundle runs/c10 --out c10.safetensors
    """
    from ood_heatmap.bundle import to_bundle
    from ood_heatmap.cache.files import write_bytes
    from ood_heatmap.detector import HeatmapDetector

    if not given.out.parent.is_dir():
        raise OodHeatmapError(f"cannot write {given.out}: there is no folder {given.out.parent}.")
    write_bytes(given.out, to_bundle(HeatmapDetector.load(run, "cpu", given.false_alarm)))
    click.echo(f"{given.out}, {given.out.stat().st_size / 1e6:.1f} MB")


@click.command(cls=Command)
@run_or_bundle
@options(given=ExportOptions)
@trust_option
def export(run: Path, given: ExportOptions) -> None:
    """Export the detector of RUN as one file that runs without ood_heatmap.

    RUN is a run directory or a bundle. The input is uint8 (B, 3, H, W) at the classifier's input
    size; the outputs are score, heatmap, prediction and p_value. The file is run and compared with
    the detector before it is put in place.

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


@click.command(cls=Command)
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
