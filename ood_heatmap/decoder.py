"""Decoders: features, predicted class and optionally feature maps in, a heatmap out."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, distributed, nn
from torch.nn import functional

from ood_heatmap.distributed import world_size
from ood_heatmap.errors import DamagedCacheError

_Target: TypeAlias = Literal["signed", "magnitude"]
_Stack: TypeAlias = Literal["plain", "dcgan"]
# the values mapped to 0 and to 1, for all channels or for each
_Range: TypeAlias = tuple[float | NDArray[np.float32], float | NDArray[np.float32]]

# neurons of the plain decoder's hidden layer, and channels of its spatial branches
_HIDDEN_WIDTH, _SPATIAL_WIDTH = 256, 64
# of a decoder whose widths are not the reference's, which has 0.1 to 2.1 billion
_MAX_MULTIPLICATIONS = 200_000_000
_UNIT_RANGE = (0.0, 1.0)


@dataclass(frozen=True)
class DecoderConfig:
    """Architecture of a decoder; the defaults of a run are those of ``TrainConfig``.

    Args:
        num_features: Width D of the features.
        num_classes: Classes L of the classifier.
        size: Height and width of the heatmap.
        target: ``signed`` (tanh, [-1, 1]) or ``magnitude`` (sigmoid, [0, 1]).
        width: Channels of the first map; derived from D if 0.
        map_shapes: ``(C, h, w)`` of each feature map that the decoder uses.
        num_channels: Channels of the heatmap.
        stack: ``dcgan`` for ``DcganDecoder``, ``plain`` for ``PlainDecoder``.
    """

    num_features: int
    num_classes: int
    size: int
    target: _Target
    width: int = 0
    map_shapes: tuple[tuple[int, int, int], ...] = ()
    num_channels: int = 3
    stack: _Stack = field(kw_only=True)

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("target", self.target, get_args(_Target)),
            ("stack", self.stack, get_args(_Stack)),
        ):
            if value not in choices:
                raise ValueError(f"{name} of a decoder must be one of {choices}, got {value!r}")

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "DecoderConfig":
        """Read a configuration from JSON, where tuples are lists."""
        maps = tuple((shape[0], shape[1], shape[2]) for shape in content["map_shapes"])
        return cls(**{**content, "map_shapes": maps})

    @property
    def num_inputs(self) -> int:
        """Number of scaled inputs, without the one-hot class: features and, if used, map stds."""
        map_std = self.map_shapes[0][0] if self.map_shapes and self.stack == "plain" else 0
        return self.num_features + map_std

    @property
    def num_doublings(self) -> int:
        """Number of upsampling steps: the first map is at least 4 pixels wide."""
        return max(0, (self.size // 4).bit_length() - 1)

    @property
    def first_size(self) -> int:
        """Width of the first map; doubled ``num_doublings`` times it is at least ``size``."""
        return -(-self.size >> self.num_doublings)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Width of the first map and of the map after each step."""
        return tuple(self.first_size << step for step in range(self.num_doublings + 1))

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of the first map and after each step: a power of two from D, then halved.

        Those of the reference are 512-256-128-64 for D = 512 at 32 px, 256-128-64-32 for 128, and
        2048-1024-512-256-128 for 2048 at 64 px.
        """
        power = 1 << (self.num_features - 1).bit_length()
        first = self.width or min(2048, max(power, min(256, 2 * power)))
        return tuple(max(16, first >> step) for step in range(self.num_doublings + 1))

    @property
    def multiplications(self) -> int:
        """Number of multiplications in the transposed convolutions, for one image."""
        steps = zip(self.sizes, pairwise(self.widths), strict=False)
        # each pixel of the smaller map is multiplied by 4x4 weights
        return sum(16 * size**2 * before * after for size, (before, after) in steps)

    def bounded(self) -> "DecoderConfig":
        """Halve the first width until an image takes at most 200 million multiplications."""
        config = self
        while config.multiplications > _MAX_MULTIPLICATIONS and config.widths[0] > 16:
            config = replace(config, width=config.widths[0] // 2)
        return config

    @property
    def joins(self) -> tuple[int, ...]:
        """Step at which each feature map joins: the one whose map is nearest to it in size."""
        steps = range(len(self.sizes))
        return tuple(
            min(steps, key=lambda step: abs(self.sizes[step] - height))
            for _, height, _ in self.map_shapes
        )


class Decoder(nn.Module):
    """Base class of both decoders: scaling of inputs and feature maps, range of the output.

    Args:
        config: The architecture.
        feature_range: Range of the inputs; in the paper, minimum and maximum over all ID training
            features.
        map_ranges: Range of the channels of each feature map.
    """

    feature_range: Tensor

    def __init__(
        self,
        config: DecoderConfig,
        feature_range: _Range = _UNIT_RANGE,
        map_ranges: Sequence[_Range] = (),
    ) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("feature_range", _to_range(feature_range, config.num_inputs))
        for number, shape in enumerate(config.map_shapes):
            map_range = map_ranges[number] if map_ranges else _UNIT_RANGE
            self.register_buffer(f"map_range_{number}", _to_range(map_range, shape[0]))
        # numbers of the feature maps that join at each step
        self._joining = [
            [number for number, joins_at in enumerate(config.joins) if joins_at == step]
            for step in range(len(config.sizes))
        ]

    def _scale_inputs(self, inputs: Tensor, prediction: Tensor, noise: Tensor | None) -> Tensor:
        """Return ``(B, num_inputs + L)``: scaled inputs, plus noise if any, and the one-hot class.

        Args:
            inputs: ``(B, num_inputs)``.
            prediction: ``(B,)``.
            noise: ``(B, num_inputs)`` or None.
        """
        low, high = self.feature_range
        x = (inputs - low) / (high - low)
        x = x if noise is None else x + noise
        classes = torch.arange(self.config.num_classes, device=prediction.device)
        one_hot = (prediction[:, None] == classes).to(inputs.dtype)
        return torch.cat([x, one_hot], dim=1)

    def _scale_map(self, feature_map: Tensor, number: int, size: int) -> Tensor:
        """Return feature map ``number``, scaled and ``size`` pixels wide."""
        low, high = self.get_buffer(f"map_range_{number}")[..., None, None]
        return _resize((feature_map - low) / (high - low), size)

    def _to_heatmap(self, logits: Tensor) -> Tensor:
        """Crop the centre of ``(B, num_channels, h, w)`` and map it to the range of the target."""
        size = self.config.size
        start = (logits.shape[2] - size) // 2
        logits = logits[:, :, start : start + size, start : start + size]
        # under autocast: near 1 a bfloat16 has steps of 1/256, and targets have steps of 1/255
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return torch.tanh(logits) if self.config.target == "signed" else torch.sigmoid(logits)


class DcganDecoder(Decoder):
    """The paper's decoder: transposed convolutions with batch norm.

    Each feature map goes through a 1x1 convolution and is concatenated to the decoder's map.

    Source: Hornauer and Belagiannis, Heatmap-based Out-of-Distribution Detection, WACV 2023; the
        architecture is that of Radford et al., DCGAN, ICLR 2016.
    """

    def __init__(
        self,
        config: DecoderConfig,
        feature_range: _Range = _UNIT_RANGE,
        map_ranges: Sequence[_Range] = (),
    ) -> None:
        super().__init__(config, feature_range, map_ranges)
        widths = config.widths
        self.maps = nn.ModuleList(
            _norm_block(nn.Conv2d(shape[0], widths[step], 1, bias=False))
            for shape, step in zip(config.map_shapes, config.joins, strict=True)
        )
        num_inputs = config.num_inputs + config.num_classes
        self.first = nn.Linear(num_inputs, widths[0] * config.first_size**2, bias=False)
        self.first_norm = nn.Sequential(_BatchNorm(widths[0]), nn.ReLU())
        # each feature map that joins adds as many channels as the decoder's map has
        joined = [
            width * (1 + len(joining)) for width, joining in zip(widths, self._joining, strict=True)
        ]
        self.steps = nn.ModuleList(
            _norm_block(nn.ConvTranspose2d(before, after, 4, 2, 1, bias=False))
            for before, after in zip(joined[:-1], widths[1:], strict=True)
        )
        self.last = nn.Conv2d(joined[-1], config.num_channels, 1)
        self.apply(_init_dcgan)

    def forward(
        self,
        features: Tensor,
        prediction: Tensor,
        maps: Sequence[Tensor] = (),
        noise: Tensor | None = None,
    ) -> Tensor:
        """Return heatmaps, see ``PlainDecoder.forward``."""
        x = self.first(self._scale_inputs(features, prediction, noise))
        size = self.config.first_size
        x = self.first_norm(x.unflatten(1, (-1, size, size)))
        for step, joining in enumerate(self._joining):
            for number in joining:
                feature_map = self._scale_map(maps[number], number, x.shape[2])
                x = torch.cat([x, self.maps[number](feature_map)], dim=1)
            if step < len(self.steps):
                x = self.steps[step](x)
        return self._to_heatmap(self.last(x))


class PlainDecoder(Decoder):
    """Transposed convolutions without batch norm, trained with noise on the inputs.

    With batch norm, the noise would change the statistics, and inference has no noise. Inputs are
    the features and the standard deviations of the deepest feature map. Feature maps affect where a
    heatmap is high, not how high it is on average, see ``_SpatialBranch``.
    """

    def __init__(
        self,
        config: DecoderConfig,
        feature_range: _Range = _UNIT_RANGE,
        map_ranges: Sequence[_Range] = (),
    ) -> None:
        super().__init__(config, feature_range, map_ranges)
        widths = config.widths
        branches = [
            _SpatialBranch(shape[0], widths[step], config.num_channels)
            for shape, step in zip(config.map_shapes, config.joins, strict=True)
        ]
        self.maps = nn.ModuleList(branches)
        num_inputs = config.num_inputs + config.num_classes
        self.hidden = nn.Sequential(nn.Linear(num_inputs, _HIDDEN_WIDTH), nn.ReLU())
        self.first = nn.Linear(_HIDDEN_WIDTH, widths[0] * config.first_size**2)
        self.steps = nn.ModuleList(
            nn.Sequential(nn.ConvTranspose2d(before, after, 4, 2, 1), nn.ReLU())
            for before, after in pairwise(widths)
        )
        self.last = nn.Conv2d(widths[-1], config.num_channels, 1)
        self.apply(_init_he)
        # start near the target of ID images, which is 0 everywhere
        for last in (self.last, *(branch.last for branch in branches)):
            nn.init.normal_(last.weight, 0.0, 0.02)
        assert self.last.bias is not None
        nn.init.constant_(self.last.bias, 0.0 if config.target == "signed" else -2.0)

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
            noise: ``(B, num_inputs)`` added to the scaled inputs, in training only.

        Returns:
            ``(B, num_channels, size, size)`` in [-1, 1] (signed) or [0, 1] (magnitude).
        """
        inputs = torch.cat([features, maps[0].std(dim=(2, 3))], dim=1) if maps else features
        x = self.first(self.hidden(self._scale_inputs(inputs, prediction, noise)))
        size = self.config.first_size
        x = functional.relu(x.unflatten(1, (-1, size, size)))
        corrections: list[Tensor] = []
        for step, joining in enumerate(self._joining):
            for number in joining:
                feature_map = self._scale_map(maps[number], number, x.shape[2])
                correction = self.maps[number](feature_map, x)
                corrections.append(_resize(correction, self.config.sizes[-1]))
            if step < len(self.steps):
                x = self.steps[step](x)
        return self._to_heatmap(sum(corrections, start=self.last(x)))


