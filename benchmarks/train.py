"""The training loop against its throughput ceiling, and against the released code's loop."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from typing import Literal

import data
import torch
from harness import Row, Setting, cpu_note, interleaved, quotients
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from ood_heatmap.decoder import Decoder, DecoderConfig, make_decoder
from ood_heatmap.heatmap import weighted_squared_error
from ood_heatmap.networks import cifar_resnet18
from ood_heatmap.pipeline.config import TrainConfig
from ood_heatmap.pipeline.feed import (
    Feed,
    TrainingBatch,
    TrainingSet,
    iter_batches,
    open_feed,
    read_batch,
)
from ood_heatmap.pipeline.step import Step, make_adam, make_step
from ood_heatmap.pipeline.train import _add_noise, _noise_generator

PAPER = TrainConfig(
    stack="dcgan", target="signed", feature_maps=0, noise=0, region_weight=0, schedule="constant"
)
CONFIGS = {"the paper's decoder": PAPER, "the default decoder": TrainConfig(feature_maps=1)}
BARS: dict[Literal["resident", "memory", "streaming"], float] = {
    "resident": 0.98,
    "memory": 0.95,
    "streaming": 0.95,
}
BAR_CPU, BAR_GPU = 10, 30


def rows(setting: Setting) -> Iterator[Row]:
    """Compare all feeds with the ceiling, then an epoch with the released code's."""
    sizes = setting.pick(quick=2_000, cpu=50_000), setting.pick(quick=400, cpu=10_000)
    for name, config in CONFIGS.items():
        folder = setting.scratch / name.replace(" ", "-")
        training_set = data.training_set(
            folder, *sizes, config.feature_maps or 0, split=config.stack == "split"
        )
        yield from against_ceiling(setting, training_set, name, config)
        if config is PAPER:
            yield against_reference(setting, training_set)
        shutil.rmtree(folder)


def fresh_decoder(config: TrainConfig, device: torch.device) -> Decoder:
    """Return an untrained decoder for 32-pixel heatmaps."""
    torch.manual_seed(config.seed)
    shape = DecoderConfig(
        data.NUM_FEATURES,
        data.NUM_CLASSES,
        data.SIZE,
        target=config.target,
        width=config.width,
        map_shapes=(data.MAP_SHAPE,) * (config.feature_maps or 0),
        num_channels=1 if config.stack == "split" else 3,
        stack=config.stack,
    )
    return make_decoder(shape).to(device).train()


def prepare_step(
    config: TrainConfig, training_set: TrainingSet, device: torch.device
) -> tuple[str, Step, TrainingBatch, Decoder]:
    """Return the kind of step that stage 3 uses, the step, a batch on the device, the decoder."""
    decoder = fresh_decoder(config, device)
    decoder.to(memory_format=torch.channels_last)
    rows = next(iter_batches(len(training_set), config.batch_size, config.seed, [0]))
    generator = _noise_generator(config.seed, 0, device)
    batch = read_batch(training_set, rows, device)
    batch = _add_noise(batch, generator, decoder.config.num_inputs, config)
    kind, step = make_step(decoder, make_adam(decoder, config), config, batch)
    return kind, step, batch, decoder


def make_loop(
    feed: Feed, step: Step, decoder: Decoder, config: TrainConfig, steps: int, num_rows: int
) -> Callable[[], int]:
    """Return a function that trains for some steps, as stage 3 does.

    One iterator of batches continues over all epochs, and so over all windows.
    """
    size, device = config.batch_size, decoder.feature_range.device
    batches = feed.batches(iter_batches(num_rows, size, 0, count()))
    generator = _noise_generator(config.seed, 0, device)

    def work() -> int:
        total = torch.zeros((), device=device)
        for batch in islice(batches, steps):
            total += step(_add_noise(batch, generator, decoder.config.num_inputs, config))
        total.item()
        return steps * size

    return work


