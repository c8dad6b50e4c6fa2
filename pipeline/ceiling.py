"""The ceiling of localization: a U-Net on pixels, trained on the patched images of a run.

The decoder sees features of a classifier that was trained for something else; the U-Net sees the
pixels and learns from the same patched images. It shows what these images allow.
"""

import logging
from collections.abc import Callable
from itertools import pairwise, starmap

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, interpolate, max_pool2d

from ood_heatmap.decoding import iter_batches
from ood_heatmap.errors import UsageError
from ood_heatmap.images import ImageSet, Transform
from ood_heatmap.pipeline.config import LocalizeConfig
from ood_heatmap.pipeline.patched import PastePlan, pasted_images
from ood_heatmap.pipeline.pixel_methods import resize
from ood_heatmap.pipeline.progress import Progress
from ood_heatmap.pipeline.run import Index, Targets, redraw_paste_plan
from ood_heatmap.pipeline.stage import INTERMEDIATE, Stage

log = logging.getLogger(__name__)
_Float32 = NDArray[np.float32]
_UInt8 = NDArray[np.uint8]

CEILING = "U-Net on pixels"
_WEIGHTS = f"ceiling{INTERMEDIATE}"
# side of the images that it works on, at most, and patched images that it is trained on, at most
_MAX_SIDE, _MAX_IMAGES = 112, 32_768
# pixels that it is trained with over all epochs, and at most has: some ten minutes on two cores
_NUM_PIXELS = 150_000_000
_BATCH_SIZE, _MAX_LR = 64, 3e-3
# pixels that go through the network at once, which bounds its activations to some 500 MB
_MAX_PIXELS_AT_ONCE = 200_000
_WIDTHS = (16, 32, 64, 96, 96)


def train_ceiling(
    stage: Stage,
    index: Index,
    targets: Targets,
    images: ImageSet,
    device: torch.device,
    config: LocalizeConfig,
) -> Callable[[_UInt8], _Float32]:
    """Train a U-Net on the patched images of a run; ``config.seed`` determines the result.

    Its weights are kept until the stage is complete: one that is interrupted later does not train
    again.

    Args:
        stage: The stage of ``localize``.
        index: Index of the run, with the ID images.
        targets: Targets of the run, which say what was pasted where.
        images: OOD training images, those of the targets.
        device: Device to train on.
        config: Settings of ``localize``.

    Returns:
        A function of images ``(B, 3, H, W)`` uint8 to pixel scores ``(B, H, W)`` float32.

    Raises:
        UsageError: The images are not those of the targets, or no images were patched.
    """
    if images.describe() != targets.manifest.inputs["images"]:
        raise UsageError(
            f"--ceiling {images.source} is not the OOD training set of {targets.run}, which is "
            f"{targets.results.source}: name that."
        )
    plan = redraw_paste_plan(targets, index)
    if not len(plan):
        raise UsageError(
            f"the targets of {targets.run} have no patched images, which --ceiling trains with: "
            "leave it out, or run `targets` with --patched."
        )
    size = min(index.size, _MAX_SIDE)
    if not stage.is_intact(_WEIGHTS):
        pixels, presence = _read_patched(index, plan, images, size, config)
        # after reading, which may draw random numbers too
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            trained = _UNet().to(device)
            _train(trained, pixels, presence, device)
        with stage.writing(_WEIGHTS) as scratch:
            scratch.write_bytes(save(trained.state_dict()))
    with torch.device("meta"):
        network = _UNet()
    network.load_state_dict(load_file(stage.directory / _WEIGHTS, str(device)), assign=True)

    @torch.inference_mode()
    def score(pixels: _UInt8) -> _Float32:
        logits = [
            network(_to_input(chunk.to(device), size)).cpu()
            for chunk in torch.split(torch.from_numpy(pixels), _BATCH_SIZE)
        ]
        scores: _Float32 = resize(torch.cat(logits), pixels.shape[-1]).numpy()
        return scores

    return score


