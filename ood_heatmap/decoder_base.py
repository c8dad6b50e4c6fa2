"""What all decoders share: their configuration, scaling of inputs, and range of the output."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from ood_heatmap.heatmap import pixel_score, score

_Target: TypeAlias = Literal["presence", "signed", "magnitude"]
_Stack: TypeAlias = Literal["split", "plain", "dcgan"]
# the values mapped to 0 and to 1, for all channels or for each
Range: TypeAlias = tuple[float | NDArray[np.float32], float | NDArray[np.float32]]

# of a decoder whose widths are not the reference's, which has 0.1 to 2.1 billion
_MAX_MULTIPLICATIONS = 200_000_000
UNIT_RANGE = (0.0, 1.0)


@dataclass(frozen=True)
class DecoderConfig:
    """Architecture of a decoder; the defaults of a run are those of ``TrainConfig``.

    Args:
        num_features: Width D of the features.
        num_classes: Classes L of the classifier.
        size: Height and width of the heatmap.
        target: ``presence`` of OOD content (sigmoid, [0, 1]); ``signed`` (tanh, [-1, 1]) or
            ``magnitude`` (sigmoid, [0, 1]) of the difference to the nearest ID image.
        width: Channels of the first map; derived from D if 0.
        map_shapes: ``(C, h, w)`` of each feature map that the decoder uses.
        num_channels: Channels of the heatmap.
        stack: ``split`` for ``SplitDecoder``, ``dcgan`` for ``DcganDecoder``, ``plain`` for
            ``PlainDecoder``.

    Raises:
        ValueError: An unknown target or stack; or ``presence`` for another stack than ``split``, or
            another target for it.
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
        if (self.stack == "split") != (self.target == "presence"):
            raise ValueError(f"a {self.stack} decoder has no {self.target} target")

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "DecoderConfig":
        """Read a configuration from JSON, where tuples are lists."""
        maps = tuple((shape[0], shape[1], shape[2]) for shape in content["map_shapes"])
        return cls(**{**content, "map_shapes": maps})

    @property
    def num_inputs(self) -> int:
        """Number of scaled inputs, without the one-hot class: features and, if used, map stds."""
        map_std = self.map_shapes[0][0] if self.map_shapes and self.stack != "dcgan" else 0
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
    """Base class of all decoders: scaling of inputs and feature maps, range of the output.

    Args:
        config: The architecture.
        feature_range: Range of the inputs; in the paper, minimum and maximum over all ID training
            features.
        map_ranges: Range of the channels of each feature map.
    """

    feature_range: Tensor
    # whether a heatmap is made of the level of its image and log-odds of pixels
    has_level = False
    # whether the predicted class has an influence on where a heatmap is high
    places_see_class = True

    def __init__(
        self,
        config: DecoderConfig,
        feature_range: Range = UNIT_RANGE,
        map_ranges: Sequence[Range] = (),
    ) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("feature_range", _to_range(feature_range, config.num_inputs))
        for number, shape in enumerate(config.map_shapes):
            map_range = map_ranges[number] if map_ranges else UNIT_RANGE
            self.register_buffer(f"map_range_{number}", _to_range(map_range, shape[0]))
        # numbers of the feature maps that join at each step
        self._joining = [
            [number for number, joins_at in enumerate(config.joins) if joins_at == step]
            for step in range(len(config.sizes))
        ]

    def detect(
        self, features: Tensor, prediction: Tensor, maps: Sequence[Tensor] = ()
    ) -> tuple[Tensor, Tensor]:
        """Return what ``heatmap`` makes heatmaps of, and image scores.

        Args:
            features: ``(B, D)`` float32.
            prediction: ``(B,)`` predicted class.
            maps: ``(B, C, h, w)`` of each map in the configuration.

        Returns:
            ``(B, num_channels, size, size)`` and ``(B,)``, both float32; a larger score is more
            OOD. It is the mean pixel score, unless the decoder has an image head.
        """
        heatmap = self(features, prediction, maps).float()
        return heatmap, score(heatmap)

    def heatmap(self, places: Tensor, level: Tensor, local: Tensor | None = None) -> Tensor:
        """Return heatmaps ``(B, num_channels, size, size)``.

        Args:
            places: The first output of ``detect``.
            level: ``(B,)`` log-odds that an image is OOD; for decoders with ``has_level``.
            local: Log-odds of pixels whatever their image is, of the shape of ``places``, likewise.
        """
        return places

    def place_scores(
        self, features: Tensor, prediction: Tensor, maps: Sequence[Tensor] = ()
    ) -> Tensor:
        """Return how OOD each pixel is, ``(B, size, size)`` float32, to say where an image is OOD.

        Args:
            features: See ``detect``.
            prediction: See ``detect``.
            maps: See ``detect``.
        """
        return pixel_score(self.detect(features, prediction, maps)[0])

    def _scale_inputs(
        self,
        features: Tensor,
        prediction: Tensor,
        noise: Tensor | None,
        maps: Sequence[Tensor] = (),
    ) -> Tensor:
        """Return ``(B, num_inputs + L)``: scaled inputs, plus noise if any, and the one-hot class.

        Args:
            features: ``(B, D)``.
            prediction: ``(B,)``.
            noise: ``(B, num_inputs)`` or None.
            maps: Feature maps; standard deviations of the first over its locations are inputs too.
        """
        inputs = torch.cat([features, maps[0].std(dim=(2, 3))], dim=1) if maps else features
        low, high = self.feature_range
        x = (inputs - low) / (high - low)
        x = x if noise is None else x + noise
        classes = torch.arange(self.config.num_classes, device=prediction.device)
        one_hot = (prediction[:, None] == classes).to(inputs.dtype)
        return torch.cat([x, one_hot], dim=1)

    def _scale_map(self, feature_map: Tensor, number: int, size: int) -> Tensor:
        """Return feature map ``number``, scaled and ``size`` pixels wide."""
        low, high = self.get_buffer(f"map_range_{number}")[..., None, None]
        return resize((feature_map - low) / (high - low), size)

    def _to_heatmap(self, logits: Tensor) -> Tensor:
        """Crop the centre of ``(B, num_channels, h, w)`` and map it to the range of the target."""
        size = self.config.size
        start = (logits.shape[2] - size) // 2
        logits = logits[:, :, start : start + size, start : start + size]
        # under autocast: near 1 a bfloat16 has steps of 1/256, and targets have steps of 1/255
        logits = at_least_float32(logits)
        return torch.tanh(logits) if self.config.target == "signed" else torch.sigmoid(logits)


def at_least_float32(values: Tensor) -> Tensor:
    """Convert bfloat16 and float16 to float32; leave float32 and float64 as they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def resize(maps: Tensor, size: int) -> Tensor:
    """Interpolate maps ``(B, C, h, w)`` to ``(B, C, size, size)``."""
    if maps.shape[2] == maps.shape[3] == size:
        return maps
    return functional.interpolate(maps, (size, size), mode="bilinear")


def _to_range(ends: Range, count: int) -> Tensor:
    """Return ``(2, count)`` float32: what becomes 0, and what becomes 1."""
    low, high = (torch.as_tensor(end, dtype=torch.float32).expand(count) for end in ends)
    # a constant input must not be divided by 0
    return torch.stack([low, torch.where(high > low, high, low + 1)])


def init_he(module: nn.Module) -> None:
    """Initialise weights to preserve variance through ReLUs (He et al., ICCV 2015); biases 0."""
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
        fan_in = module.weight[0].numel()
        if isinstance(module, nn.ConvTranspose2d):
            # with stride 2, 2x2 of the 4x4 weights contribute to an output pixel
            fan_in = module.in_channels * module.weight[0, 0].numel() // 4
        nn.init.normal_(module.weight, 0.0, (2 / fan_in) ** 0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
