"""Stage 3 of 4: train the decoder, from cached arrays only."""

import io
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, distributed

from ood_heatmap.adapters.tracking import Epoch, EpochCallback, open_trackers
from ood_heatmap.cache.files import save_tensors
from ood_heatmap.cache.manifest import Manifest
from ood_heatmap.decoder import Decoder, DecoderConfig, decoder_metadata, make_decoder
from ood_heatmap.devices import describe_environment, is_out_of_memory, kernel_selection
from ood_heatmap.distributed import broadcast, is_main, rank, world_size
from ood_heatmap.errors import DamagedCacheError, OodHeatmapError, UsageError
from ood_heatmap.heatmap import pixel_score
from ood_heatmap.pipeline.config import TrainConfig, result_options
from ood_heatmap.pipeline.feed import (
    Feed,
    TrainingBatch,
    TrainingSet,
    iter_batches,
    open_feed,
    read_batch,
)
from ood_heatmap.pipeline.meter import throughput
from ood_heatmap.pipeline.progress import Progress, format_end
from ood_heatmap.pipeline.ranges import input_ranges
from ood_heatmap.pipeline.results import DecoderResults, TargetsResults
from ood_heatmap.pipeline.run import (
    DECODER,
    PRESENCE,
    Index,
    Targets,
    open_index,
    open_targets,
)
from ood_heatmap.pipeline.stage import CHECKPOINT, Stage, run_lock
from ood_heatmap.pipeline.step import (
    Step,
    StepKind,
    lr_at,
    make_adam,
    make_step,
    measure_ceiling,
    set_lr,
    snapshot,
    wrap_ddp,
)
from ood_heatmap.split_decoder import Balance

log = logging.getLogger(__name__)
# number and mean loss of each epoch
_History: TypeAlias = list[dict[str, float]]

_HISTORY = "history.jsonl"
_CHECKPOINT_SECONDS = 10
# largest images of the reference, in pixels
_REFERENCE_SIZE = 64


def train_decoder(
    run: Path,
    device: torch.device,
    config: TrainConfig,
    callbacks: Sequence[EpochCallback] = (),
) -> Manifest:
    """Train the decoder on the cached targets; an interrupted training resumes.

    Args:
        run: A run directory with complete index and targets.
        device: Device to train on.
        config: Settings of the stage.
        callbacks: Called on rank 0 after every epoch.

    Returns:
        The manifest.

    Raises:
        UsageError: A tracker of ``config.log`` is not available.
        OodHeatmapError: Caches are stale or damaged, the disk is full, a batch does not fit in
            memory or has too few images, or the loss is no longer finite.
    """
    if device.type == "cuda":
        # CUDA graphs and events are created on the current device
        torch.cuda.set_device(device)
    with run_lock(run), kernel_selection(deterministic=config.deterministic, benchmark=True):
        index = open_index(run)
        targets = open_targets(run, index)
        config = resolve(config, index)
        data = make_training_set(index, targets, config)
        check_maps(data, config)
        options = result_options(config)
        inputs = {"targets": targets.manifest.fingerprint, "options": options}
        environment = describe_environment(device, deterministic=config.deterministic)
        stage = Stage(run, "decoder", inputs, environment)
        # opened before anything is discarded
        specs = config.log if is_main() else ()
        with open_trackers(specs, run, stage.fingerprint, options) as trackers:
            complete = stage.resume_or_start(overwrite=config.overwrite)
            if complete is not None:
                log.info("%s is already complete", stage.directory)
                return complete
            trained = _train(stage, data, index, device, config, [*callbacks, *trackers])
        manifest = None
        if is_main():
            manifest = _finish(stage, trained, data, index, targets.manifest)
        return broadcast(manifest)


def resolve(config: TrainConfig, index: Index) -> TrainConfig:
    """Return the settings with the number of feature maps that the decoder uses."""
    if config.feature_maps is not None:
        return config
    return replace(config, feature_maps=len(index.results.map_shapes))


