"""The training loop against its own ceiling, and against the released code's loop."""

from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import data
import torch
from harness import Row, Setting, cpu_note, interleaved, quotients
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from ood_heatmap.decoder import Decoder, DecoderConfig
from ood_heatmap.heatmap import weighted_squared_error
from ood_heatmap.networks import cifar_resnet18
from ood_heatmap.pipeline.config import TrainConfig
from ood_heatmap.pipeline.feed import (
    ResidentFeed,
    StreamingFeed,
    TrainingBatch,
    TrainingSet,
    epoch_order,
)
from ood_heatmap.pipeline.train import adam, training_step

BARS = {"resident": 0.98, "streaming": 0.95}
BAR_CPU, BAR_GPU = 10, 30
Step = Callable[[TrainingBatch], Tensor]


def rows(setting: Setting) -> Iterator[Row]:
    """Compare both feeds with the ceiling, then an epoch with the released code's."""
    training_set = data.training_set(
        setting.scratch / "train",
        setting.pick(quick=2_000, cpu=50_000),
        setting.pick(quick=400, cpu=10_000),
    )
    yield from against_ceiling(setting, training_set)
    yield against_reference(setting, training_set)


def make_decoder(config: TrainConfig, device: torch.device) -> Decoder:
    """Return a fresh decoder for 32-pixel heatmaps."""
    torch.manual_seed(config.seed)
    shape = DecoderConfig(
        data.NUM_FEATURES, data.NUM_CLASSES, data.SIZE, target=config.target, width=config.width
    )
    return Decoder(shape).to(device).train()


def make_step(decoder: Decoder, config: TrainConfig, device: torch.device) -> Step:
    """Return the step of stage 3, on a decoder laid out as stage 3 does."""
    decoder.to(memory_format=torch.channels_last)
    return training_step(decoder, adam(decoder, config), config, device)


def looping(
    feed: ResidentFeed | StreamingFeed, step: Step, size: int, steps: int, num_rows: int
) -> Callable[[], int]:
    """Return a function that trains for some steps of the next epochs, as stage 3 does."""
    epochs = count()

    def work() -> int:
        orders: list[Tensor] = []
        while len(orders) < steps:
            order = epoch_order(num_rows, 0, next(epochs))
            orders += [order[at : at + size] for at in range(0, num_rows - size + 1, size)]
        total = torch.zeros((), device=device_of(feed))
        for batch in feed.batches(orders[:steps]):
            total += step(batch)
        total.item()
        return steps * size

    return work


def device_of(feed: ResidentFeed | StreamingFeed) -> torch.device:
    """Return where a feed brings its batches."""
    return feed.device


def against_ceiling(setting: Setting, training_set: TrainingSet) -> Iterator[Row]:
    """Compare each feed with the same step on one fixed batch."""
    size = setting.pick(quick=50, cpu=200)
    steps = setting.pick(quick=8, cpu=8, gpu=200)
    config = TrainConfig(batch_size=size, width=setting.pick(quick=64, cpu=256, gpu=0))
    decoder = make_decoder(config, setting.device)
    step = make_step(decoder, config, setting.device)
    resident = ResidentFeed(training_set, setting.device)
    (fixed,) = resident.batches([epoch_order(len(training_set), 0, 0)[:size]])

    def ceiling() -> int:
        total = torch.zeros((), device=setting.device)
        for _ in range(steps):
            total += step(fixed)
        total.item()
        return steps * size

    streaming = StreamingFeed(training_set, setting.device)
    variants = {
        "ceiling": ceiling,
        "resident": looping(resident, step, size, steps, len(training_set)),
        "streaming": looping(streaming, step, size, steps, len(training_set)),
    }
    times = interleaved(variants, setting.windows, setting.device)
    widths = "-".join(map(str, decoder.config.widths))
    for kind, bar in BARS.items():
        note = (
            f"{len(training_set):,} rows, batch {size}, {steps} steps a window, decoder {widths}, "
            f"{setting.device.type}; {cpu_note(times['ceiling'], times[kind])}"
        )
        ratios = quotients(times["ceiling"].wall, times[kind].wall)
        yield Row(f"training loop, {kind} feed: share of the ceiling", ratios, bar, note)


def against_reference(setting: Setting, training_set: TrainingSet) -> Row:
    """Compare the time per image of an epoch with the released code's loop."""
    size = setting.pick(quick=50, cpu=200)
    steps = setting.pick(quick=1, cpu=1, gpu=20)
    config = TrainConfig(batch_size=size, width=setting.pick(quick=64, cpu=0))
    decoder = make_decoder(config, setting.device)
    step = make_step(decoder, config, setting.device)
    feed = ResidentFeed(training_set, setting.device)
    variants = {
        "ours": looping(feed, step, size, 4 * steps, len(training_set)),
        "reference": reference_loop(setting, config, size, steps),
    }
    times = interleaved(variants, setting.windows, setting.device)
    on_gpu = setting.device.type == "cuda"
    widths = "-".join(map(str, decoder.config.widths))
    note = (
        f"time per image, batch {size}, {steps} reference steps a window, decoder {widths} in "
        f"both, cifar-resnet18 in the reference's loop, {setting.device.type}; "
        f"{cpu_note(times['reference'], times['ours'])}"
    )
    ratios = quotients(times["reference"].wall, times["ours"].wall)
    name = "training epoch: the released code's loop / ours"
    return Row(name, ratios, BAR_GPU if on_gpu else BAR_CPU, note)


class Pairs(Dataset[tuple[Tensor, Tensor]]):
    """An image and its nearest ID image, two PNG files decoded anew for each item."""

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
    """Return the released code's loop, written anew: the classifier runs in every step.

    One process decodes; float32; Adam parameter by parameter; the loss is fetched in each step.
    """
    folder = setting.scratch / "pairs"
    pairs = Pairs(
        data.write_pngs(folder / "images", size * steps, seed=1),
        data.write_pngs(folder / "nearest", size * steps, seed=2),
    )
    loader = DataLoader(pairs, batch_size=size, shuffle=True, num_workers=0)
    backbone, head = split_classifier(setting.device)
    decoder = make_decoder(config, setting.device)
    optimizer = torch.optim.Adam(
        decoder.parameters(), config.lr, betas=(0.5, 0.999), foreach=False, fused=False
    )

    def work() -> int:
        total = 0.0
        for images, nearest in loader:
            images, nearest = images.to(setting.device), nearest.to(setting.device)
            with torch.no_grad():
                features = backbone(images)
                prediction = head(features).argmax(dim=1)
            target = ((nearest - images) / 2).abs()
            loss = weighted_squared_error(decoder(features, prediction), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        return size * steps

    return work


def split_classifier(device: torch.device) -> tuple[nn.Module, nn.Module]:
    """Return a random cifar-resnet18 up to its features, and its last layer."""
    torch.manual_seed(0)
    backbone = cifar_resnet18(data.NUM_CLASSES).eval().requires_grad_(False)
    head = backbone.linear
    backbone.linear = nn.Identity()
    return backbone.to(device), head.to(device)
