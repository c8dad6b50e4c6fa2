"""The default decoder: an image head says whether an image is OOD, a place head where."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ood_heatmap.decoder_base import (
    UNIT_RANGE,
    Decoder,
    DecoderConfig,
    Range,
    at_least_float32,
    init_he,
    resize,
)

# neurons of the hidden layers of the image head
_IMAGE_WIDTH = 256
# channels of the place head, and dilations of its last convolutions: they see 15 x 15 places
_PLACE_WIDTH, _DILATIONS = 48, (1, 2, 4)
# size of the place head's empty input if there is no feature map
_NO_MAP_SIZE = 4


class Balance(NamedTuple):
    """Weights of images in the loss of the image head, so that ID and OOD images count the same.

    Args:
        id: Weight of an ID image.
        ood: Weight of an OOD image.
    """

    id: float
    ood: float

    @staticmethod
    def of(num_id: int, num_ood: int, num_rows: int) -> "Balance":
        """Return the weights whose sums over ID and over OOD images are half of all rows each."""
        return Balance(num_rows / (2 * max(num_id, 1)), num_rows / (2 * max(num_ood, 1)))


UNBALANCED = Balance(1.0, 1.0)


class SplitLogits(NamedTuple):
    """What a split decoder computes in training.

    Args:
        image: ``(B,)`` log-odds that an image is OOD.
        place: ``(B, 1, size, size)`` log-odds that a pixel is OOD in an ID image with a patch.
        difference: ``(B, 3, size, size)`` in [0, 1], the magnitude of the difference to the nearest
            ID image where OOD content is.
    """

    image: Tensor
    place: Tensor
    difference: Tensor


class SplitDecoder(Decoder):
    """Two heads without a common weight, so that neither can be better at the other's cost.

    The image head is an MLP on the features, the standard deviations of the deepest feature map and
    the predicted class, trained with noise on its inputs to tell ID from auxiliary OOD images. The
    place head sees the feature maps, and each place less the mean of its map, at the size of the
    largest; it is trained on the masks of ID images with a patch. Without a feature map it has
    nothing to see.

    With the log-odds ``g`` of the image (its *level*, see ``Scorer.level``) and ``s`` of its
    places, the heatmap is ``sigmoid(max(g + s - max(s), l))``: the presence of OOD content. Of an
    image that is OOD as a whole it shows where most, and its largest pixel says what the score
    says. In an image that is ID otherwise, ``l`` (see ``Scorer.local``) shows a region that does
    not belong, of which the score of the image knows little. How much the content differs from the
    nearest ID image is a third output.

    Source: Hendrycks et al., Deep Anomaly Detection with Outlier Exposure, ICLR 2019 (auxiliary OOD
        images).
    """

    has_level = True
    places_see_class = False

    def __init__(
        self,
        config: DecoderConfig,
        feature_range: Range = UNIT_RANGE,
        map_ranges: Sequence[Range] = (),
    ) -> None:
        super().__init__(config, feature_range, map_ranges)
        num_inputs = config.num_inputs + config.num_classes
        self.image_head = nn.Sequential(
            nn.Linear(num_inputs, _IMAGE_WIDTH),
            nn.ReLU(),
            nn.Linear(_IMAGE_WIDTH, _IMAGE_WIDTH),
            nn.ReLU(),
        )
        self.image = nn.Linear(_IMAGE_WIDTH, 1)
        width = config.width or _PLACE_WIDTH
        self._size = max([height for _, height, _ in config.map_shapes] or [_NO_MAP_SIZE])
        self.maps = nn.ModuleList(
            nn.Conv2d(2 * channels, width, 1) for channels, _, _ in config.map_shapes
        )
        # where the map is small, convolutions see far at little cost
        self.deepest = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.places = nn.Sequential(
            *(
                layer
                for step in _DILATIONS
                for layer in (nn.ReLU(), nn.Conv2d(width, width, 3, padding=step, dilation=step))
            ),
            nn.ReLU(),
        )
        self.place = nn.Conv2d(width, 1, 1)
        self.difference = nn.Conv2d(width, 3, 1)
        self.apply(init_he)
        # start near what most images and pixels are
        for last, bias in ((self.image, 0.0), (self.place, -2.0), (self.difference, -1.0)):
            nn.init.normal_(last.weight, 0.0, 0.02)
            assert last.bias is not None
            nn.init.constant_(last.bias, bias)

    def forward(
        self,
        features: Tensor,
        prediction: Tensor,
        maps: Sequence[Tensor] = (),
        noise: Tensor | None = None,
    ) -> SplitLogits:
        """Return the outputs of both heads.

        Args:
            features: ``(B, D)`` float32.
            prediction: ``(B,)`` predicted class.
            maps: ``(B, C, h, w)`` of each map in the configuration.
            noise: ``(B, num_inputs)`` added to the scaled inputs of the image head, in training
                only.
        """
        inputs = self._scale_inputs(features, prediction, noise, maps)
        image = self.image(self.image_head(inputs))[:, 0]
        x = self.places(self._join(maps, features))
        place, difference = (
            resize(at_least_float32(head(x)), self.config.size)
            for head in (self.place, self.difference)
        )
        return SplitLogits(at_least_float32(image), place, difference.sigmoid())

    def _join(self, maps: Sequence[Tensor], features: Tensor) -> Tensor:
        """Return the sum of all feature maps as the place head sees them, at one size."""
        # not of len(features) rows: an exported decoder takes any number
        zero = self.place.weight.new_zeros(1, self.place.in_channels, self._size, self._size)
        x = zero + 0 * features[:, :1, None, None]
        for number, values in enumerate(maps):
            scaled = self._scale_map(values, number, values.shape[2])
            centred = scaled - scaled.mean(dim=(2, 3), keepdim=True)
            y = self.maps[number](torch.cat([scaled, centred], dim=1))
            if number == 0:
                for convolution in self.deepest:
                    y = y + convolution(functional.relu(y))
            x = x + resize(y, self._size)
        return x

    def detect(
        self, features: Tensor, prediction: Tensor, maps: Sequence[Tensor] = ()
    ) -> tuple[Tensor, Tensor]:
        """Return the log-odds ``(B, 1, size, size)`` of pixels and ``(B,)`` of images."""
        logits = self(features, prediction, maps)
        return logits.place, logits.image

    def heatmap(self, places: Tensor, level: Tensor, local: Tensor | None = None) -> Tensor:
        """Return heatmaps ``(B, 1, size, size)`` in [0, 1]."""
        below = places - places.amax(dim=(1, 2, 3), keepdim=True)
        log_odds = level[:, None, None, None] + below
        return torch.sigmoid(log_odds if local is None else torch.maximum(log_odds, local))

    def place_scores(
        self, features: Tensor, prediction: Tensor, maps: Sequence[Tensor] = ()
    ) -> Tensor:
        """Return the log-odds of pixels without the level of their image, ``(B, size, size)``.

        The level is the score of the image: it says whether, and not where. Not from the heatmap,
        which is 0 or 1 in float32 where the level is far from 0.
        """
        return relative(self(features, prediction, maps).place)[:, 0]


def relative(log_odds: Tensor) -> Tensor:
    """Return ``(B, C, H, W)`` log-odds less the logarithm of the mean of their exponential."""
    count = log_odds[0].numel()
    level = log_odds.flatten(1).logsumexp(dim=1) - math.log(count)
    return log_odds - level[:, None, None, None]


def split_loss(
    output: SplitLogits,
    presence: Tensor,
    magnitude: Tensor,
    region_power: float,
    balance: Balance,
) -> Tensor:
    """Return the mean over the batch of the losses of image head, place head and difference.

    Binary cross-entropy on images that are ID or OOD as a whole, weighted by ``balance``; on the
    pixels of ID images with and without a patch, where smaller regions have a larger weight (see
    ``heatmap.region_weight``); and the squared error of the difference where OOD content is.

    The place head does not see images that are OOD as a whole: it would learn how likely that is,
    instead of where.

    Args:
        output: Of the decoder.
        presence: ``(B, H, W)`` uint8, see ``TrainingBatch``.
        magnitude: ``(B, 3, H, W)`` of the difference to the nearest ID image, in [0, 1].
        region_power: Exponent of the weight of small regions.
        balance: Weights of ID and OOD images.
    """
    dtype = output.image.dtype
    opacity = presence.to(dtype) / 255
    share = (presence > 0).to(dtype).mean(dim=(1, 2))
    is_id, is_ood = share == 0, (presence == 255).all(dim=2).all(dim=1)
    image = functional.binary_cross_entropy_with_logits(
        output.image, is_ood.to(dtype), reduction="none"
    )
    image = (balance.id * is_id + balance.ood * is_ood) * image
    pixels = functional.binary_cross_entropy_with_logits(
        output.place[:, 0], opacity, reduction="none"
    ).mean(dim=(1, 2))
    place = ~is_ood * torch.where(is_id, 1.0, share).pow(-region_power) * pixels
    error = (output.difference - magnitude).square().mean(dim=1)
    difference = (opacity * error).mean(dim=(1, 2))
    return (image + place + difference).mean()