def make_training_set(index: Index, targets: Targets, config: TrainConfig) -> TrainingSet:
    """Return the rows that the decoder trains on.

    Raises:
        UsageError: The decoder cannot have this target.
        OodHeatmapError: The targets were made by a version that did not store what it needs.
    """
    if (config.stack == "split") != (config.target == "presence"):
        raise UsageError(
            f"--stack {config.stack} has no --target {config.target}: use split with presence, "
            "plain or dcgan with magnitude or signed."
        )
    if config.stack != "split":
        return TrainingSet(index.columns, targets.columns, config.feature_maps or 0)
    if PRESENCE not in targets.columns:
        raise OodHeatmapError(
            f"the targets of {index.run} have no masks of patches: an earlier version made them. "
            "Run `ood-heatmap targets` again with --overwrite, or train with --stack plain "
            "--target magnitude."
        )
    return TrainingSet(
        index.columns,
        targets.columns,
        config.feature_maps or 0,
        ("heatmap", PRESENCE),
        num_patched=targets.results.num_patched,
    )


def check_maps(data: TrainingSet, config: TrainConfig) -> None:
    """Check that both caches contain the feature maps that the decoder uses."""
    for stage, columns in (("index", data.id_columns), ("targets", data.ood_columns)):
        num_maps = sum(name.startswith("feature_maps_") for name in columns)
        if num_maps < (config.feature_maps or 0):
            raise OodHeatmapError(
                f"the {stage} stage cached {num_maps} feature maps, --feature-maps asks for "
                f"{config.feature_maps}. "
                f"Run `ood-heatmap index` again with --feature-maps {config.feature_maps}, then "
                f"targets; or train with --feature-maps {num_maps}."
            )


def decoder_config(index: Index, size: int, config: TrainConfig) -> DecoderConfig:
    """Return the architecture of the decoder for an index and heatmaps of ``size`` pixels.

    The reference has widths for images of 32 and 64 pixels; others are bounded.
    """
    results = index.results
    shapes = results.map_shapes[: config.feature_maps]
    architecture = DecoderConfig(
        num_features=results.num_features,
        num_classes=results.num_classes,
        size=size,
        target=config.target,
        num_channels=1 if config.target == "presence" else 3,
        width=config.width,
        map_shapes=tuple((shape[0], shape[1], shape[2]) for shape in shapes),
        stack=config.stack,
    )
    has_reference = size == index.size <= _REFERENCE_SIZE
    keep = has_reference or config.width or config.stack == "split"
    return architecture if keep else architecture.bounded()


def _new_decoder(index: Index, size: int, config: TrainConfig, *, resumes: bool = False) -> Decoder:
    """Return an untrained decoder with the ranges of the index's features and feature maps.

    Args:
        index: The index.
        size: Height and width of the heatmaps.
        config: Settings of the stage.
        resumes: A checkpoint holds the ranges: leave them out.
    """
    architecture = decoder_config(index, size, config)
    if resumes:
        return make_decoder(architecture)
    if config.stack == "dcgan":
        return make_decoder(architecture, index.feature_range)
    ranges = broadcast(input_ranges(index, config.feature_maps or 0) if is_main() else None)
    return make_decoder(architecture, *ranges)


@dataclass(frozen=True)
class _Trained:
    """A trained decoder, its history, and throughput stats (empty if no epoch remained)."""

    decoder: Decoder
    history: _History
    stats: Mapping[str, Any]


