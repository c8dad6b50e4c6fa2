"""Estimate what a stage needs before it runs: rows, bytes, time from a probe, and shortages.

Nothing is written. A plan covers the whole stage, even if some of its shards already exist.
"""

import shutil
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ood_heatmap.cache.shards import bytes_per_row
from ood_heatmap.classifier import Classifier
from ood_heatmap.decoder import Decoder, make_decoder
from ood_heatmap.devices import kernel_selection
from ood_heatmap.images import ImageSet
from ood_heatmap.pipeline.config import IndexConfig, TargetsConfig, TrainConfig
from ood_heatmap.pipeline.embed import embed
from ood_heatmap.pipeline.feed import (
    TrainingSet,
    available_memory,
    choose_feed,
    iter_batches,
    read_batch,
)
from ood_heatmap.pipeline.forward import BatchedClassifier
from ood_heatmap.pipeline.index import check_classes, columns_from_classifier
from ood_heatmap.pipeline.meter import Meter
from ood_heatmap.pipeline.run import map_index, map_targets, read_manifest, require_from
from ood_heatmap.pipeline.schedule import num_writers, rows_per_shard
from ood_heatmap.pipeline.step import make_adam, make_step, measure_ceiling
from ood_heatmap.pipeline.targets import (
    choose_rows,
    columns_from_index,
    heatmap_size,
    max_pending_bytes,
)
from ood_heatmap.pipeline.targets import resolve as resolve_targets
from ood_heatmap.pipeline.train import check_maps, decoder_config, make_training_set, resolve

_PROBE_SECONDS = 2.0
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Plan:
    """Estimated requirements of a stage.

    Args:
        rows: Number of images.
        disk: Bytes written.
        host: Approximate peak of RAM in bytes.
        on_gpu: Approximate peak of GPU memory in bytes; 0 on the CPU.
        seconds: Expected duration on this device.
        rate: Images/s of the probe.
        feed: Data feed of training; empty for other stages.
    """

    rows: int
    disk: int
    host: int
    on_gpu: int
    seconds: float
    rate: float
    feed: str = ""


def plan_index(images: ImageSet, classifier: Classifier, config: IndexConfig) -> Plan:
    """Estimate stage 1.

    Args:
        images: The ID training set.
        classifier: The classifier, on the device to compute on.
        config: Settings of the stage.
    """
    check_classes(images, classifier, config)
    with kernel_selection(deterministic=config.deterministic):
        rate = _measure_embedding_rate(images, np.arange(len(images)), classifier, config)
    weights = sum(tensor.nbytes for tensor in classifier.network.state_dict().values())
    # index.faiss: built in memory, then written
    bank = len(images) * classifier.num_features * 4
    row_bytes = bytes_per_row(columns_from_classifier(classifier, config))
    return Plan(
        rows=len(images),
        disk=len(images) * row_bytes + bank + weights,
        host=_peak_host_bytes() + _shard_buffers(len(images), row_bytes, config.shard_mb) + bank,
        on_gpu=_peak_gpu_bytes(classifier.device),
        seconds=len(images) / rate,
        rate=rate,
    )


def plan_targets(run: Path, images: ImageSet, device: torch.device, config: TargetsConfig) -> Plan:
    """Estimate stage 2.

    Args:
        run: A run directory with a finished index.
        images: The OOD training set.
        device: Device to embed and search on.
        config: Settings of the stage.
    """
    index = map_index(run, read_manifest(run, "index"))
    rows = choose_rows(images, config)
    config = resolve_targets(config, index, len(rows))
    with kernel_selection(deterministic=config.deterministic):
        rate = _measure_embedding_rate(images, rows, index.classifier(device), config)
    bank, on_gpu = index.columns["features"].num_bytes, device.type == "cuda"
    count = len(rows) + round((config.patched or 0) * len(rows))
    row_bytes = bytes_per_row(columns_from_index(index, heatmap_size(index, config)))
    # a row in memory is its image and what is stored
    computed_bytes = max(row_bytes, 3 * index.size**2)
    buffers = _shard_buffers(count, computed_bytes, config.shard_mb)
    buffers += min(len(rows) * computed_bytes, max_pending_bytes())
    return Plan(
        rows=count,
        disk=count * row_bytes,
        host=_peak_host_bytes() + buffers + bank,
        on_gpu=_peak_gpu_bytes(device) + bank * on_gpu,
        # the search adds a few percent at most
        seconds=count / rate,
        rate=rate,
    )


