"""Stage 3 of 4: train the decoder, from cached arrays alone."""

import io
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed
from tqdm import tqdm

from ood_heatmap.cache.files import save_tensors
from ood_heatmap.cache.manifest import Manifest
from ood_heatmap.cache.shards import Rows
from ood_heatmap.decoder import Decoder, DecoderConfig, decoder_metadata, make_decoder
from ood_heatmap.distributed import broadcast, is_main, rank, world_size
from ood_heatmap.errors import DamagedCacheError, OodHeatmapError
from ood_heatmap.heatmap import pixel_score
from ood_heatmap.pipeline.config import TrainConfig, result_options
from ood_heatmap.pipeline.feed import (
    Feed,
    TrainingBatch,
    TrainingSet,
    batches_of,
    open_feed,
    read_batch,
)
from ood_heatmap.pipeline.results import DecoderResults, TargetsResults
from ood_heatmap.pipeline.run import DECODER, Index, open_index, open_targets
from ood_heatmap.pipeline.stage import CHECKPOINT, Stage, run_lock
from ood_heatmap.pipeline.step import (
    Step,
    adam,
    lr_at,
    make_step,
    measure_ceiling,
    set_lr,
    shared,
    snapshot,
)

log = logging.getLogger(__name__)

HISTORY = "history.jsonl"
CHECKPOINT_SECONDS = 10
ROWS_AT_ONCE = 4096
Float32 = NDArray[np.float32]


def train_decoder(run: Path, device: torch.device, config: TrainConfig) -> Manifest:
    """Train the decoder against the cached targets.

    A stopped run goes on after its last checkpoint.

    Args:
        run: A run directory with finished index and targets.
        device: Where to train.
        config: Settings of the stage.

    Returns:
        The manifest.

    Raises:
        OodHeatmapError: See the design: stale or damaged caches, a full disk, too few images for a
            batch.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where graphs and events are made
    with run_lock(run):
        index = open_index(run)
        targets = open_targets(run, index)
        data = TrainingSet(index.columns, targets.columns, config.feature_maps)
        check_maps(data, config)
        inputs = {"targets": targets.manifest.fingerprint, "options": result_options(config)}
        stage = Stage(run, "decoder", inputs)
        complete = stage.resume_or_start(overwrite=config.overwrite)
        if complete is not None:
            log.info("%s is already complete", stage.directory)
            return complete
        decoder, speed = train(stage, data, index, device, config)
        manifest = None
        if is_main():
            manifest = finish(stage, decoder, data, index, targets.manifest, speed)
        return broadcast(manifest)


def check_maps(data: TrainingSet, config: TrainConfig) -> None:
    """Make sure that both caches hold the feature maps that the decoder shall take."""
    for stage, columns in (("index", data.id_columns), ("targets", data.ood_columns)):
        have = sum(name.startswith("feature_maps_") for name in columns)
        if have < config.feature_maps:
            raise OodHeatmapError(
                f"the {stage} stage cached {have} feature maps, --feature-maps asks for "
                f"{config.feature_maps}. "
                f"Run `ood-heatmap index` again with --feature-maps {config.feature_maps}, then "
                f"targets; or train with --feature-maps {have}."
            )


def decoder_config(index: Index, config: TrainConfig) -> DecoderConfig:
    """Return the decoder's shape for an index."""
    results = index.results
    shapes = results.map_shapes[: config.feature_maps]
    return DecoderConfig(
        num_features=results.num_features,
        num_classes=results.num_classes,
        size=index.columns["images"].shape[-1],
        target=config.target,
        width=config.width,
        map_shapes=tuple((shape[0], shape[1], shape[2]) for shape in shapes),
        stack=config.stack,
    )


