"""Stage 3 of 4: train the decoder, from cached arrays alone."""

import copy
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from ood_heatmap.cache.files import locked, replacing
from ood_heatmap.cache.manifest import (
    CHECKPOINT,
    Manifest,
    Stage,
    check_files,
    read_manifest,
    require_from,
)
from ood_heatmap.decoder import SIGNED, Decoder, DecoderConfig
from ood_heatmap.errors import DamagedCacheError, OodHeatmapError
from ood_heatmap.heatmap import strength, target_heatmap, weighted_squared_error
from ood_heatmap.pipeline.config import TrainConfig
from ood_heatmap.pipeline.feed import (
    ResidentFeed,
    StreamingFeed,
    TrainingBatch,
    TrainingSet,
    choose_feed,
    epoch_order,
)
from ood_heatmap.pipeline.index import Index, open_index
from ood_heatmap.pipeline.log import log_event
from ood_heatmap.pipeline.targets import open_targets

log = logging.getLogger(__name__)

DECODER, HISTORY = "decoder.safetensors", "history.jsonl"
CHECKPOINT_SECONDS = 10
CEILING_SECONDS = 2.0


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
    with locked(run):
        index = open_index(run)
        targets = open_targets(run, index)
        data = TrainingSet(index.columns, targets.columns, config.feature_maps)
        check_maps(data, config)
        inputs = {"targets": targets.manifest.fingerprint, "options": options_of(config)}
        stage = Stage(run, "decoder", inputs)
        finished = stage.begin(overwrite=config.overwrite)
        if finished is not None:
            log.info("%s is finished already", stage.directory)
            return finished
        decoder = train(
            stage, data, decoder_config(index, config), index.feature_range, device, config
        )
        return finish(stage, decoder, data, index, targets.manifest, config)


def options_of(config: TrainConfig) -> dict[str, Any]:
    """Return the settings that the result depends on."""
    return {
        name: value for name, value in asdict(config).items() if name not in ("overwrite", "feed")
    }


def check_maps(data: TrainingSet, config: TrainConfig) -> None:
    """Make sure that both caches hold the feature maps that the decoder shall take."""
    for stage, columns in (("index", data.id_columns), ("targets", data.ood_columns)):
        have = sum(name.startswith("feature_maps_") for name in columns)
        if have < config.feature_maps:
            raise OodHeatmapError(
                f"the {stage} stage cached {have} feature maps, --feature-maps asks for "
                f"{config.feature_maps}. "
                f"Run `ood-heatmap index` again with --feature-maps {config.feature_maps}, then "
                f"targets."
            )


def decoder_config(index: Index, config: TrainConfig) -> DecoderConfig:
    """Return the decoder's shape for an index."""
    results = index.manifest.results
    shapes = [tuple(shape) for shape in results["map_shapes"][: config.feature_maps]]
    return DecoderConfig(
        num_features=results["num_features"],
        num_classes=results["num_classes"],
        size=index.columns["images"].shape[-1],
        target=config.target,
        width=config.width,
        map_shapes=tuple((shape[0], shape[1], shape[2]) for shape in shapes),
    )


def autocast(device: torch.device, config: TrainConfig) -> torch.autocast:
    """Return the context of a forward pass: bfloat16 with float32 weights, or nothing."""
    half = config.precision == "bfloat16" or (config.precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16, enabled=half)