def plan_train(run: Path, device: torch.device, config: TrainConfig) -> Plan:
    """Estimate stage 3.

    Args:
        run: A run directory with finished index and targets.
        device: Device to train on.
        config: Settings of the stage.
    """
    index = map_index(run, read_manifest(run, "index"))
    targets = read_manifest(run, "targets")
    require_from(targets, index.manifest, run)
    config = resolve(config, index)
    data = make_training_set(index, map_targets(run, targets, index), config)
    check_maps(data, config)
    config = replace(config, batch_size=min(config.batch_size, len(data)))
    feed, on_gpu = choose_feed(data, device, config.feed), device.type == "cuda"
    # untrained: only its speed and size matter here
    size = data.columns["heatmap"].shape[-1]
    decoder = make_decoder(decoder_config(index, size, config)).to(device)
    num_images = config.epochs * (len(data) // config.batch_size) * config.batch_size
    with kernel_selection(deterministic=config.deterministic):
        rate = _measure_training_rate(decoder, data, device, config)
    weights = sum(tensor.nbytes for tensor in decoder.state_dict().values())
    return Plan(
        rows=len(data),
        # the decoder, and before it a checkpoint with Adam's two moments
        disk=4 * weights,
        host=_peak_host_bytes() + data.num_bytes * (feed == ("memory" if on_gpu else "resident")),
        on_gpu=_peak_gpu_bytes(device) + data.num_bytes * (on_gpu and feed == "resident"),
        seconds=num_images / rate,
        rate=rate,
        feed=feed,
    )


def _measure_embedding_rate(
    images: ImageSet,
    rows: NDArray[np.int64],
    classifier: Classifier,
    config: IndexConfig | TargetsConfig,
) -> float:
    """Measure images/s of decoding and the classifier, over about two seconds."""
    size, meter = config.batch_size, Meter(0, "probe")
    forward = BatchedClassifier(classifier, size)
    started, done = time.perf_counter(), 0
    for number, batch in enumerate(
        embed(
            images,
            [rows[start : start + size] for start in range(0, len(rows), size)],
            forward,
            meter,
            workers=config.num_workers,
            skip_unreadable=config.skip_unreadable,
        )
    ):
        done += len(batch.rows)
        # the first batch is a warm-up
        if number == 0 and len(rows) > size:
            started, done = time.perf_counter(), 0
        elif time.perf_counter() - started > _PROBE_SECONDS:
            break
    meter.progress.close()
    return done / (time.perf_counter() - started)


def _measure_training_rate(
    decoder: Decoder, data: TrainingSet, device: torch.device, config: TrainConfig
) -> float:
    """Measure images/s of the training step, over about two seconds; modifies the decoder."""
    decoder.train().to(memory_format=torch.channels_last)
    rows = next(iter_batches(len(data), config.batch_size, config.seed, [0]))
    example = read_batch(data, rows, device)
    _, step = make_step(decoder, make_adam(decoder, config), config, example)
    num_steps = config.epochs * (len(data) // config.batch_size)
    return measure_ceiling(step, example, config.batch_size, num_steps)


def _shard_buffers(num_rows: int, row_bytes: int, shard_mb: int) -> int:
    """Return the bytes of the shards of a stage that are in memory at once."""
    largest = max(shard_mb * 1_000_000, rows_per_shard(num_rows, row_bytes, shard_mb) * row_bytes)
    # one being computed, one being concatenated, and those being written
    return (2 + num_writers()) * largest


def _peak_host_bytes() -> int:
    """Return the peak resident memory of this process, the probe included, or 0 if unknown."""
    try:
        import resource
    except ImportError:
        # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _peak_gpu_bytes(device: torch.device) -> int:
    """Return the peak GPU memory of this process in bytes; 0 for the CPU."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0


def format_plan(plan: Plan, run: Path, device: torch.device) -> list[str]:
    """Format a plan as lines of text, including shortages on this machine."""
    on_gpu = f", {_format_megabytes(plan.on_gpu)} of {device}" if device.type == "cuda" else ""
    minutes, seconds = divmod(round(plan.seconds), 60)
    return [
        f"rows    {plan.rows:,}",
        f"disk    {_format_megabytes(plan.disk)}",
        f"memory  {_format_megabytes(plan.host)} of the host{on_gpu}, about",
        *([f"feed    {plan.feed}"] if plan.feed else []),
        f"time    about {minutes} min {seconds} s on {device}, from {plan.rate:,.0f} images/s",
        *(_find_shortages(plan, run, device) or ["all of it fits"]),
    ]


def _find_shortages(plan: Plan, run: Path, device: torch.device) -> list[str]:
    """Return one line for each resource that is too small."""
    existing = next(path for path in (run, *run.absolute().parents) if path.exists())
    resources = [
        (f"the disk of {existing}", plan.disk, shutil.disk_usage(existing).free),
        ("RAM", plan.host, available_memory(_CPU) + _peak_host_bytes()),
    ]
    if device.type == "cuda":
        free_on_gpu = available_memory(device) + _peak_gpu_bytes(device)
        resources.append((f"{device}", plan.on_gpu, free_on_gpu))
    return [
        f"does not fit: {what}: {_format_megabytes(needed)} are needed, "
        f"{_format_megabytes(free)} are free"
        for what, needed, free in resources
        if needed > free
    ]


def _format_megabytes(num_bytes: float) -> str:
    """Format a number of bytes in megabytes."""
    return f"{num_bytes / 1e6:,.0f} MB"