def new_decoder(index: Index, config: TrainConfig) -> Decoder:
    """Return an untrained decoder with the ranges of an index's features and feature maps."""
    shape = decoder_config(index, config)
    if config.stack == "dcgan":
        return make_decoder(shape, index.feature_range)
    maps = [index.columns[f"feature_maps_{number + 1}"] for number in range(config.feature_maps)]
    inputs = [spread_of(index.columns["features"])]
    if maps:
        inputs.append(spread_of(maps[0], lambda rows: rows.std(axis=(2, 3), ddof=1)))
    low, high = (np.concatenate(ends) for ends in zip(*inputs, strict=True))
    return make_decoder(shape, (low, high), [spread_of(item, as_locations) for item in maps])


def as_locations(maps: Float32) -> Float32:
    """Return feature maps ``(B, C, h, w)`` as ``(B h w, C)``."""
    locations: Float32 = maps.transpose(0, 2, 3, 1).reshape(-1, maps.shape[1])
    return locations


def spread_of(
    column: Rows, numbers: Callable[[Float32], Float32] = lambda rows: rows
) -> tuple[Float32, Float32]:
    """Return the mean of each number over all rows, and the mean plus one standard deviation.

    In float64, a piece at a time.

    Args:
        column: Of the index.
        numbers: Rows to ``(M, N)``.
    """
    count, total, squares = 0, np.float64(0), np.float64(0)
    for part in column:
        for start in range(0, len(part), ROWS_AT_ONCE):
            rows = numbers(part[start : start + ROWS_AT_ONCE].astype(np.float32))
            count += len(rows)
            total = total + rows.sum(axis=0, dtype=np.float64)
            squares = squares + np.square(rows, dtype=np.float64).sum(axis=0)
    mean = total / count
    deviation = np.sqrt(np.maximum(squares / count - mean**2, 0))
    return np.float32(mean), np.float32(mean + deviation)


def train(
    stage: Stage,
    data: TrainingSet,
    index: Index,
    device: torch.device,
    config: TrainConfig,
) -> tuple[Decoder, dict[str, Any]]:
    """Train; the checkpoint and the history are written on the way.

    Returns:
        The decoder, and how fast it was; nothing of that when no epoch was missing.
    """
    config = replace(config, batch_size=min(config.batch_size, len(data)))
    require_images(config)
    torch.manual_seed(config.seed)
    torch.backends.cudnn.benchmark = True  # every batch has the same shape
    # channels_last: what tensor cores want; on a CPU 1.1 times as fast as the default (by CPU time,
    # widths 256-128-64-32, batch 100)
    decoder = new_decoder(index, config).to(device)
    decoder.to(memory_format=torch.channels_last)
    optimizer = adam(decoder, config)
    history = resume(stage, decoder, optimizer)
    if len(history) == config.epochs:
        return decoder, {}
    kind, feed = open_feed(data, device, config.feed, config.batch_size)
    log.info(
        "train: %d ID and %d OOD images, %s feed (%.0f MB), decoder %s, %s target",
        *(data.num_id, len(data) - data.num_id, kind, data.num_bytes / 1e6),
        *("-".join(map(str, decoder.config.widths)), config.target),
    )
    try:
        speed = run_epochs(stage, data, feed, decoder, optimizer, history, config)
    except torch.OutOfMemoryError as error:
        raise OodHeatmapError(
            f"{device} has no memory for steps of {config.batch_size} images beside the {kind} "
            f"feed. Use a smaller --batch-size, --feed streaming, or --stack plain in one process: "
            f"its steps can be halved."
        ) from error
    return decoder, report(speed, kind, device)


def require_images(config: TrainConfig) -> None:
    """Make sure that each process gets a part of each batch."""
    if config.batch_size < world_size():
        raise OodHeatmapError(
            f"a batch of {config.batch_size} images is too small for {world_size()} processes. "
            f"Use fewer, or a larger --batch-size."
        )


@dataclass(frozen=True)
class Speed:
    """How fast the training was.

    Args:
        images: Trained on, in all epochs together.
        seconds: That took.
        ceiling: Images/s of the step alone.
        step: ``plain``, ``compiled`` or ``graph``.
    """

    images: int
    seconds: float
    ceiling: float
    step: str