def _train(
    stage: Stage,
    data: TrainingSet,
    index: Index,
    device: torch.device,
    config: TrainConfig,
    callbacks: Sequence[EpochCallback],
) -> _Trained:
    """Train the epochs after the last checkpoint."""
    config = replace(config, batch_size=min(config.batch_size, len(data)))
    if config.batch_size < world_size():
        raise OodHeatmapError(
            f"a batch of {config.batch_size} images is too small for {world_size()} processes. "
            "Use fewer processes or a larger --batch-size."
        )
    torch.manual_seed(config.seed)
    resumes = _has_checkpoint(stage)
    size = data.columns["heatmap"].shape[-1]
    decoder = _new_decoder(index, size, config, resumes=resumes).to(device)
    # preferred by tensor cores; 1.1 times as fast on a CPU (CPU time, widths 256-128-64-32, batch
    # size 100)
    decoder.to(memory_format=torch.channels_last)
    optimizer = make_adam(decoder, config)
    history = _resume(stage, decoder, optimizer) if resumes else []
    if len(history) == config.epochs:
        return _Trained(decoder, history, {})
    feed_kind, feed = open_feed(data, device, config.feed, config.batch_size)
    log.info(
        "train: %d ID and %d OOD images, %s feed (%.0f MB), decoder %s, %s target",
        *(data.num_id, len(data) - data.num_id, feed_kind, data.num_bytes / 1e6),
        *(f"{config.stack} of {_count(decoder):,} weights", config.target),
    )
    try:
        stats = _run_epochs(stage, data, feed, decoder, optimizer, history, config, callbacks)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise OodHeatmapError(
            f"{device} has no memory for steps of {config.batch_size} images beside the "
            f"{feed_kind} feed. Use a smaller --batch-size, --feed streaming, or --stack plain in "
            "one process, whose steps can be halved."
        ) from error
    return _Trained(decoder, history, {**stats, "feed": feed_kind})


def _run_epochs(
    stage: Stage,
    data: TrainingSet,
    feed: Feed,
    decoder: Decoder,
    optimizer: torch.optim.Optimizer,
    history: _History,
    config: TrainConfig,
    callbacks: Sequence[EpochCallback],
) -> dict[str, Any]:
    """Run the epochs that are missing from the history, and return throughput stats."""
    device, size = decoder.feature_range.device, config.batch_size
    num_batches = len(data) // size
    missing = range(len(history), config.epochs)
    step_kind, step, ceiling = _prepare_step(data, decoder, optimizer, config, len(missing))
    # one iterator over all epochs: the feed prefetches while a checkpoint is written
    batches = feed.batches(iter_batches(len(data), size, config.seed, missing))
    num_images, start = 0, time.perf_counter()
    last_saved = start
    for epoch in missing:
        generator = _noise_generator(config.seed, epoch, device)
        # summed on the device: .item() would wait for the GPU in every step
        total = torch.zeros((), device=device)
        epoch_start = time.perf_counter()
        for number, batch in enumerate(_show_progress(batches, num_batches, epoch, config)):
            step_number = epoch * num_batches + number
            set_lr(optimizer, lr_at(step_number, config.epochs * num_batches, config))
            total += step(_add_noise(batch, generator, decoder.config.num_inputs, config))
        history.append({"epoch": epoch + 1, "loss": _mean_over_ranks(total) / num_batches})
        _check_finite(history, decoder)
        num_images += num_batches * size
        mean_rate = num_images / (time.perf_counter() - start)
        to_come = (missing.stop - epoch - 1) * num_batches * size / mean_rate
        log.info(
            "epoch %d/%d  loss %.3f  %.0f images/s%s",
            *(epoch + 1, config.epochs, history[-1]["loss"], mean_rate),
            f", {format_end(to_come)}" if to_come else "",
        )
        rate = num_batches * size / (time.perf_counter() - epoch_start)
        lr = lr_at((epoch + 1) * num_batches - 1, config.epochs * num_batches, config)
        _report(callbacks, Epoch(epoch + 1, history[-1]["loss"], lr, rate))
        if epoch + 1 == config.epochs or time.perf_counter() - last_saved > _CHECKPOINT_SECONDS:
            _save_checkpoint(stage, decoder, optimizer, history)
            last_saved = time.perf_counter()
    return _training_stats(num_images, time.perf_counter() - start, ceiling, step_kind, device)


def _report(callbacks: Sequence[EpochCallback], epoch: Epoch) -> None:
    """Call the callbacks on rank 0."""
    for callback in callbacks if is_main() else ():
        callback(epoch)