def _read_patched(
    index: Index, plan: PastePlan, images: ImageSet, size: int, config: LocalizeConfig
) -> tuple[Tensor, Tensor]:
    """Return patched images and the opacity of their patches, as the decoder was trained with.

    Returns:
        ``(B, 3, size, size)`` and ``(B, size, size)`` uint8.
    """
    transform = index.classifier_config.transform
    patched = pasted_images(images, index.columns["images"], plan, transform, size)
    count = max(1, min(len(plan), _MAX_IMAGES, _NUM_PIXELS // size**2))
    numbers = np.sort(np.random.default_rng(config.seed).choice(len(plan), count, replace=False))
    progress, done = Progress(count, "ceiling: read"), 0
    pixels = torch.empty(count, 3, size, size, dtype=torch.uint8)
    presence = torch.empty(count, size, size, dtype=torch.uint8)
    for batch in iter_batches(
        patched,
        [numbers[start : start + _BATCH_SIZE] for start in range(0, count, _BATCH_SIZE)],
        # patched images are already at the input size
        Transform(index.size),
        workers=config.num_workers,
        skip_unreadable=config.skip_unreadable,
    ):
        chunk = slice(done, done + len(batch.rows))
        pixels[chunk] = interpolate(
            torch.from_numpy(batch.pixels).float(), size, mode="area"
        ).round()
        presence[chunk] = torch.from_numpy(batch.masks)
        done = chunk.stop
        progress.update(len(batch.rows))
    progress.close()
    return pixels[:done], presence[:done]


def _train(network: nn.Module, pixels: Tensor, presence: Tensor, device: torch.device) -> None:
    """Train with the binary cross-entropy of each pixel to the opacity of the patch."""
    count = len(pixels)
    epochs = max(1, round(_NUM_PIXELS / presence.numel()))
    batch_size = min(_BATCH_SIZE, count)
    steps = epochs * (count // batch_size)
    at_once = max(1, _MAX_PIXELS_AT_ONCE // presence[0].numel())
    optimizer = torch.optim.AdamW(network.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _MAX_LR, total_steps=steps + 1)
    progress = Progress(steps * batch_size, "ceiling: train")
    for _ in range(epochs):
        total = torch.zeros((), device=device)
        order = torch.randperm(count)[: count // batch_size * batch_size]
        for rows in torch.split(order, batch_size):
            batch, target = pixels[rows].to(device), presence[rows].to(device).float() / 255
            # half of the batches are mirrored
            if torch.rand(()) < 0.5:
                batch, target = batch.flip(-1), target.flip(-1)
            optimizer.zero_grad(set_to_none=True)
            # gradients of parts of the batch add up to those of all of it
            for part, wanted in zip(
                *(torch.split(item, at_once) for item in (batch, target)), strict=True
            ):
                logits = network(_to_input(part, part.shape[-1]))
                loss = binary_cross_entropy_with_logits(logits, wanted) * len(part) / batch_size
                loss.backward()  # type: ignore[no-untyped-call]
                total += loss.detach()
            optimizer.step()
            schedule.step()
            progress.update(batch_size)
        log.debug("ceiling: loss %.4f", total.item() / (count // batch_size))
    progress.close()


def _to_input(pixels: Tensor, size: int) -> Tensor:
    """Return uint8 images as ``(B, 3, size, size)`` float32 in [-1, 1]."""
    scaled = pixels.float() / 127.5 - 1
    return scaled if size == pixels.shape[-1] else interpolate(scaled, size, mode="area")


class _UNet(nn.Module):
    """Images ``(B, 3, H, W)`` to logits ``(B, H, W)``.

    Source: after Ronneberger et al., U-Net, MICCAI 2015.
    """

    def __init__(self) -> None:
        super().__init__()
        widths = (3, *_WIDTHS)
        self.down = nn.ModuleList(starmap(_make_block, pairwise(widths)))
        above = [sum(pair) for pair in pairwise(_WIDTHS)]
        self.up = nn.ModuleList(map(_make_block, above, _WIDTHS[:-1]))
        self.head = nn.Conv2d(_WIDTHS[0], 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits."""
        x = images
        skipped: list[Tensor] = []
        for block in self.down:
            x = block(max_pool2d(x, 2, ceil_mode=True) if skipped else x)
            skipped.append(x)
        for block, skip in zip(reversed(self.up), reversed(skipped[:-1]), strict=True):
            x = block(torch.cat([interpolate(x, skip.shape[-2:]), skip], dim=1))
        logits: Tensor = self.head(x)[:, 0]
        return logits


def _make_block(before: int, after: int) -> nn.Sequential:
    """Make two convolutions with group norm, which treats each image by itself."""
    layers: list[nn.Module] = []
    for channels in (before, after):
        layers += [
            nn.Conv2d(channels, after, 3, padding=1, bias=False),
            nn.GroupNorm(8, after),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers)