def run_epochs(
    stage: Stage,
    data: TrainingSet,
    feed: Feed,
    decoder: Decoder,
    optimizer: torch.optim.Optimizer,
    history: list[dict[str, float]],
    config: TrainConfig,
) -> Speed:
    """Run the epochs that are missing from the history."""
    device, size, first = decoder.feature_range.device, config.batch_size, len(history)
    num_batches = len(data) // size
    model = shared(decoder.train())
    restore = snapshot(decoder, optimizer)
    example = read_batch(data, next(batches_of(len(data), size, config.seed, [0])), device)
    example = next(with_noise(iter([example]), decoder, config, 0))
    kind, step = make_step(model, optimizer, config, example)
    ceiling = measure_ceiling(step, example, size, (config.epochs - first) * num_batches)
    restore()
    # one iterator for all epochs: a feed reads on while the checkpoint is written
    batches = feed.batches(batches_of(len(data), size, config.seed, range(first, config.epochs)))
    started = saved = time.perf_counter()
    for epoch in range(first, config.epochs):
        begun = epoch * num_batches
        rates = [lr_at(begun + i, config.epochs * num_batches, config) for i in range(num_batches)]
        noisy = with_noise(islice(batches, num_batches), decoder, config, epoch)
        total = run_epoch(step, noisy, optimizer, rates, device, epoch, config)
        history.append({"epoch": epoch + 1, "loss": mean_of_all(total).item() / num_batches})
        check_loss(history, stage)
        images = (epoch + 1 - first) * num_batches * size
        log.info(
            "epoch %d/%d  loss %.3f  %.0f images/s",
            *(epoch + 1, config.epochs, history[-1]["loss"]),
            images / (time.perf_counter() - started),
        )
        if time.perf_counter() - saved > CHECKPOINT_SECONDS or epoch + 1 == config.epochs:
            checkpoint(stage, decoder, optimizer, history)
            saved = time.perf_counter()
    return Speed(images, time.perf_counter() - started, ceiling, kind)


def run_epoch(
    step: Step,
    batches: Iterator[TrainingBatch],
    optimizer: torch.optim.Optimizer,
    rates: list[float],
    device: torch.device,
    epoch: int,
    config: TrainConfig,
) -> Tensor:
    """Take the steps of one epoch and return the sum of their losses, left on the device.

    Nothing in here waits for a GPU.
    """
    total = torch.zeros((), device=device)
    shown = tqdm(
        batches,
        f"train {epoch + 1}/{config.epochs}",
        len(rates),
        leave=False,
        disable=None if is_main() and log.isEnabledFor(logging.INFO) else True,
        unit_scale=config.batch_size,
        unit=" images",
    )
    for batch, lr in zip(shown, rates, strict=True):
        set_lr(optimizer, lr)
        total += step(batch)
    return total


def with_noise(
    batches: Iterator[TrainingBatch], decoder: Decoder, config: TrainConfig, epoch: int
) -> Iterator[TrainingBatch]:
    """Yield the batches with noise for the decoder's inputs.

    A function of seed and epoch alone: the same after a stop, and for any number of processes.
    """
    if not (config.noise and config.stack == "plain"):
        yield from batches
        return
    device = decoder.feature_range.device
    generator = torch.Generator(device)
    generator.manual_seed(int(np.random.default_rng([config.seed, epoch, 1]).integers(2**62)))
    shape = (config.batch_size, decoder.config.num_inputs)
    for batch in batches:
        noise = torch.randn(shape, generator=generator, device=device)
        yield replace(batch, noise=config.noise * noise[rank() :: world_size()])


def mean_of_all(loss: Tensor) -> Tensor:
    """Return the mean over all processes."""
    if world_size() > 1:
        distributed.all_reduce(loss)
    return loss / world_size()


