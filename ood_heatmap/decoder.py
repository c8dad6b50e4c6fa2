"""The decoder: features, predicted class and, as an option, feature maps in; a heatmap out."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn import functional

from ood_heatmap.distributed import world_size

SIGNED, MAGNITUDE = "signed", "magnitude"
PLAIN, DCGAN = "plain", "dcgan"
HIDDEN = 256  # neurons of the plain stack
PLACES = 64  # channels that tell places apart, in the plain stack
Numbers: TypeAlias = float | NDArray[np.float32]


@dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder.

    Args:
        num_features: Width D of the features.
        num_classes: Classes L of the classifier.
        size: Pixels of the square heatmap.
        target: ``signed`` (tanh, [-1, 1]) or ``magnitude`` (sigmoid, [0, 1]).
        width: Channels of the first map; found from D when 0.
        map_shapes: ``(C, h, w)`` of each of the classifier's feature maps that it takes.
        num_channels: Channels of the heatmap.
        stack: ``dcgan``, the paper's: batch norm after each convolution; or ``plain``: no batch
            norm, a hidden layer before the first map, the spread of the deepest feature map beside
            the features, and feature maps that say where and not how much, see ``Places``. It
            trains with noise on its inputs, which batch norm does not bear: its statistics would
            be those of noisy inputs, and the images come without.
    """

    num_features: int
    num_classes: int
    size: int
    target: str = MAGNITUDE
    width: int = 0
    map_shapes: tuple[tuple[int, int, int], ...] = ()
    num_channels: int = 3
    stack: str = DCGAN

    @property
    def num_inputs(self) -> int:
        """Numbers that describe an image beside its class and maps: features, spread of a map."""
        spread = self.map_shapes[0][0] if self.map_shapes and self.stack == PLAIN else 0
        return self.num_features + spread

    @property
    def num_doublings(self) -> int:
        """How often the first map is doubled: as often as it stays at least 4 pixels wide."""
        return max(0, (self.size // 4).bit_length() - 1)

    @property
    def first_size(self) -> int:
        """Pixels of the first map; doubled, they reach ``size`` or just over it."""
        return -(-self.size >> self.num_doublings)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels after each step: from D's power of two, twice D up to 256, then halves.

        These are the reference's: 512-256-128-64 for D = 512 at 32 px, 256-128-64-32 for 128, and
        2048-1024-512-256-128 for 2048 at 64 px.
        """
        power = 1 << (self.num_features - 1).bit_length()
        first = self.width or min(2048, max(power, min(256, 2 * power)))
        return tuple(max(16, first >> step) for step in range(self.num_doublings + 1))


class Decoder(nn.Module):
    """A stack of transposed convolutions.

    Feature maps join at the step whose size is nearest to theirs, each through convolutions of its
    own: beside what is there (``dcgan``), or to be added at the end (``plain``).

    Args:
        config: Its shape.
        feature_range: What becomes 0 and what becomes 1: one number for all inputs or one for each;
            the paper's are the minimum and the maximum over all ID training features.
        map_ranges: The same for the channels of each feature map.

    Source: Hornauer and Belagiannis, Heatmap-based Out-of-Distribution Detection, WACV 2023; the
        stack is that of Radford et al., DCGAN, ICLR 2016.
    """

    feature_range: Tensor

    def __init__(
        self,
        config: DecoderConfig,
        feature_range: tuple[Numbers, Numbers] = (0.0, 1.0),
        map_ranges: Sequence[tuple[Numbers, Numbers]] = (),
    ) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("feature_range", as_range(feature_range, config.num_inputs))
        for number, shape in enumerate(config.map_shapes):
            given = map_ranges[number] if map_ranges else (0.0, 1.0)
            self.register_buffer(f"map_range_{number}", as_range(given, shape[0]))
        widths = config.widths
        sizes = [config.first_size << step for step in range(len(widths))]
        self.joins = tuple(
            min(range(len(sizes)), key=lambda step: abs(sizes[step] - height))
            for _, height, _ in config.map_shapes
        )
        self.sizes = sizes
        joined = [
            (shape[0], widths[step])
            for shape, step in zip(config.map_shapes, self.joins, strict=True)
        ]
        self.maps = nn.ModuleList(
            Places(*channels, config.num_channels)
            if self.is_plain
            else self.block(nn.Conv2d(*channels, 1, bias=False))
            for channels in joined
        )
        # what joins at a step goes on beside what was there
        counts = [
            1 + (0 if self.is_plain else self.joins.count(step)) for step in range(len(sizes))
        ]
        inputs, first = config.num_inputs + config.num_classes, widths[0] * config.first_size**2
        self.hidden = nn.Sequential(nn.Linear(inputs, HIDDEN), nn.ReLU()) if self.is_plain else None
        self.first = nn.Linear(HIDDEN if self.is_plain else inputs, first, bias=self.is_plain)
        norm = nn.Identity() if self.is_plain else BatchNorm(widths[0])
        self.first_norm = nn.Sequential(norm, nn.ReLU())
        self.steps = nn.ModuleList(
            self.block(
                nn.ConvTranspose2d(before * counts[step], after, 4, 2, 1, bias=self.is_plain)
            )
            for step, (before, after) in enumerate(pairwise(widths))
        )
        self.last = nn.Conv2d(widths[-1] * counts[-1], config.num_channels, 1)
        self.apply(initialise_plain if self.is_plain else initialise)
        if self.is_plain:  # begin near the ID images' target, 0 everywhere
            where = [places.last for places in self.maps if isinstance(places, Places)]
            for last in (self.last, *where):
                nn.init.normal_(last.weight, 0.0, 0.02)
            assert self.last.bias is not None
            nn.init.constant_(self.last.bias, 0.0 if config.target == SIGNED else -2.0)

    @property
    def is_plain(self) -> bool:
        """Tell the stack."""
        return self.config.stack == PLAIN

    def block(self, convolution: nn.Conv2d | nn.ConvTranspose2d) -> nn.Sequential:
        """Return a convolution with its ReLU, and the norm between them where the stack has it."""
        if self.is_plain:
            return nn.Sequential(convolution, nn.ReLU())
        return nn.Sequential(convolution, BatchNorm(convolution.out_channels), nn.ReLU())

    def forward(
        self,
        features: Tensor,
        prediction: Tensor,
        maps: Sequence[Tensor] = (),
        noise: Tensor | None = None,
    ) -> Tensor:
        """Return heatmaps.

        Args:
            features: ``(B, D)`` float32.
            prediction: ``(B,)`` predicted class.
            maps: ``(B, C, h, w)`` of each map in the configuration.
            noise: ``(B, num_inputs)``, added to the scaled inputs in training.

        Returns:
            ``(B, num_channels, size, size)`` in [-1, 1] (signed) or [0, 1] (magnitude).
        """
        inputs = [features, maps[0].std(dim=(2, 3))] if self.is_plain and maps else [features]
        low, high = self.feature_range
        x = (torch.cat(inputs, dim=1) - low) / (high - low)
        x = x if noise is None else x + noise
        classes = torch.arange(self.config.num_classes, device=prediction.device)
        one_hot = (prediction[:, None] == classes).to(features.dtype)
        x = torch.cat([x, one_hot], dim=1)
        x = self.first(x if self.hidden is None else self.hidden(x))
        x = self.first_norm(x.unflatten(1, (-1, self.config.first_size, self.config.first_size)))
        where: list[Tensor] = []
        for step in range(len(self.sizes)):
            for number in self.joining(step):
                item = resized(self.scaled(maps[number], number), self.sizes[step])
                if self.is_plain:
                    where.append(resized(self.maps[number](item, x), self.sizes[-1]))
                else:
                    x = torch.cat([x, self.maps[number](item)], dim=1)
            if step < len(self.steps):
                x = self.steps[step](x)
        x = sum(where, start=self.last(x))
        over = (x.shape[2] - self.config.size) // 2
        x = x[:, :, over : over + self.config.size, over : over + self.config.size]
        return torch.tanh(x) if self.config.target == SIGNED else torch.sigmoid(x)

    def joining(self, step: int) -> list[int]:
        """Return the numbers of the feature maps that join at a step."""
        return [number for number, joins_at in enumerate(self.joins) if joins_at == step]

    def scaled(self, item: Tensor, number: int) -> Tensor:
        """Return a feature map with each channel in its range."""
        low, high = self.get_buffer(f"map_range_{number}")[..., None, None]
        scaled: Tensor = (item - low) / (high - low)
        return scaled


class Places(nn.Module):
    """Where in an image, from a feature map beside the decoder's own map of its size.

    The mean over places is taken out, so that a feature map moves the heatmap about and makes it
    neither stronger nor weaker: how much is for the features to say, which know it better.

    Args:
        num_channels: Of the feature map.
        num_beside: Of the decoder's map.
        num_outputs: Of the heatmap.
    """

    def __init__(self, num_channels: int, num_beside: int, num_outputs: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(num_channels + num_beside, PLACES, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(PLACES, PLACES, 3, padding=1),
            nn.ReLU(),
        )
        self.last = nn.Conv2d(PLACES, num_outputs, 1, bias=False)  # a bias is taken out again

    def forward(self, feature_map: Tensor, beside: Tensor) -> Tensor:
        """Return what to add to the heatmap before its tanh or sigmoid.

        Args:
            feature_map: ``(B, C, h, w)``.
            beside: ``(B, num_beside, h, w)``.

        Returns:
            ``(B, num_outputs, h, w)``, each channel with mean 0.
        """
        x = self.last(self.convolutions(torch.cat([feature_map, beside], dim=1)))
        centred: Tensor = x - x.mean(dim=(2, 3), keepdim=True)
        return centred


class BatchNorm(nn.BatchNorm2d):
    """Batch norm with the mean and variance of the batches of all processes together.

    Several processes then train as one would at the same batch size. ``nn.SyncBatchNorm`` does so
    between GPUs only.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return the normalised ``(B, C, H, W)`` in its own dtype."""
        if not self.training or world_size() == 1:
            return super().forward(input)
        x = input.float()
        count, mean, variance = statistics_of_all(x)
        self.track(mean.detach(), (variance * count / (count - 1)).detach())
        scale = self.weight * (variance + self.eps).rsqrt()
        centred = x - mean[:, None, None]
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(input.dtype)

    def track(self, mean: Tensor, variance: Tensor) -> None:
        """Take a batch's statistics into the running ones."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance, self.momentum)
        self.num_batches_tracked.add_(1)


def statistics_of_all(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return how many pixels all processes have together, and their mean and variance.

    Args:
        x: ``(B, C, H, W)`` float32 of this process; B may differ between processes.

    Returns:
        ``()`` and twice ``(C,)`` float32. Gradients flow back to every process.
    """
    variance, mean = (item.double() for item in torch.var_mean(x, (0, 2, 3), correction=0))
    count = torch.full_like(mean[:1], x.numel() // x.shape[1])
    # in float64 the squares cost no digits, and these are a few numbers a channel
    parts = torch.cat([count, count * mean, count * (variance + mean.square())])
    sums: Tensor = all_reduce(parts)  # type: ignore[no-untyped-call]
    count, mean, square = sums[:1], *sums[1:].view(2, -1)
    mean, square = mean / count, square / count
    return count[0].float(), mean.float(), (square - mean.square()).float()


def resized(maps: Tensor, size: int) -> Tensor:
    """Return maps ``(B, C, h, w)`` with ``size`` pixels a side."""
    if maps.shape[2] == maps.shape[3] == size:
        return maps
    return functional.interpolate(maps, (size, size), mode="bilinear")


def as_range(ends: tuple[Numbers, Numbers], count: int) -> Tensor:
    """Return ``(2, count)`` float32: what becomes 0, and what becomes 1."""
    low, high = (torch.as_tensor(end, dtype=torch.float32).expand(count) for end in ends)
    return torch.stack([low, torch.where(high > low, high, low + 1)])  # one value alone: not by 0


def initialise(module: nn.Module) -> None:
    """Draw weights as DCGAN does: normal, standard deviation 0.02; batch norms around 1."""
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)


def initialise_plain(module: nn.Module) -> None:
    """Draw weights that keep the variance through a ReLU (He et al., ICCV 2015)."""
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
        fan_in = module.weight[0].numel()
        if isinstance(module, nn.ConvTranspose2d):  # of 4x4 weights 2x2 meet in a pixel
            fan_in = module.in_channels * module.weight[0, 0].numel() // 4
        nn.init.normal_(module.weight, 0.0, (2 / fan_in) ** 0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