def _prepare_step(
    data: TrainingSet,
    decoder: Decoder,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    num_epochs: int,
) -> tuple[StepKind, Step, float]:
    """Return the training step, its kind and its ceiling; the weights are restored."""
    restore = snapshot(decoder, optimizer)
    device, size = decoder.feature_range.device, config.batch_size
    rows = next(iter_batches(len(data), size, config.seed, [0]))
    generator = _noise_generator(config.seed, 0, device)
    example = read_batch(data, rows, device)
    example = _add_noise(example, generator, decoder.config.num_inputs, config)
    balance = Balance.of(data.num_id, len(data) - data.num_id - data.num_patched, len(data))
    step_kind, step = make_step(wrap_ddp(decoder.train()), optimizer, config, example, balance)
    ceiling = measure_ceiling(step, example, size, num_epochs * (len(data) // size))
    restore()
    return step_kind, step, ceiling


def _show_progress(
    batches: Iterator[TrainingBatch], num_batches: int, epoch: int, config: TrainConfig
) -> Iterator[TrainingBatch]:
    """Yield the batches of an epoch, and show its progress in images on rank 0."""
    progress = Progress(num_batches * config.batch_size, f"train {epoch + 1}/{config.epochs}")
    try:
        for batch in islice(batches, num_batches):
            yield batch
            progress.update(config.batch_size)
    finally:
        progress.close()


def _noise_generator(seed: int, epoch: int, device: torch.device) -> torch.Generator:
    """Return the generator of an epoch's noise; the same after a resume."""
    generator = torch.Generator(device)
    return generator.manual_seed(int(np.random.default_rng([seed, epoch, 1]).integers(2**62)))


def _add_noise(
    batch: TrainingBatch, generator: torch.Generator, num_inputs: int, config: TrainConfig
) -> TrainingBatch:
    """Return the batch with noise for the plain decoder's scaled inputs.

    Every rank draws the noise of the whole batch and keeps that of its own images, so that it does
    not depend on the number of ranks.
    """
    if not config.noise or config.stack == "dcgan":
        return batch
    shape = (config.batch_size, num_inputs)
    noise = torch.randn(shape, generator=generator, device=generator.device)
    return replace(batch, noise=config.noise * noise[rank() :: world_size()])


def _mean_over_ranks(loss: Tensor) -> float:
    """Return the mean of a loss over all ranks."""
    if world_size() > 1:
        distributed.all_reduce(loss)
    return (loss / world_size()).item()


def _training_stats(
    images: int, seconds: float, ceiling: float, step_kind: StepKind, device: torch.device
) -> dict[str, Any]:
    """Log and return the throughput and its ceiling.

    Args:
        images: Number of images over all epochs and ranks.
        seconds: Duration of the training.
        ceiling: Images/s of the step without a feed.
        step_kind: Kind of the step.
        device: Device of this rank.
    """
    stats = throughput(images, seconds, ceiling)
    if "share_of_ceiling" in stats:
        log.info(
            "train: %.0f images/s, %.0f %% of the ceiling (%.0f images/s of the %s step on one "
            "batch)",
            *(stats["images_per_second"], 100 * stats["share_of_ceiling"], ceiling, step_kind),
        )
    else:
        log.info(
            "train: %.0f images/s; the ceiling could not be measured: the %s step on one batch was "
            "slower",
            *(stats["images_per_second"], step_kind),
        )
    return {
        **stats,
        "step": step_kind,
        "device": str(device),
        "processes": world_size(),
    }


def _check_finite(history: _History, decoder: Decoder) -> None:
    """Stop a training that has diverged, before its weights reach a checkpoint."""
    finite = torch.stack([item.isfinite().all() for item in decoder.state_dict().values()]).all()
    if not (np.isfinite(history[-1]["loss"]) and finite):
        raise OodHeatmapError(
            f"the loss is no longer finite in epoch {len(history)}. "
            "Train with a lower --lr and --overwrite."
        )


def _save_checkpoint(
    stage: Stage, decoder: Decoder, optimizer: torch.optim.Optimizer, history: _History
) -> None:
    """Write a checkpoint atomically on rank 0; the state is identical on all ranks."""
    if not is_main():
        return
    state = {
        "fingerprint": stage.fingerprint,
        "decoder": decoder.state_dict(),
        "optimizer": optimizer.state_dict()["state"],
        "history": history,
    }
    # on a full disk torch.save raises unspecific errors: serialize to memory first
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with stage.writing(CHECKPOINT) as scratch:
        scratch.write_bytes(buffer.getbuffer())
    _write_history(stage, history)


def _write_history(stage: Stage, history: _History) -> None:
    """Write the history, a line of JSON for each epoch."""
    with stage.writing(_HISTORY) as scratch:
        scratch.write_text("".join(json.dumps(line) + "\n" for line in history), "utf-8")


def _has_checkpoint(stage: Stage) -> bool:
    """Return whether there is a checkpoint to resume from; on all ranks what rank 0 sees.

    If the checkpoint is damaged, a warning is logged and training starts over.
    """
    path = stage.directory / CHECKPOINT
    if not broadcast(path.is_file() if is_main() else None):
        return False
    if not broadcast(stage.is_intact(CHECKPOINT) if is_main() else None):
        log.warning("%s is damaged: training starts over from the first epoch", path)
        return False
    return True


def _resume(stage: Stage, decoder: Decoder, optimizer: torch.optim.Optimizer) -> _History:
    """Load the last checkpoint and return its history.

    Raises:
        DamagedCacheError: The checkpoint is intact, but has unexpected content.
    """
    path = stage.directory / CHECKPOINT
    # torch.load can raise many types of exceptions
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["fingerprint"] != stage.fingerprint:
            raise KeyError("fingerprint")
        history = [
            {"epoch": int(line["epoch"]), "loss": float(line["loss"])} for line in state["history"]
        ]
        decoder.load_state_dict(state["decoder"])
        # hyperparameters are in the fingerprint; fused and capturable may differ between devices
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state["optimizer"]})
    except Exception as error:
        raise DamagedCacheError(
            f"cannot resume from {path} ({type(error).__name__}). "
            "Delete it to train from the first epoch."
        ) from error
    log.info("train: resuming after epoch %d", len(history))
    return history