def report(speed: Speed, feed: str, device: torch.device) -> dict[str, Any]:
    """Say how fast it was, and how near to what the device can do, and return it."""
    rate = speed.images / speed.seconds
    log.info(
        "train: %.0f images/s, %.0f %% of the ceiling (%.0f images/s of the %s step on one batch)",
        *(rate, 100 * rate / speed.ceiling, speed.ceiling, speed.step),
    )
    return {
        "images": speed.images,
        "seconds": round(speed.seconds, 3),
        "images_per_second": round(rate, 1),
        "ceiling_images_per_second": round(speed.ceiling, 1),
        "share_of_ceiling": round(rate / speed.ceiling, 4),
        "step": speed.step,
        "feed": feed,
        "device": str(device),
        "processes": world_size(),
    }


def check_loss(history: list[dict[str, float]], stage: Stage) -> None:
    """Stop when training has broken down."""
    if not np.isfinite(history[-1]["loss"]):
        raise OodHeatmapError(
            f"the loss is no longer finite in epoch {len(history)}. The checkpoint before it is "
            f"kept in "
            f"{stage.directory}; use a lower --lr."
        )


def checkpoint(
    stage: Stage,
    decoder: Decoder,
    optimizer: torch.optim.Optimizer,
    history: list[dict[str, float]],
) -> None:
    """Write what is needed to go on, whole or not at all; equal in all processes, so one writes."""
    if not is_main():
        return
    state = {
        "fingerprint": stage.fingerprint,
        "decoder": decoder.state_dict(),
        "optimizer": optimizer.state_dict()["state"],
        "history": history,
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with stage.writing(CHECKPOINT) as scratch:
        scratch.write_bytes(buffer.getbuffer())
    write_history(stage, history)


def write_history(stage: Stage, history: list[dict[str, float]]) -> None:
    """Write the history, a line of JSON for each epoch."""
    with stage.writing(HISTORY) as scratch:
        scratch.write_text("".join(json.dumps(line) + "\n" for line in history), "utf-8")


def resume(
    stage: Stage, decoder: Decoder, optimizer: torch.optim.Optimizer
) -> list[dict[str, float]]:
    """Take up the last checkpoint, if there is one, and return the history so far."""
    path = stage.directory / CHECKPOINT
    if not path.is_file():
        return []
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["fingerprint"] != stage.fingerprint:
            raise KeyError("fingerprint")
        decoder.load_state_dict(state["decoder"])
        # the settings are in the fingerprint; how Adam is launched may differ on another device
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state["optimizer"]})
        history: list[dict[str, float]] = state["history"]
    except Exception as error:  # torch.load raises many kinds for a damaged file
        raise DamagedCacheError(
            f"{path} cannot be taken up ({type(error).__name__}). Delete it to train from the "
            f"start."
        ) from error
    log.info("train: going on after epoch %d", len(history))
    return history


def finish(
    stage: Stage,
    decoder: Decoder,
    data: TrainingSet,
    index: Index,
    targets: Manifest,
    speed: Mapping[str, Any],
) -> Manifest:
    """Write the decoder with all it needs to be used, then the manifest."""
    metadata = decoder_metadata(decoder.config, index.manifest.fingerprint)
    path, record = stage.directory / DECODER, partial(stage.record, DECODER)
    save_tensors(path, decoder.state_dict(), metadata, record=record)
    results = DecoderResults(
        decoder=asdict(decoder.config),
        num_parameters=sum(item.numel() for item in decoder.parameters()),
        num_id=data.num_id,
        num_ood=len(data) - data.num_id,
        pairing=TargetsResults.of(targets).pairing,
        color_max=color_max(decoder, data),
    )
    return stage.commit(results, [DECODER, HISTORY], speed=speed)


@torch.inference_mode()
def color_max(decoder: Decoder, data: TrainingSet) -> float:
    """Return the top of the one colour scale.

    The 99th percentile of heatmaps of OOD training images.
    """
    decoder.eval()
    rows = data.num_id + np.linspace(0, len(data) - data.num_id - 1, 256).astype(np.int64)
    device = next(decoder.parameters()).device
    batch = read_batch(data, np.unique(rows), device)
    heatmap = decoder(batch.features, batch.prediction, [item.float() for item in batch.maps])
    return round(float(torch.quantile(pixel_score(heatmap).flatten()[:1_000_000].cpu(), 0.99)), 4)