def make_decoder(
    config: DecoderConfig,
    feature_range: _Range = _UNIT_RANGE,
    map_ranges: Sequence[_Range] = (),
) -> Decoder:
    """Make an untrained decoder; see ``Decoder`` for the arguments."""
    if config.stack == "dcgan":
        return DcganDecoder(config, feature_range, map_ranges)
    return PlainDecoder(config, feature_range, map_ranges)


def decoder_metadata(config: DecoderConfig, index_fingerprint: str) -> dict[str, str]:
    """Return the metadata of a decoder's safetensors file."""
    # one entry: the order of several would vary between files
    content = {"decoder": asdict(config), "index": index_fingerprint}
    return {"ood_heatmap": json.dumps(content)}


def load_decoder(content: bytes, path: Path) -> Decoder:
    """Load a trained decoder, in evaluation mode.

    Args:
        content: A safetensors file with ``decoder_metadata``.
        path: Its path, for messages.

    Raises:
        DamagedCacheError: The file is not a decoder.
    """
    try:
        # a safetensors file starts with the length of its JSON header
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        about = json.loads(header["__metadata__"]["ood_heatmap"])
        decoder = make_decoder(DecoderConfig.from_json(about["decoder"]))
        decoder.load_state_dict(load(content))
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise DamagedCacheError(f"{path} is not a decoder ({reason}). Train again.") from error
    return decoder.eval()


