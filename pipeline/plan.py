"""What a stage would take, before it runs: rows, bytes, time from a probe, and what does not fit.

Nothing is written. A plan is for the whole stage, also where a part of it is done already.
"""

import resource
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
from ood_heatmap.pipeline.step import make_adam, make_step, measure_ceiling
from ood_heatmap.pipeline.targets import choose_rows, columns_from_index
from ood_heatmap.pipeline.train import check_maps, decoder_config

_PROBE_SECONDS = 2.0
_SHARDS_IN_MEMORY = 3  # one is computed, joined and written at the same time
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Plan:
    """What a stage takes.

    Args:
        rows: Images to go through, once.
        disk: Bytes it writes.
        host: Bytes of RAM at the peak, about.
        on_gpu: Bytes of the GPU's memory at the peak, about; 0 on the CPU.
        seconds: Expected, on this device.
        rate: Images/s of the probe.
        feed: Of the training.
    """

    rows: int
    disk: int
    host: int
    on_gpu: int
    seconds: float
    rate: float
    feed: str = ""


def plan_index(images: ImageSet, classifier: Classifier, config: IndexConfig) -> Plan:
    """Return what stage 1 would take.

    Args:
        images: The ID training set.
        classifier: On the device that shall compute.
        config: Settings of the stage.
    """
    check_classes(images, classifier, config)
    rate = _measure_embedding_rate(images, np.arange(len(images)), classifier, config)
    weights = sum(item.nbytes for item in classifier.network.state_dict().values())
    bank = len(images) * classifier.num_features * 4  # index.faiss; made in memory, then written
    return Plan(
        rows=len(images),
        disk=len(images) * bytes_per_row(columns_from_classifier(classifier)) + bank + weights,
        host=_peak_host_bytes() + _SHARDS_IN_MEMORY * config.shard_mb * 1_000_000 + bank,
        on_gpu=_peak_gpu_bytes(classifier.device),
        seconds=len(images) / rate,
        rate=rate,
    )


def plan_targets(run: Path, images: ImageSet, device: torch.device, config: TargetsConfig) -> Plan:
    """Return what stage 2 would take.

    Args:
        run: A run directory with a finished index.
        images: The OOD training set.
        device: Where to embed and search.
        config: Settings of the stage.
    """
    index = map_index(run, read_manifest(run, "index"))
    rows = choose_rows(images, config)
    rate = _measure_embedding_rate(images, rows, index.classifier(device), config)
    bank, on_gpu = index.columns["features"].num_bytes, device.type == "cuda"
    count = len(rows) + round(config.patched * len(rows))
    return Plan(
        rows=count,
        disk=count * bytes_per_row(columns_from_index(index)),
        host=_peak_host_bytes() + _SHARDS_IN_MEMORY * config.shard_mb * 1_000_000 + bank,
        on_gpu=_peak_gpu_bytes(device) + bank * on_gpu,
        seconds=count / rate,  # the search adds a few percent at most
        rate=rate,
    )


def plan_train(run: Path, device: torch.device, config: TrainConfig) -> Plan:
    """Return what stage 3 would take.

    Args:
        run: A run directory with finished index and targets.
        device: Where to train.
        config: Settings of the stage.
    """
    index = map_index(run, read_manifest(run, "index"))
    targets = read_manifest(run, "targets")
    require_from(targets, index.manifest, run)
    columns = map_targets(run, targets, index).columns
    data = TrainingSet(index.columns, columns, config.feature_maps)
    check_maps(data, config)
    config = replace(config, batch_size=min(config.batch_size, len(data)))
    feed, on_gpu = choose_feed(data, device, config.feed), device.type == "cuda"
    decoder = make_decoder(decoder_config(index, config)).to(device)  # its speed alone matters here
    num_images = config.epochs * (len(data) // config.batch_size) * config.batch_size
    rate = _measure_training_rate(decoder, data, device, config)
    weights = sum(item.nbytes for item in decoder.state_dict().values())
    return Plan(
        rows=len(data),
        disk=4 * weights,  # the decoder; until it is finished a checkpoint with Adam's two moments
        host=_peak_host_bytes() + data.num_bytes * (feed == ("pinned" if on_gpu else "resident")),
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
    """Return the images/s from the disk through the classifier, over about two seconds."""
    size, meter = config.batch_size, Meter(0, "probe")
    forward = BatchedClassifier(classifier, size)
    began, done = time.perf_counter(), 0
    for number, batch in enumerate(
        embed(
            images,
            [rows[start : start + size] for start in range(0, len(rows), size)],
            forward,
            meter,
            workers=config.workers,
            skip_unreadable=config.skip_unreadable,
        )
    ):
        done += len(batch.rows)
        if number == 0 and len(rows) > size:  # a first batch warms up
            began, done = time.perf_counter(), 0
        elif time.perf_counter() - began > _PROBE_SECONDS:
            break
    meter.bar.close()
    return done / (time.perf_counter() - began)


def _measure_training_rate(
    decoder: Decoder, data: TrainingSet, device: torch.device, config: TrainConfig
) -> float:
    """Return the images/s of the step, over about two seconds; the decoder is used up."""
    decoder.train().to(memory_format=torch.channels_last)
    rows = next(iter_batches(len(data), config.batch_size, config.seed, [0]))
    example = read_batch(data, rows, device)
    _, step = make_step(decoder, make_adam(decoder, config), config, example)
    num_steps = config.epochs * (len(data) // config.batch_size)
    return measure_ceiling(step, example, config.batch_size, num_steps)


def _peak_host_bytes() -> int:
    """Return the most bytes of RAM this process had so far, the probe's included."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _peak_gpu_bytes(device: torch.device) -> int:
    """Return the most bytes of a GPU this process had so far; 0 for the CPU."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0


def format_plan(plan: Plan, run: Path, device: torch.device) -> list[str]:
    """Return a plan in words, with what would not fit on this machine."""
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
    """Return a line for each thing there is too little of."""
    place = next(path for path in (run, *run.absolute().parents) if path.exists())
    room = [
        (f"the disk of {place}", plan.disk, shutil.disk_usage(place).free),
        ("RAM", plan.host, available_memory(_CPU) + _peak_host_bytes()),
    ]
    if device.type == "cuda":
        room.append((f"{device}", plan.on_gpu, available_memory(device) + _peak_gpu_bytes(device)))
    return [
        f"does not fit: {what}: {_format_megabytes(needed)} are needed, "
        f"{_format_megabytes(free)} are free"
        for what, needed, free in room
        if needed > free
    ]


def _format_megabytes(num_bytes: float) -> str:
    """Return bytes for a reader."""
    return f"{num_bytes / 1e6:,.0f} MB"
