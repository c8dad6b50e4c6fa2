"""Decoders: features, predicted class and optionally feature maps in, a heatmap out."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, distributed, nn
from torch.nn import functional

from ood_heatmap.decoder_base import UNIT_RANGE, Decoder, DecoderConfig, Range, init_he, resize
from ood_heatmap.distributed import world_size
from ood_heatmap.errors import DamagedCacheError
from ood_heatmap.split_decoder import SplitDecoder

__all__ = ["Decoder", "DecoderConfig", "decoder_metadata", "load_decoder", "make_decoder"]

# neurons of the plain decoder's hidden layer, and channels of its spatial branches
_HIDDEN_WIDTH, _SPATIAL_WIDTH = 256, 64


class DcganDecoder(Decoder):
    """The paper's decoder: transposed convolutions with batch norm.

    Each feature map goes through a 1x1 convolution and is concatenated to the decoder's map.

    Source: Hornauer and Belagiannis, Heatmap-based Out-of-Distribution Detection, WACV 2023; the
        architecture is that of Radford et al., DCGAN, ICLR 2016.
    """

    def __init__(
        self,
        config: DecoderConfig,
        feature_range: Range = UNIT_RANGE,
        map_ranges: Sequence[Range] = (),
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
        feature_range: Range = UNIT_RANGE,
        map_ranges: Sequence[Range] = (),
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
        self.apply(init_he)
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
        x = self.first(self.hidden(self._scale_inputs(features, prediction, noise, maps)))
        size = self.config.first_size
        x = functional.relu(x.unflatten(1, (-1, size, size)))
        corrections: list[Tensor] = []
        for step, joining in enumerate(self._joining):
            for number in joining:
                feature_map = self._scale_map(maps[number], number, x.shape[2])
                correction = self.maps[number](feature_map, x)
                corrections.append(resize(correction, self.config.sizes[-1]))
            if step < len(self.steps):
                x = self.steps[step](x)
        return self._to_heatmap(sum(corrections, start=self.last(x)))


def make_decoder(
    config: DecoderConfig,
    feature_range: Range = UNIT_RANGE,
    map_ranges: Sequence[Range] = (),
) -> Decoder:
    """Make an untrained decoder; see ``Decoder`` for the arguments."""
    if config.stack == "split":
        return SplitDecoder(config, feature_range, map_ranges)
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


def _init_dcgan(module: nn.Module) -> None:
    """Initialise as DCGAN: weights N(0, 0.02), batch norm weights N(1, 0.02)."""
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