class _SpatialBranch(nn.Module):
    """Adds a zero-mean correction, so feature maps decide where and the features how much.

    Inputs are a feature map and the decoder's map of the same size. The spatial mean is removed:
    features predict the strength of a heatmap better than a feature map does.

    Args:
        num_channels: Channels of the feature map.
        decoder_width: Channels of the decoder's map.
        num_outputs: Channels of the heatmap.
    """

    def __init__(self, num_channels: int, decoder_width: int, num_outputs: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(num_channels + decoder_width, _SPATIAL_WIDTH, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(_SPATIAL_WIDTH, _SPATIAL_WIDTH, 3, padding=1),
            nn.ReLU(),
        )
        # no bias: removing the mean would cancel it
        self.last = nn.Conv2d(_SPATIAL_WIDTH, num_outputs, 1, bias=False)

    def forward(self, feature_map: Tensor, decoder_map: Tensor) -> Tensor:
        """Return the correction to the heatmap's logits.

        Args:
            feature_map: ``(B, C, h, w)``.
            decoder_map: ``(B, decoder_width, h, w)``.

        Returns:
            ``(B, num_outputs, h, w)``, each channel with mean 0.
        """
        x = self.last(self.convolutions(torch.cat([feature_map, decoder_map], dim=1)))
        centred: Tensor = x - x.mean(dim=(2, 3), keepdim=True)
        return centred


class _BatchNorm(nn.BatchNorm2d):
    """Batch norm with mean and variance over the batches of all ranks.

    Training is then equivalent to one rank with the same total batch size. ``nn.SyncBatchNorm``
    supports only GPUs.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return the normalised ``(B, C, H, W)`` in its own dtype."""
        if not self.training or world_size() == 1:
            return super().forward(input)
        x = input.float()
        count, mean, variance = _all_reduce_statistics(x)
        self._update_running_statistics(mean.detach(), (variance * count / (count - 1)).detach())
        scale = self.weight * (variance + self.eps).rsqrt()
        centred = x - mean[:, None, None]
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(input.dtype)

    def _update_running_statistics(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance, self.momentum)
        self.num_batches_tracked.add_(1)


def _all_reduce_statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the number of pixels over all ranks, and their mean and variance.

    Args:
        x: ``(B, C, H, W)`` float32 of this rank; B may differ between ranks.

    Returns:
        ``()``, ``(C,)`` and ``(C,)`` float32. Gradients flow back to every rank.
    """
    variance, mean = (item.double() for item in torch.var_mean(x, (0, 2, 3), correction=0))
    count = torch.full_like(mean[:1], x.numel() // x.shape[1])
    # in float64 the squares lose no digits, and these are a few numbers per channel
    parts = torch.cat([count, count * mean, count * (variance + mean.square())])
    sums: Tensor = _AllReduce.apply(parts)
    count, mean, square = sums[:1], *sums[1:].view(2, -1)
    mean, square = mean / count, square / count
    return count[0].float(), mean.float(), (square - mean.square()).float()


class _AllReduce(torch.autograd.Function):
    """The sum over all ranks, also of the gradients: what every rank returns depends on all inputs.

    PyTorch's own differentiable ``all_reduce`` is deprecated.
    """

    @staticmethod
    def forward(_: Any, input: Tensor) -> Tensor:
        """Return the sum of the inputs of all ranks, of the same shape."""
        total = input.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Return the sum of the gradients of all ranks."""
        return _AllReduce.forward(ctx, gradient)


def _norm_block(convolution: nn.Conv2d | nn.ConvTranspose2d) -> nn.Sequential:
    """Return a convolution with batch norm and ReLU."""
    return nn.Sequential(convolution, _BatchNorm(convolution.out_channels), nn.ReLU())


def _resize(maps: Tensor, size: int) -> Tensor:
    """Interpolate maps ``(B, C, h, w)`` to ``(B, C, size, size)``."""
    if maps.shape[2] == maps.shape[3] == size:
        return maps
    return functional.interpolate(maps, (size, size), mode="bilinear")


def _to_range(ends: _Range, count: int) -> Tensor:
    """Return ``(2, count)`` float32: what becomes 0, and what becomes 1."""
    low, high = (torch.as_tensor(end, dtype=torch.float32).expand(count) for end in ends)
    # a constant input must not be divided by 0
    return torch.stack([low, torch.where(high > low, high, low + 1)])


def _init_dcgan(module: nn.Module) -> None:
    """Initialise as DCGAN: weights N(0, 0.02), batch norm weights N(1, 0.02)."""
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)


def _init_he(module: nn.Module) -> None:
    """Initialise weights to preserve variance through ReLUs (He et al., ICCV 2015); biases 0."""
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
        fan_in = module.weight[0].numel()
        if isinstance(module, nn.ConvTranspose2d):
            # with stride 2, 2x2 of the 4x4 weights contribute to an output pixel
            fan_in = module.in_channels * module.weight[0, 0].numel() // 4
        nn.init.normal_(module.weight, 0.0, (2 / fan_in) ** 0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