def against_ceiling(
    setting: Setting, training_set: TrainingSet, name: str, config: TrainConfig
) -> Iterator[Row]:
    """Compare each feed with the same step on one fixed batch."""
    device, num_rows = setting.device, len(training_set)
    size = setting.pick(quick=50, cpu=200)
    steps = setting.pick(quick=8, cpu=8, gpu=200)
    width = setting.pick(quick=64, cpu=256, gpu=0)
    config = replace(config, batch_size=size, width=width)
    step_kind, step, fixed, decoder = prepare_step(config, training_set, device)

    def ceiling() -> int:
        total = torch.zeros((), device=device)
        for _ in range(steps):
            total += step(fixed)
        total.item()
        return steps * size

    variants = {"ceiling": ceiling}
    for kind in BARS:
        _, feed = open_feed(training_set, device, kind, size)
        variants[kind] = make_loop(feed, step, decoder, config, steps, num_rows)
    times = interleaved(variants, setting.windows, device)
    widths = "-".join(map(str, decoder.config.widths))
    for kind, bar in BARS.items():
        note = (
            f"{num_rows:,} rows, batch {size}, {steps} {step_kind} steps a window, widths "
            f"{widths}, feature maps: {config.feature_maps}, {device.type}; "
            f"{cpu_note(times['ceiling'], times[kind])}"
        )
        ratios = quotients(times["ceiling"].wall, times[kind].wall)
        yield Row(f"training loop of {name}, {kind} feed: share of the ceiling", ratios, bar, note)


def against_reference(setting: Setting, training_set: TrainingSet) -> Row:
    """Compare the time per image of an epoch with the released code's loop."""
    size = setting.pick(quick=50, cpu=200)
    steps = setting.pick(quick=1, cpu=1, gpu=20)
    config = replace(PAPER, batch_size=size, width=setting.pick(quick=64, cpu=0))
    device, num_rows = setting.device, len(training_set)
    step_kind, step, _, decoder = prepare_step(config, training_set, device)
    _, feed = open_feed(training_set, device, "resident", size)
    variants = {
        "ours": make_loop(feed, step, decoder, config, 4 * steps, num_rows),
        "reference": reference_loop(setting, config, size, steps),
    }
    times = interleaved(variants, setting.windows, setting.device)
    on_gpu = setting.device.type == "cuda"
    widths = "-".join(map(str, decoder.config.widths))
    note = (
        f"time per image, batch {size}, {steps} reference steps a window against {4 * steps} "
        f"{step_kind} ones, decoder {widths} in both, cifar-resnet18 in the "
        f"reference's loop, {device.type}; "
        f"{cpu_note(times['reference'], times['ours'])}"
    )
    ratios = quotients(times["reference"].wall, times["ours"].wall)
    name = "training epoch: the released code's loop / ours"
    return Row(name, ratios, BAR_GPU if on_gpu else BAR_CPU, note)


class Pairs(Dataset[tuple[Tensor, Tensor]]):
    """An image and its nearest ID image, two PNG files decoded again for each item."""

    def __init__(self, images: Path, nearest: Path) -> None:
        self.paths = list(zip(sorted(images.iterdir()), sorted(nearest.iterdir()), strict=True))
        middle = (0.5, 0.5, 0.5)
        self.transform = transforms.Compose(
            [transforms.ToTensor(), transforms.Normalize(middle, middle)]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, item: int) -> tuple[Tensor, Tensor]:
        """Return both as float32 ``(3, H, W)`` in [-1, 1]."""
        image, nearest = (
            self.transform(Image.open(path).convert("RGB")) for path in self.paths[item]
        )
        return image, nearest


def reference_loop(
    setting: Setting, config: TrainConfig, size: int, steps: int
) -> Callable[[], int]:
    """Return a reimplementation of the released code's loop: the classifier runs in every step.

    Decoding in the main process, float32, Adam without foreach or fused, ``loss.item()`` each step.
    """
    folder = setting.scratch / "pairs"
    pairs = Pairs(
        data.write_pngs(folder / "images", size * steps, seed=1),
        data.write_pngs(folder / "nearest", size * steps, seed=2),
    )
    loader = DataLoader(pairs, batch_size=size, shuffle=True, num_workers=0)
    backbone, head = split_classifier(setting.device)
    decoder = fresh_decoder(config, setting.device)
    optimizer = torch.optim.Adam(
        decoder.parameters(), config.lr, betas=(0.5, 0.999), foreach=False, fused=False
    )

    def work() -> int:
        total = 0.0
        for batch in loader:
            images, nearest = (item.to(setting.device) for item in batch)
            with torch.no_grad():
                features = backbone(images)
                prediction = head(features).argmax(dim=1)
            target = (nearest - images) / 2
            loss = weighted_squared_error(decoder(features, prediction), target)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += loss.item()
        return size * steps

    return work


def split_classifier(device: torch.device) -> tuple[nn.Module, nn.Module]:
    """Return a random cifar-resnet18, split into backbone and last layer."""
    torch.manual_seed(0)
    backbone = cifar_resnet18(data.NUM_CLASSES).eval().requires_grad_(False)
    head: nn.Module = backbone.linear  # type: ignore[assignment]
    backbone.linear = nn.Identity()
    return backbone.to(device), head.to(device)
