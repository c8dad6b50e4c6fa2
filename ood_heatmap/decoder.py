"""The decoder: features, predicted class and, as an option, feature maps in; a heatmap out."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn import functional

from ood_heatmap.distributed import world_size

SIGNED, MAGNITUDE = "signed", "magnitude"


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
    """

    num_features: int
    num_classes: int
    size: int
    target: str = MAGNITUDE
    width: int = 0
    map_shapes: tuple[tuple[int, int, int], ...] = ()
    num_channels: int = 3

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
        """Channels after each step: the power of two at or above D in [256, 2048], then halves.

        These are the reference's: 512-256-128-64 for D = 512 at 32 px, 256-128-64-32 for 128, and
        2048-1024-512-256-128 for 2048 at 64 px.
        """
        first = self.width or min(2048, max(256, 1 << (self.num_features - 1).bit_length()))
        return tuple(max(16, first >> step) for step in range(self.num_doublings + 1))


class Decoder(nn.Module):
    """A DCGAN-like stack of transposed convolutions.

    Feature maps join at the step whose size is nearest to theirs, each through a 1x1 convolution
    of its own.

    Args:
        config: Its shape.
        feature_range: Minimum and maximum over all ID training features, to scale the input to [0,
            1].

    Source: Hornauer and Belagiannis, Heatmap-based Out-of-Distribution Detection, WACV 2023; the
        stack is that of Radford et al., DCGAN, ICLR 2016.
    """

    feature_range: Tensor

    def __init__(
        self, config: DecoderConfig, feature_range: tuple[float, float] = (0.0, 1.0)
    ) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("feature_range", torch.tensor(feature_range, dtype=torch.float32))
        widths = config.widths
        sizes = [config.first_size << step for step in range(len(widths))]
        self.joins = tuple(
            min(range(len(sizes)), key=lambda step: abs(sizes[step] - height))
            for _, height, _ in config.map_shapes
        )
        self.sizes = sizes
        self.maps = nn.ModuleList(
            block(nn.Conv2d(shape[0], widths[step], 1, bias=False))
            for shape, step in zip(config.map_shapes, self.joins, strict=True)
        )
        self.first = nn.Linear(
            config.num_features + config.num_classes, widths[0] * config.first_size**2, bias=False
        )
        self.first_norm = nn.Sequential(BatchNorm(widths[0]), nn.ReLU())
        self.steps = nn.ModuleList(
            block(
                nn.ConvTranspose2d(
                    before * (1 + self.joins.count(step)), after, 4, 2, 1, bias=False
                )
            )
            for step, (before, after) in enumerate(pairwise(widths))
        )
        self.last = nn.Conv2d(
            widths[-1] * (1 + self.joins.count(len(widths) - 1)), config.num_channels, 1
        )
        self.apply(initialise)

    def forward(self, features: Tensor, prediction: Tensor, maps: Sequence[Tensor] = ()) -> Tensor:
        """Return heatmaps.

        Args:
            features: ``(B, D)`` float32.
            prediction: ``(B,)`` predicted class.
            maps: ``(B, C, h, w)`` of each map in the configuration.

        Returns:
            ``(B, num_channels, size, size)`` in [-1, 1] (signed) or [0, 1] (magnitude).
        """
        low, high = self.feature_range
        classes = torch.arange(self.config.num_classes, device=prediction.device)
        one_hot = (prediction[:, None] == classes).to(features.dtype)
        x = self.first(torch.cat([(features - low) / (high - low), one_hot], dim=1))
        x = self.first_norm(x.unflatten(1, (-1, self.config.first_size, self.config.first_size)))
        for step in range(len(self.sizes)):
            x = torch.cat([x, *self.joining(maps, step)], dim=1)
            if step < len(self.steps):
                x = self.steps[step](x)
        over = (x.shape[2] - self.config.size) // 2
        x = self.last(x)[:, :, over : over + self.config.size, over : over + self.config.size]
        return torch.tanh(x) if self.config.target == SIGNED else torch.sigmoid(x)

    def joining(self, maps: Sequence[Tensor], step: int) -> list[Tensor]:
        """Return the feature maps that join at a step, at its size."""
        size = (self.sizes[step], self.sizes[step])
        return [
            functional.interpolate(convolve(item), size, mode="bilinear")
            if item.shape[2:] != size
            else convolve(item)
            for item, convolve, joins_at in zip(maps, self.maps, self.joins, strict=True)
            if joins_at == step
        ]


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


def block(convolution: nn.Conv2d | nn.ConvTranspose2d) -> nn.Sequential:
    """Return a convolution with its batch norm and ReLU."""
    return nn.Sequential(convolution, BatchNorm(convolution.out_channels), nn.ReLU())


def initialise(module: nn.Module) -> None:
    """Draw weights as DCGAN does: normal, standard deviation 0.02; batch norms around 1."""
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