def _finish(
    stage: Stage, trained: _Trained, data: TrainingSet, index: Index, targets: Manifest
) -> Manifest:
    """Write decoder and history, then the manifest."""
    decoder = trained.decoder
    # a training that was killed behind its last checkpoint may not have written it
    _write_history(stage, trained.history)
    metadata = decoder_metadata(decoder.config, index.manifest.fingerprint)
    path, record = stage.directory / DECODER, partial(stage.record, DECODER)
    save_tensors(path, decoder.state_dict(), metadata, record=record)
    results = DecoderResults(
        decoder=asdict(decoder.config),
        num_parameters=_count(decoder),
        num_id=data.num_id,
        num_ood=len(data) - data.num_id,
        pairing=TargetsResults.from_manifest(targets).pairing,
        color_max=_color_max(decoder, data),
    )
    return stage.commit(results, [DECODER, _HISTORY], speed=trained.stats)


def _count(decoder: Decoder) -> int:
    """Return the number of trained weights."""
    return sum(item.numel() for item in decoder.parameters())


@torch.inference_mode()
def _color_max(decoder: Decoder, data: TrainingSet) -> float:
    """Return the top of the color scale: the 99th percentile over heatmaps of OOD images.

    It is 1 if the largest pixel of a heatmap is a probability.
    """
    decoder.eval()
    if decoder.has_level:
        return 1.0
    rows = data.num_id + np.linspace(0, len(data) - data.num_id - 1, 256).astype(np.int64)
    batch = read_batch(data, np.unique(rows), decoder.feature_range.device)
    maps = [item.float() for item in batch.maps]
    heatmap, _ = decoder.detect(batch.features, batch.prediction, maps)
    pixel_scores = pixel_score(heatmap).flatten()[:1_000_000].cpu()
    return round(float(torch.quantile(pixel_scores, 0.99)), 4)