def training_step(
    decoder: Decoder, optimizer: torch.optim.Optimizer, config: TrainConfig, device: torch.device
) -> Callable[[TrainingBatch], Tensor]:
    """Return the function that takes one step and returns the loss, left on the device."""

    def step(batch: TrainingBatch) -> Tensor:
        with autocast(device, config):
            maps = [item.float() for item in batch.maps]
            heatmap = decoder(batch.features, batch.prediction, maps)
        target = target_heatmap(batch.heatmap, signed=config.target == SIGNED)
        loss = weighted_squared_error(heatmap, target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.detach()

    return step


def adam(decoder: Decoder, config: TrainConfig) -> torch.optim.Adam:
    """Return the reference's optimiser."""
    return torch.optim.Adam(decoder.parameters(), config.lr, betas=(0.5, 0.999), fused=True)


def train(
    stage: Stage,
    data: TrainingSet,
    shape: DecoderConfig,
    feature_range: tuple[float, float],
    device: torch.device,
    config: TrainConfig,
) -> Decoder:
    """Train and return the decoder; the checkpoint and the history are written on the way."""
    torch.manual_seed(config.seed)
    # channels_last: twice as fast as the default, also on CPUs
    decoder = Decoder(shape, feature_range).to(device)
    decoder.to(memory_format=torch.channels_last)
    optimizer = adam(decoder, config)
    history = resume(stage, decoder, optimizer)
    kind = choose_feed(data, device, config.feed)
    feed = (ResidentFeed if kind == "resident" else StreamingFeed)(data, device)
    size = min(config.batch_size, len(data))
    log.info(
        "train: %d ID and %d OOD images, %s feed (%.0f MB), decoder %s, %s target",
        *(data.num_id, len(data) - data.num_id, kind, data.num_bytes / 1e6),
        *("-".join(map(str, shape.widths)), config.target),
    )
    if len(history) == config.epochs:
        return decoder
    ceiling = measure_ceiling(decoder, feed, size, device, config)
    step = training_step(decoder, optimizer, config, device)
    started = saved = time.perf_counter()
    num_images = 0
    decoder.train()
    for epoch in range(len(history), config.epochs):
        order = epoch_order(len(data), config.seed, epoch)
        batches = [order[start : start + size] for start in range(0, len(order) - size + 1, size)]
        total = torch.zeros((), device=device)  # summed on the device: .item() would wait for it
        for batch in tqdm(
            feed.batches(batches),
            f"train {epoch + 1}/{config.epochs}",
            len(batches),
            leave=False,
            disable=None,
            unit_scale=size,
            unit=" images",
        ):
            total += step(batch)
        num_images += len(batches) * size
        history.append({"epoch": epoch + 1, "loss": total.item() / len(batches)})
        check_loss(history, stage)
        rate = num_images / (time.perf_counter() - started)
        log.info(
            "epoch %d/%d  loss %.3f  %.0f images/s",
            epoch + 1,
            config.epochs,
            history[-1]["loss"],
            rate,
        )
        if time.perf_counter() - saved > CHECKPOINT_SECONDS or epoch + 1 == config.epochs:
            checkpoint(stage, decoder, optimizer, history)
            saved = time.perf_counter()
    report(stage, num_images, time.perf_counter() - started, ceiling, kind, device)
    return decoder


def report(
    stage: Stage, num_images: int, seconds: float, ceiling: float, kind: str, device: torch.device
) -> None:
    """Say how fast it was, and how near to what the device can do."""
    rate = num_images / seconds
    log.info(
        "train: %.0f images/s, %.0f %% of the ceiling (%.0f images/s on one resident batch)",
        *(rate, 100 * rate / ceiling, ceiling),
    )
    log_event(
        stage.run,
        "train",
        images=num_images,
        seconds=round(seconds, 3),
        images_per_second=round(rate, 1),
        ceiling=round(ceiling, 1),
        share_of_ceiling=round(rate / ceiling, 4),
        feed=kind,
        device=str(device),
    )


def measure_ceiling(
    decoder: Decoder,
    feed: ResidentFeed | StreamingFeed,
    size: int,
    device: torch.device,
    config: TrainConfig,
) -> float:
    """Return the images/s of the same step on one fixed batch without a loader, on a copy of the
    decoder."""
    twin = copy.deepcopy(decoder).train()
    step = training_step(twin, adam(twin, config), config, device)
    (batch,) = feed.batches([np.arange(size)])
    for _ in range(3):  # the first steps allocate
        step(batch)
    times: list[float] = []
    began = time.perf_counter()
    while time.perf_counter() - began < CEILING_SECONDS or len(times) < 3:
        start = time.perf_counter()
        step(batch).item()
        times.append(time.perf_counter() - start)
    return size / float(np.median(times))


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
    """Write what is needed to go on, whole or not at all."""
    state = {
        "fingerprint": stage.settings_fingerprint,
        "decoder": decoder.state_dict(),
        "optimizer": optimizer.state_dict(),
        "history": history,
    }
    with replacing(stage.directory / CHECKPOINT) as scratch:
        torch.save(state, scratch)
    write_history(stage, history)


def write_history(stage: Stage, history: list[dict[str, float]]) -> None:
    """Write the history, a line of JSON for each epoch."""
    with replacing(stage.directory / HISTORY) as scratch:
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
        if state["fingerprint"] != stage.settings_fingerprint:
            raise KeyError("fingerprint")
        decoder.load_state_dict(state["decoder"])
        optimizer.load_state_dict(state["optimizer"])
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
    config: TrainConfig,
) -> Manifest:
    """Write the decoder with all it needs to be used, then the manifest."""
    shape = asdict(decoder.config)
    # one entry: safetensors writes several in a different order every time
    metadata = {"ood_heatmap": json.dumps({"decoder": shape, "index": index.manifest.fingerprint})}
    with replacing(stage.directory / DECODER) as scratch:
        save_file(
            {name: item.cpu().contiguous() for name, item in decoder.state_dict().items()},
            scratch,
            metadata,
        )
    results = {
        "decoder": shape,
        "num_parameters": sum(item.numel() for item in decoder.parameters()),
        "num_id": data.num_id,
        "num_ood": len(data) - data.num_id,
        "pairing": targets.results["pairing"],
        "color_max": color_max(decoder, data, config),
    }
    return stage.finish("", results, [DECODER, HISTORY])


@torch.inference_mode()
def color_max(decoder: Decoder, data: TrainingSet, config: TrainConfig) -> float:
    """Return the top of the one colour scale.

    The 99th percentile of heatmaps of OOD training images.
    """
    decoder.eval()
    rows = data.num_id + np.linspace(0, len(data) - data.num_id - 1, 256).astype(np.int64)
    device = next(decoder.parameters()).device
    (batch,) = StreamingFeed(data, device).batches([np.unique(rows)])
    heatmap = decoder(batch.features, batch.prediction, [item.float() for item in batch.maps])
    return round(float(torch.quantile(strength(heatmap).flatten()[:1_000_000].cpu(), 0.99)), 4)


@dataclass(frozen=True)
class TrainedDecoder:
    """A finished decoder and its manifest."""

    decoder: Decoder
    manifest: Manifest


def open_decoder(run: Path, index: Manifest, device: torch.device) -> TrainedDecoder:
    """Load a finished decoder.

    Raises:
        OodHeatmapError: It is missing, unfinished, damaged, or of another index.
    """
    manifest = read_manifest(run, "decoder")
    targets = read_manifest(run, "targets")
    require_from(targets, index, run)
    require_from(manifest, targets, run)
    check_files(run, manifest)
    path = run / "decoder" / DECODER
    try:
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["ood_heatmap"])
        decoder = Decoder(shape_from(about["decoder"]))
        decoder.load_state_dict(load_file(path))
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise DamagedCacheError(f"{path} holds no decoder ({error}). Train again.") from error
    decoder.eval().to(device).to(memory_format=torch.channels_last)
    return TrainedDecoder(decoder, manifest)


def shape_from(content: Mapping[str, Any]) -> DecoderConfig:
    """Return a decoder's shape from JSON."""
    maps = tuple((shape[0], shape[1], shape[2]) for shape in content["map_shapes"])
    return DecoderConfig(**{**content, "map_shapes": maps})
